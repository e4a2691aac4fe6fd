/// Which L2 tables of an L1 table have been looked through, a bit for each cluster of the file. In a file of very many
/// clusters some share a bit; so a table that seems to be known is looked through again, within limits.
struct QCOW2SeenTables {
    /// Bits at most: 8 MiB.
    private static let bitLimit: UInt64 = 1 << 26
    /// Entries of tables that are looked at again.
    private static let repeatLimit: UInt64 = 1 << 22

    private var words: [UInt64]
    private var repeated: UInt64 = 0

    /// For a file of that many clusters.
    init(clusterCount: UInt64) {
        words = [UInt64](repeating: 0, count: Int(min(clusterCount, Self.bitLimit) / 64 + 1))
    }

    private func bit(_ cluster: UInt64) -> (word: Int, mask: UInt64) {
        let number = cluster % (UInt64(words.count) * 64)
        return (Int(number / 64), 1 << (number % 64))
    }

    /// Notes a table of so many entries, and answers whether to look through it.
    mutating func insert(_ cluster: UInt64, entryCount: UInt64) -> Bool {
        let (word, mask) = bit(cluster)
        if words[word] & mask != 0 {
            repeated += entryCount
            return repeated <= Self.repeatLimit
        }
        words[word] |= mask
        return true
    }

    /// Forgets a table.
    mutating func remove(_ cluster: UInt64) {
        let (word, mask) = bit(cluster)
        words[word] &= ~mask
    }

    /// The next L1 table begins.
    mutating func beginTable() { repeated = 0 }
}
