internal import Glibc

/// A value that is only reachable while its mutex is held, and whose changes can be waited for.
@safe
final class Monitor<Value>: @unchecked Sendable {  // the mutex guards the value
    private let mutex: UnsafeMutablePointer<pthread_mutex_t>
    private let condition: UnsafeMutablePointer<pthread_cond_t>
    private var value: Value

    init(_ value: sending Value) {
        unsafe mutex = .allocate(capacity: 1)
        unsafe mutex.initialize(to: pthread_mutex_t())
        unsafe pthread_mutex_init(mutex, nil)
        unsafe condition = .allocate(capacity: 1)
        unsafe condition.initialize(to: pthread_cond_t())
        unsafe pthread_cond_init(condition, nil)
        self.value = value
    }

    deinit {
        unsafe pthread_cond_destroy(condition)
        unsafe condition.deallocate()
        unsafe pthread_mutex_destroy(mutex)
        unsafe mutex.deallocate()
    }

    /// Runs `body` with the value, alone.
    func withLock<R, E: Error>(_ body: (inout Value) throws(E) -> R) throws(E) -> R {
        unsafe pthread_mutex_lock(mutex)
        defer { unsafe pthread_mutex_unlock(mutex) }
        return try body(&value)
    }

    /// Waits, without the lock, for ``changed()`` or for nothing. Only inside ``withLock(_:)``, which must not have
    /// read anything of the value that it still relies on.
    func wait() { unsafe pthread_cond_wait(condition, mutex) }

    /// Wakes all that wait.
    func changed() { unsafe pthread_cond_broadcast(condition) }
}
