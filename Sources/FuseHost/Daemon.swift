internal import FuseShim
import Glibc

/// Going to the background, with the caller waiting until all is well.
///
/// `run` forks. The child goes on, with the terminal still its own: it may print, and Ctrl-C ends both. The parent
/// waits for the child's word: `ready` lets it exit with status 0, `fail` makes it print the message and exit with the
/// status. If the child dies without a word the parent says so.
///
/// In the foreground the process may be a service of systemd: then `ready` and `fail` tell its manager.
///
/// It must be the first thing a program does: Dispatch and threads do not survive a fork. The child goes on in a new
/// thread: the Swift runtime remembers the number of the thread that it runs in, and locks with it. In the forked copy
/// of the first thread that number is the parent's, and a lock that two threads want at the same time is never given
/// back (futex(2): `FUTEX_UNLOCK_PI` fails with EPERM).
public struct Daemon: ~Copyable {
    /// Where the parent listens; -1 in the foreground.
    private let pipe: Int32
    private let program: String
    /// `/dev/null`, for the standard descriptors; -1 in the foreground.
    private let null: Int32
    /// The process that stays outside when this one is confined.
    public let keeper: Keeper
    /// Whom to tell of the service's state; nobody in the background, where the service is another process.
    public let service: ServiceNotification

    /// Forks unless `foreground`, runs `body` in the child, and exits with the status that it answers. Also starts the
    /// keeper, makes SIGPIPE show up as EPIPE, and the process one that the system does without last when it is short
    /// of memory.
    public static func run(
        program: String, foreground: Bool, _ body: @escaping (consuming Daemon) -> Int32
    ) -> Never {
        fuseshim_ignore_sigpipe()
        if foreground {
            let keeper = startKeeper(program)
            let status = body(
                Daemon(pipe: -1, program: program, null: -1, keeper: keeper, service: .fromEnvironment()))
            keeper.end()
            exit(status)
        }
        var ends: [Int32] = [-1, -1]
        if unsafe Glibc.pipe(&ends) != 0 { cannot(program, errno) }
        for end in ends { _ = fcntl(end, F_SETFD, FD_CLOEXEC) }
        fflush(nil)
        let child = fuseshim_fork()
        if child < 0 { cannot(program, errno) }
        if child > 0 {
            close(ends[1])
            listen(ends[0], child: child, program: program)
        }
        // A lock or a pipe that the caller left open would stay so for as long as the mount is there.
        fuseshim_close_others(ends[1])
        let keeper = startKeeper(program)
        let null = SystemFiles.openFile("/dev/null", O_RDWR | O_CLOEXEC)
        let work = Work { [pipe = ends[1]] in
            let status = body(Daemon(pipe: pipe, program: program, null: null, keeper: keeper, service: .none))
            keeper.end()
            return status
        }
        let failure = unsafe fuseshim_go_on_in_thread(
            { context in
                // What was retained for this thread just below.
                guard let context = unsafe context else { return }
                exit(unsafe Unmanaged<Work>.fromOpaque(context).takeRetainedValue().body())
            }, Unmanaged.passRetained(work).toOpaque())
        cannot(program, failure)
    }

    /// What must be done before there are threads, which then have it too.
    private static func startKeeper(_ program: String) -> Keeper {
        do throws(HostError) {
            let keeper = try Keeper.start()
            fuseshim_resist_memory_pressure()
            return keeper
        } catch {
            say("\(error)")
            _exit(1)
        }
    }

    /// What the new thread does.
    private final class Work {
        let body: () -> Int32
        init(_ body: @escaping () -> Int32) { self.body = body }
    }

    private static func cannot(_ program: String, _ code: Int32) -> Never {
        say("\(program): cannot go to the background: \(errorText(code))")
        _exit(1)
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
        // A service manager kills what a process leaves behind, and says so.
        keeper.end()
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
