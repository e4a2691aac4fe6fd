internal import DiskImage
internal import DiskStorage

extension QCOW2Allocator {
    /// Takes `count` clusters in one piece at the file's end, for a table; they read as zeros in the file, and are not
    /// in the table cache.
    func takeTogether(_ count: UInt64) throws(DiskError) -> UInt64 {
        let first = try state.withLock { (state) throws(DiskError) in
            while true {
                // Whole pages of the cache, which has seen nothing of them.
                let start = (end.value + 4095) & ~4095
                let first = start >> clusterBits
                try checkRoom(first, count)
                // Blocks that count them come first: they lie at the end too.
                var missing: UInt64?
                for index in first >> perBlockBits...(first + count - 1) >> perBlockBits {
                    if try refcountBlock(index, state) == nil {
                        missing = index
                        break
                    }
                }
                if let missing {
                    try addRefcountBlock(missing, &state)
                    continue
                }
                moveEnd(to: ((first + count) << clusterBits + 4095) & ~4095)
                for cluster in first..<first + count { try setRefcount(1, of: cluster, &state) }
                return first
            }
        }
        if hasFixedLength {
            try handle.storage.writeZeros(first << clusterBits..<(first + count) << clusterBits, for: .table)
        }
        return first << clusterBits
    }

    /// Cuts the file off behind the last cluster with a refcount; everything is durable.
    func cutOff() throws(DiskError) {
        guard !hasFixedLength else { return }
        try state.withLock { (state) throws(DiskError) in
            var last: UInt64?
            for index in (0..<state.refcountTableEntries).reversed() {
                guard let block = try refcountBlock(index, state) else { continue }
                for word in (0..<clusterSize / 8).reversed() where try table.entry64(at: block + word * 8) != 0 {
                    let bits = try table.entry64(at: block + word * 8)
                    for inWord in (0..<UInt64(1) << layout.perWordBits).reversed()
                    where last == nil && layout.get(bits, inWord) != 0 {
                        last = index << perBlockBits + word << layout.perWordBits + inWord
                    }
                    break
                }
                if last != nil { break }
            }
            guard let last, (last + 1) << clusterBits < (try handle.storage.length()) else { return }
            try handle.storage.setLength((last + 1) << clusterBits)
            try handle.storage.flush()
        }
    }
}
