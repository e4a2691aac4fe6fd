public import DiskStorage
internal import Dispatch

/// Asynchronous requests to a disk, on Dispatch: several at once, each with a completion, flush being a barrier.
///
/// Requests that are submitted together run side by side and may finish in any order. A flush waits for what was
/// submitted before it; what is submitted after it waits for the flush.
public final class DiskQueue: Sendable {
    /// The disk that the requests go to.
    public let disk: Disk
    private let queue: DispatchQueue

    public init(_ disk: Disk, label: String = "vdmount.disk") {
        self.disk = disk
        queue = DispatchQueue(label: label, qos: .userInitiated, attributes: .concurrent)
    }

    /// What a completion is told: the result of its request.
    public typealias Completion<Value> = @Sendable (Result<Value, DiskError>) -> Void

    /// Reads `count` bytes from `offset` on.
    public func read(at offset: UInt64, count: Int, completion: @escaping Completion<[UInt8]>) {
        submit(completion) { (disk) throws(DiskError) in try disk.read(at: offset, count: count) }
    }

    /// Writes `bytes` at `offset`.
    public func write(_ bytes: [UInt8], at offset: UInt64, completion: @escaping Completion<Void>) {
        submit(completion) { (disk) throws(DiskError) in try disk.write(bytes, at: offset) }
    }

    /// Discards a range.
    public func discard(offset: UInt64, length: UInt64, completion: @escaping Completion<Void>) {
        submit(completion) { (disk) throws(DiskError) in try disk.discard(offset: offset, length: length) }
    }

    /// Makes durable what was submitted before, once it is done.
    public func flush(completion: @escaping Completion<Void>) {
        submit(completion, isBarrier: true) { (disk) throws(DiskError) in try disk.flush() }
    }

    private func submit<Value>(
        _ completion: @escaping Completion<Value>, isBarrier: Bool = false,
        _ body: @escaping @Sendable (Disk) throws(DiskError) -> Value
    ) {
        queue.async(flags: isBarrier ? .barrier : []) { [disk] in
            let result: Result<Value, DiskError>
            do throws(DiskError) { result = .success(try body(disk)) } catch { result = .failure(error) }
            completion(result)
        }
    }

    // MARK: - async/await

    /// Reads `count` bytes from `offset` on.
    public func read(at offset: UInt64, count: Int) async throws(DiskError) -> [UInt8] {
        try await result { read(at: offset, count: count, completion: $0) }.get()
    }

    /// Writes `bytes` at `offset`.
    public func write(_ bytes: [UInt8], at offset: UInt64) async throws(DiskError) {
        try await result { write(bytes, at: offset, completion: $0) }.get()
    }

    /// Discards a range.
    public func discard(offset: UInt64, length: UInt64) async throws(DiskError) {
        try await result { discard(offset: offset, length: length, completion: $0) }.get()
    }

    /// Makes durable what was submitted before, once it is done.
    public func flush() async throws(DiskError) {
        try await result { flush(completion: $0) }.get()
    }

    private func result<Value: Sendable>(
        _ start: (@escaping Completion<Value>) -> Void
    ) async -> Result<Value, DiskError> {
        await withCheckedContinuation { continuation in start { continuation.resume(returning: $0) } }
    }
}
