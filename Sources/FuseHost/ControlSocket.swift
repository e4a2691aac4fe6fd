import Dispatch
internal import FuseShim
import Glibc

/// The socket on which a daemon answers questions about itself: a line is asked, a text is answered, the connection
/// ends. Only the daemon's user and root get an answer.
// Sendable: constants; the Dispatch source may be used from any thread.
final class ControlSocket: @unchecked Sendable {
    /// The most bytes of a question.
    private static let questionLimit = 4096
    /// The most bytes of an answer.
    private static let answerLimit = 1 << 20

    private let source: any DispatchSourceRead

    /// Takes over a listening socket and answers with what `answer` says to a line; nil: it is not understood.
    /// Questions are answered one after the other, on a queue of low priority.
    init(listening descriptor: Int32, answer: @escaping @Sendable (String) -> String?) {
        let queue = DispatchQueue(label: "vdmount.control", qos: .utility)
        source = DispatchSource.makeReadSource(fileDescriptor: descriptor, queue: queue)
        source.setEventHandler { Self.serve(descriptor, answer) }
        source.setCancelHandler { close(descriptor) }
        source.activate()
    }

    /// Ends answering.
    func end() { source.cancel() }

    private static func serve(_ listening: Int32, _ answer: (String) -> String?) {
        var user: uid_t = 0
        let connection = unsafe fuseshim_control_accept(listening, &user)
        guard connection >= 0 else { return }
        defer { close(connection) }
        guard user == 0 || user == geteuid() else { return }
        guard let question = SystemFiles.contents(of: connection, limit: questionLimit) else { return }
        let line = String(decoding: question.prefix { $0 != 0x0A }, as: UTF8.self)
        SystemFiles.writeAll(answer(line).map { "ok\n" + $0 } ?? "unknown\n", to: connection)
    }

    /// Asks the daemon at a path: its answer, nil if there is none. Nothing is said to anybody but a process of
    /// `owner`: a user's folder can hold a link to somebody else's socket.
    static func ask(_ question: String, at path: String, of owner: UInt32) -> String? {
        var user: uid_t = 0
        let connection = unsafe fuseshim_control_connect(path, &user)
        guard connection >= 0 else { return nil }
        defer { close(connection) }
        guard user == owner else { return nil }
        guard SystemFiles.writeAll(question + "\n", to: connection) else { return nil }
        fuseshim_control_end_sending(connection)
        // Each read waits two seconds at most; all of them together may not take much longer.
        var bytes: [UInt8] = []
        let start = ContinuousClock.now
        while let more = SystemFiles.someContents(of: connection), bytes.count < answerLimit {
            if more.isEmpty || ContinuousClock.now - start > .seconds(3) { break }
            bytes += more
        }
        guard bytes.starts(with: "ok\n".utf8) else { return nil }
        return String(decoding: bytes.dropFirst(3), as: UTF8.self)
    }
}
