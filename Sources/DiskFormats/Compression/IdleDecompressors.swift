internal import DiskStorage

/// Decompressors that are not in use: one allocation serves all later calls.
final class IdleDecompressors<Decompressor: Sendable>: Sendable {
    private let idle = Locked<[Decompressor]>([])
    /// How many are kept for later calls at most.
    private static var limit: Int { 16 }
    private let make: @Sendable () throws(DiskError) -> Decompressor

    init(_ make: @escaping @Sendable () throws(DiskError) -> Decompressor) { self.make = make }

    /// Lends one to `body`, which has it alone.
    func lend<Result>(_ body: (Decompressor) throws(DiskError) -> Result) throws(DiskError) -> Result {
        let known = idle.withLock { $0.popLast() }
        let decompressor = if let known { known } else { try make() }
        defer { idle.withLock { if $0.count < Self.limit { $0.append(decompressor) } } }
        return try body(decompressor)
    }
}
