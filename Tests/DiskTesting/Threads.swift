internal import DiskStorage
internal import Glibc

/// What a thread is to do.
private final class Job: Sendable {
    let run: @Sendable () -> Void
    init(_ run: @escaping @Sendable () -> Void) { self.run = run }
}

/// Runs `body` with the numbers 0 to `count - 1` on as many threads, and returns when all are done. Dispatch would run
/// no more at a time than the machine has processors.
public func onThreads(_ count: Int, _ body: @escaping @Sendable (Int) -> Void) {
    var threads: [pthread_t] = []
    for number in 0..<count {
        let job = unsafe Unmanaged.passRetained(Job { body(number) }).toOpaque()
        var thread = pthread_t()
        let result = unsafe pthread_create(
            &thread, nil,
            { pointer in
                // The reference was handed over with the pointer.
                if let pointer = unsafe pointer { unsafe Unmanaged<Job>.fromOpaque(pointer).takeRetainedValue().run() }
                return nil
            }, job)
        precondition(result == 0, "a thread cannot be started: \(DiskError.describe(errno: result))")
        threads.append(thread)
    }
    for thread in threads { pthread_join(thread, nil) }
}
