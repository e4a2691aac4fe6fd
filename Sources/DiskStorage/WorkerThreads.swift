internal import CLinux
internal import Glibc

/// Threads that work on one task together until all are done.
///
/// They are plain threads: whoever uses them may have no queues to work on (a confined daemon), and must have as many
/// as it asked for.
public enum WorkerThreads {
    /// How many threads keep this machine busy, reads and writes included.
    public static var usualCount: Int { max(2, min(16, Int(sysconf(Int32(_SC_NPROCESSORS_ONLN))))) }

    /// Runs `body` with the numbers 0 to `count - 1` on as many threads, the caller's among them, and returns when all
    /// are done. Throws the first error; the others should end early when they see that `hasFailed()`.
    public static func run(
        _ count: Int, _ body: @escaping @Sendable (_ number: Int, _ hasFailed: () -> Bool) throws(DiskError) -> Void
    ) throws(DiskError) {
        let failure = Locked<DiskError?>(nil)
        let work: @Sendable (Int) -> Void = { number in
            do throws(DiskError) {
                try body(number) { failure.withLock { $0 != nil } }
            } catch {
                failure.withLock { if $0 == nil { $0 = error } }
            }
        }
        var threads: [pthread_t] = []
        for number in 1..<max(1, count) {
            let job = unsafe Unmanaged.passRetained(Job { work(number) })
            var thread = pthread_t()
            let result = unsafe pthread_create(
                &thread, nil,
                { pointer in
                    // The reference was handed over with the pointer.
                    if let pointer = unsafe pointer {
                        unsafe Unmanaged<Job>.fromOpaque(pointer).takeRetainedValue().run()
                    }
                    return nil
                }, job.toOpaque())
            // Without this thread the others do its part.
            if result == 0 { threads.append(thread) } else { unsafe job.release() }
        }
        work(0)
        for thread in threads { pthread_join(thread, nil) }
        if let error = failure.withLock({ $0 }) { throw error }
    }

    /// What a thread is to do.
    private final class Job: Sendable {
        let run: @Sendable () -> Void
        init(_ run: @escaping @Sendable () -> Void) { self.run = run }
    }
}
