public import DiskStorage
internal import Glibc

/// A folder for one test, removed with all that is in it when nobody has it any more.
public final class TemporaryFolder: Sendable {
    /// Where it is.
    public let path: String
    private let isOurs: Bool

    /// A folder that somebody else made, and removes.
    public init(existing path: String) {
        self.path = path
        isOurs = false
    }

    /// Creates it below TMPDIR, or /tmp.
    public init() throws(DiskError) {
        let parent = unsafe getenv("TMPDIR").map { unsafe String(cString: $0) } ?? "/tmp"
        var template = Array("\(parent)/vdmount-test-XXXXXX".utf8CString)
        guard unsafe mkdtemp(&template) != nil else { throw .system(errno, "create a temporary folder in \(parent)") }
        path = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
        isOurs = true
    }

    deinit { if isOurs { _ = try? Subprocess.run(["rm", "-rf", "--one-file-system", path]) } }

    /// The path of a file in it.
    public func file(_ name: String) -> String { "\(path)/\(name)" }

    /// Creates a file in it, and answers its path.
    @discardableResult
    public func write(_ bytes: [UInt8], to name: String) throws(DiskError) -> String {
        let storage = try FileStorage(creating: file(name))
        try storage.write(bytes, at: 0, for: .guestData)
        return file(name)
    }

    /// All bytes of a file in it.
    public func read(_ name: String) throws(DiskError) -> [UInt8] {
        let storage = try FileStorage(path: file(name), isWritable: false)
        return try storage.availableBytes(at: 0, count: Int(try storage.length()), for: .guestData)
    }
}
