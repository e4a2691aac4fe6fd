internal import DiskStorage

/// The file of an image that may not be written to, with some table entries read as 0: repaired in memory.
final class QEDRepairedTables: Storage {
    private let inner: any Storage
    /// Where the entries stand, ascending.
    private let cleared: [UInt64]
    let traits: StorageTraits
    var name: String { inner.name }

    init(_ inner: any Storage, clearing entries: Set<UInt64>) {
        self.inner = inner
        cleared = entries.sorted()
        traits = StorageTraits()
    }

    func read(into buffer: IOBuffer, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) -> Int {
        let count = try inner.read(into: buffer, at: offset, for: purpose)
        var index = firstIndex(endingAfter: offset)
        while index < cleared.count, cleared[index] < offset + UInt64(count) {
            let start = max(cleared[index], offset)
            let end = min(cleared[index] + 8, offset + UInt64(count))
            buffer.slice(Int(start - offset), Int(end - start)).zero()
            index += 1
        }
        return count
    }

    /// The first entry that ends after `offset`.
    private func firstIndex(endingAfter offset: UInt64) -> Int {
        var low = 0
        var high = cleared.count
        while low < high {
            let middle = (low + high) / 2
            if cleared[middle] + 8 <= offset { low = middle + 1 } else { high = middle }
        }
        return low
    }

    func length() throws(DiskError) -> UInt64 { try inner.length() }
    func allocatedBytes() throws(DiskError) -> UInt64 { try inner.allocatedBytes() }
    func nextData(from offset: UInt64) throws(DiskError) -> Range<UInt64>? { try inner.nextData(from: offset) }

    func write(_ bytes: IOBytes, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) {
        throw DiskError(.readOnly, "the image was opened read-only", image: name)
    }

    func discard(_ range: Range<UInt64>, mustZero: Bool, for purpose: StoragePurpose) throws(DiskError) {
        throw DiskError(.readOnly, "the image was opened read-only", image: name)
    }

    func setLength(_ length: UInt64) throws(DiskError) {
        throw DiskError(.readOnly, "the image was opened read-only", image: name)
    }

    func flush() {}
}
