import FuseHost
import Glibc
import Logging

/// Where log lines go: a file, or standard error, one line each with time and level.
struct LineLogHandler: LogHandler {
    var metadata: Logger.Metadata = [:]
    var logLevel: Logger.Level = .notice
    private let descriptor: Int32

    init(descriptor: Int32) { self.descriptor = descriptor }

    subscript(metadataKey key: String) -> Logger.Metadata.Value? {
        get { metadata[key] }
        set { metadata[key] = newValue }
    }

    func log(event: LogEvent) {
        var now = time(nil)
        var parts = unsafe tm()
        unsafe localtime_r(&now, &parts)
        var stamp = [CChar](repeating: 0, count: 32)
        let length = unsafe strftime(&stamp, stamp.count, "%Y-%m-%dT%H:%M:%S%z", &parts)
        let text = String(decoding: stamp.prefix(length).map { UInt8(bitPattern: $0) }, as: UTF8.self)
        // One write a line, so that lines of several threads do not mix.
        let bytes = Array("\(text) \(event.level): \(event.message)\n".utf8)
        _ = unsafe bytes.withUnsafeBytes { unsafe write(descriptor, $0.baseAddress, $0.count) }
    }
}

extension Logger {
    /// The daemon's log; `path` nil is standard error. Nil if the file cannot be opened.
    static func make(level: Logger.Level, path: String?) -> Logger? {
        var descriptor = STDERR_FILENO
        if let path {
            descriptor = unsafe open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0o640)
            guard descriptor >= 0 else { return nil }
        }
        // A confined process cannot read the time zone.
        tzset()
        let target = descriptor
        var logger = Logger(label: "vdmount") { _ in LineLogHandler(descriptor: target) }
        logger.logLevel = level
        return logger
    }
}
