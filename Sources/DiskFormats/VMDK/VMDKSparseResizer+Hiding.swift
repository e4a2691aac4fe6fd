internal import DiskStorage

/// Grains of zeros in the place of absent ones, which would show the parent's bytes: marked as zeros where the extent
/// knows that, else with a place of their own, a hole of the file.
extension VMDKSparseResizer {
    /// The grains that lie behind the disk's end, `length`, as a whole, up to the one with the last `hidden` sector.
    func grains(behind length: UInt64, upTo hidden: UInt64) -> Range<UInt64> {
        let first = length.dividedRoundingUp(by: grainSectors)
        return first..<max(first, hidden.dividedRoundingUp(by: grainSectors))
    }

    /// The tables of these grains among the first `count`, which the directories have already.
    private func tables(for grains: Range<UInt64>, of count: UInt64) -> Range<UInt64> {
        let end = min(grains.isEmpty ? 0 : (grains.upperBound - 1) / entriesPerTable + 1, count)
        return min(grains.lowerBound / entriesPerTable, end)..<end
    }

    /// How many tables of these grains are not there yet, in all directories together.
    func missingTableCount(for grains: Range<UInt64>, of count: UInt64) throws(DiskError) -> UInt64 {
        let length = try storage.length()
        var missing: UInt64 = 0
        for directory in directories {
            for index in tables(for: grains, of: count) {
                if try tableOffset(at: directory + index * 4, length) == nil { missing += 1 }
            }
        }
        return missing
    }

    /// Enters tables, which lie one after the other from `offset` on, where there are none.
    func addMissingTables(
        for grains: Range<UInt64>, of count: UInt64, from offset: UInt64
    ) throws(DiskError) {
        let length = try storage.length()
        var position = offset
        for directory in directories {
            for index in tables(for: grains, of: count) {
                let place = directory + index * 4
                guard try tableOffset(at: place, length) == nil else { continue }
                try writeEntries([UInt32(truncatingIfNeeded: position / 512)], at: place)
                position += tableSize
            }
        }
    }

    /// Has grains be zeros: by their mark, or by places that lie one after the other from `offset` on.
    func enterZeroGrains(_ grains: Range<UInt64>, from offset: UInt64) throws(DiskError) {
        let length = try storage.length()
        var grain = grains.lowerBound
        while grain < grains.upperBound {
            let index = grain / entriesPerTable
            let end = min(grains.upperBound, (index + 1) * entriesPerTable)
            let entries = (grain..<end).map { grain in
                hasZeroGrains
                    ? 1 : UInt32(truncatingIfNeeded: (offset + (grain - grains.lowerBound) * grainSize) / 512)
            }
            for directory in directories {
                guard let table = try tableOffset(at: directory + index * 4, length) else { continue }
                try writeEntries(entries, at: table + grain % entriesPerTable * 4)
            }
            grain = end
        }
    }

    private func writeEntries(_ entries: [UInt32], at offset: UInt64) throws(DiskError) {
        var fields = FieldWriter(count: entries.count * 4)
        for (index, entry) in entries.enumerated() { fields.littleEndian(entry, at: index * 4) }
        try storage.write(fields.bytes, at: offset, for: .table)
    }

    /// Where the table of a directory entry lies; nil where there is none.
    private func tableOffset(at place: UInt64, _ length: UInt64) throws(DiskError) -> UInt64? {
        let sector = try entry(at: place)
        guard sector > 0 else { return nil }
        guard sector >= firstTable, UInt64(sector) * 512 + tableSize <= length else {
            throw DiskError(
                .needsRepair,
                "a directory entry puts a grain table at sector \(sector), outside the file: "
                    + "run 'vdimg check --repair' first", image: storage.name, offset: place)
        }
        return UInt64(sector) * 512
    }
}
