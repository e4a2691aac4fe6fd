public import DiskStorage
// The environment is a variable there; nobody changes it.
@unsafe @preconcurrency internal import Glibc

/// Runs programs for tests: foreign tools to compare with, and our own.
public struct Subprocess: Sendable {
    /// What a program left behind.
    public struct Result: Sendable {
        /// The exit status, or 128 and the signal's number.
        public let status: Int32
        public let output: [UInt8]
        public let errors: [UInt8]

        /// Standard output as text.
        public var outputText: String { String(decoding: output, as: UTF8.self) }
        /// Standard error as text.
        public var errorText: String { String(decoding: errors, as: UTF8.self) }
    }

    /// The process's number.
    public let pid: Int32
    private let output: TemporaryFile
    private let errors: TemporaryFile

    /// Runs `command` to its end; its first word is looked for in PATH.
    public static func run(_ command: [String], input: [UInt8] = []) throws(DiskError) -> Result {
        try start(command, input: input).wait()
    }

    /// Starts `command`, to be waited for later.
    public static func start(_ command: [String], input: [UInt8] = []) throws(DiskError) -> Subprocess {
        // Files instead of pipes: neither side ever waits for the other.
        let standardInput = try TemporaryFile(containing: input)
        let output = try TemporaryFile(containing: [])
        let errors = try TemporaryFile(containing: [])
        var actions = unsafe posix_spawn_file_actions_t()
        unsafe posix_spawn_file_actions_init(&actions)
        defer { unsafe posix_spawn_file_actions_destroy(&actions) }
        for (descriptor, file) in [standardInput, output, errors].enumerated() {
            unsafe posix_spawn_file_actions_adddup2(&actions, file.descriptor, Int32(descriptor))
        }
        // Dispatch blocks all signals in its threads, from which tests run; a program should get its own.
        var attributes = posix_spawnattr_t()
        unsafe posix_spawnattr_init(&attributes)
        defer { unsafe posix_spawnattr_destroy(&attributes) }
        var none = sigset_t()
        unsafe sigemptyset(&none)
        unsafe posix_spawnattr_setsigmask(&attributes, &none)
        unsafe posix_spawnattr_setflags(&attributes, Int16(POSIX_SPAWN_SETSIGMASK))
        var arguments = unsafe command.map { unsafe strdup($0) } + [nil]
        defer { for index in unsafe arguments.indices { unsafe free(arguments[index]) } }
        var pid: pid_t = 0
        let result = unsafe posix_spawnp(&pid, command[0], &actions, &attributes, &arguments, environ)
        guard result == 0 else { throw .system(result, "run \(command[0])") }
        return Subprocess(pid: pid, output: output, errors: errors)
    }

    /// Waits for the end.
    public func wait() throws(DiskError) -> Result {
        var status: Int32 = 0
        while unsafe waitpid(pid, &status, 0) < 0 {
            guard errno == EINTR else { throw .system(errno, "wait for process \(pid)") }
        }
        let signal = status & 0x7f
        return Result(
            status: signal == 0 ? (status >> 8) & 0xff : 128 + signal, output: try output.contents(),
            errors: try errors.contents())
    }

    /// Sends a signal (SIGTERM is 15, SIGKILL 9).
    public func send(signal: Int32) { kill(pid, signal) }
}

/// A file without a name, closed when nobody has it any more.
private final class TemporaryFile: Sendable {
    let descriptor: Int32

    init(containing bytes: [UInt8]) throws(DiskError) {
        var template = Array("/tmp/vdmount-test-XXXXXX".utf8CString)
        descriptor = unsafe mkstemp(&template)
        guard descriptor >= 0 else { throw .system(errno, "create a temporary file") }
        unsafe unlink(&template)
        if !bytes.isEmpty {
            try bytes.withIOBytes { (memory) throws(DiskError) in try FileStorage.write(descriptor, memory, at: 0) }
        }
    }

    deinit { close(descriptor) }

    func contents() throws(DiskError) -> [UInt8] {
        var status = stat()
        guard unsafe fstat(descriptor, &status) == 0 else { throw .system(errno, "examine a temporary file") }
        var bytes = [UInt8](repeating: 0, count: Int(status.st_size))
        let done = try bytes.withIOBuffer { (memory) throws(DiskError) in
            try FileStorage.read(descriptor, into: memory, at: 0)
        }
        return Array(bytes[..<done])
    }
}
