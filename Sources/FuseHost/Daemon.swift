internal import FuseShim
import Glibc

/// Going to the background, with the caller waiting until all is well.
///
/// `start` forks. The child goes on, with the terminal still its own: it may print, and Ctrl-C ends both. The parent
/// waits for the child's word: `ready` lets it exit with status 0, `fail` makes it print the message and exit with the
/// status. If the child dies without a word the parent says so.
///
/// In the foreground the process may be a service of systemd: then `ready` and `fail` tell its manager.
///
/// It must be the first thing a program does: Dispatch and threads do not survive a fork.
public struct Daemon: ~Copyable {
    /// Where the parent listens; -1 in the foreground.
    private let pipe: Int32
    private let program: String
    /// Whom to tell of the service's state; nobody in the background, where the service is another process.
    public let service: ServiceNotification

    /// Forks unless `foreground`. Returns in the child only. Also makes SIGPIPE show up as EPIPE.
    public static func start(program: String, foreground: Bool) throws(HostError) -> Daemon {
        fuseshim_ignore_sigpipe()
        if foreground { return Daemon(pipe: -1, program: program, service: .fromEnvironment()) }
        var ends: [Int32] = [-1, -1]
        guard unsafe Glibc.pipe(&ends) == 0 else {
            throw HostError(subject: program, action: "cannot go to the background", errno: errno)
        }
        for end in ends { _ = fcntl(end, F_SETFD, FD_CLOEXEC) }
        fflush(nil)
        let child = fuseshim_fork()
        guard child >= 0 else {
            throw HostError(subject: program, action: "cannot go to the background", errno: errno)
        }
        if child == 0 {
            // A lock or a pipe that the caller left open would stay so for as long as the mount is there.
            fuseshim_close_others(ends[1])
            return Daemon(pipe: ends[1], program: program, service: .none)
        }
        close(ends[1])
        listen(ends[0], child: child, program: program)
    }

    /// The disk is there: lets the parent exit, leaves the terminal, its session and the working folder behind.
    /// False if the parent is gone, as after Ctrl-C: then the caller should unmount and end.
    public consuming func ready() -> Bool {
        guard pipe >= 0 else {
            service.ready()
            return true
        }
        let heard = SystemFiles.writeAll("0", to: pipe)
        close(pipe)
        setsid()
        let null = SystemFiles.openFile("/dev/null", O_RDWR | O_CLOEXEC)
        for descriptor: Int32 in 0...2 where null >= 0 { dup2(null, descriptor) }
        if null > 2 { close(null) }
        unsafe chdir("/")
        return heard
    }

    /// Ends the program with one message `program: message` on the user's standard error.
    ///
    /// - Parameter errno: the number behind it for the service manager, 0 if there is none.
    public consuming func fail(_ message: String, status: Int32 = 1, errno code: Int32 = 0) -> Never {
        service.failed(message, errno: code)
        if pipe < 0 || !SystemFiles.writeAll("\(status) \(message)", to: pipe) {
            Self.say("\(program): \(message)")
        }
        exit(status)
    }

    /// Prints a line to standard error, in foreground and before ``ready()``.
    public static func say(_ line: String) {
        SystemFiles.writeAll(line + "\n", to: STDERR_FILENO)
    }

    private static func listen(_ pipe: Int32, child: Int32, program: String) -> Never {
        let word = String(decoding: SystemFiles.contents(of: pipe, limit: 65536) ?? [], as: UTF8.self)
        // No atexit handlers here: they belong to the child.
        if word == "0" { _exit(0) }
        let parts = word.split(separator: " ", maxSplits: 1)
        if parts.count == 2, let status = Int32(parts[0]) {
            say("\(program): \(parts[1])")
            _exit(status)
        }
        var status: Int32 = 0
        _ = unsafe waitpid(child, &status, 0)
        let signal = status & 0x7F
        say("\(program): ended before the disk was ready" + (signal == 0 ? "" : ", by signal \(signal)"))
        _exit(1)
    }
}
