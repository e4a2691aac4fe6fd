/// How refcounts lie in a refcount block (QEMU, docs/interop/qcow2, "Refcount block"): numbers of 1 to 64 bits, big
/// endian; those of less than a byte from the least significant bit on.
struct QCOW2RefcountLayout: Sendable {
    /// log2 of a refcount's bits.
    let order: UInt64

    init(order: UInt32) { self.order = UInt64(order) }

    var bits: UInt64 { 1 << order }
    var maximum: UInt64 { bits == 64 ? .max : 1 << bits - 1 }
    /// log2 of the refcounts of an aligned word of 64 bits.
    var perWordBits: UInt64 { 6 - order }
    /// log2 of the refcounts of a block of one cluster.
    func perBlockBits(_ clusterBits: UInt64) -> UInt64 { clusterBits + 3 - order }

    /// The refcount at `index` of a word whose bytes were loaded the least significant first.
    func get(_ word: UInt64, _ index: UInt64) -> UInt64 {
        let field = word >> (index << order) & maximum
        return order <= 3 ? field : field.byteSwapped >> (64 - bits)
    }

    /// The word with another refcount at `index`.
    func set(_ word: UInt64, _ index: UInt64, _ value: UInt64) -> UInt64 {
        let field = order <= 3 ? value : (value << (64 - bits)).byteSwapped
        let shift = index << order
        return word & ~(maximum << shift) | (field & maximum) << shift
    }
}
