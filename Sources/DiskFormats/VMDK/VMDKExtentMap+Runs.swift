internal import DiskImage
internal import DiskStorage

/// Ranges much longer than any request, as a search for data asks for: tables without grains are passed over whole,
/// many at a time, where they lie one after the other in the file.
extension VMDKGrainTables {
    /// From how many bytes on a range is translated in this way.
    static var longRange: UInt64 { 16 << 20 }

    /// What is known of the file's bytes, as far as it was looked at: a run of one entry.
    private struct KnownRun {
        var bytes: Range<UInt64> = 0..<0
        var entry: UInt32 = 0
        /// How far to look beyond a table's end: more, the longer the run has shown itself to be.
        var ahead: UInt64 = 0
        static let aheadLimit: UInt64 = 4 << 20
    }

    /// As ``map(_:_:_:isEncoded:into:)``.
    func mapLongRange(
        _ offset: UInt64, _ length: UInt64, _ storage: UInt16, isEncoded: Bool, into batch: inout ExtentBatch
    ) throws(DiskError) -> UInt64 {
        var done: UInt64 = 0
        var known = KnownRun()
        while done < length {
            let position = offset + done
            if let extent = try run(at: position, length - done, &known) {
                guard batch.append(extent) else { return done }
                done += extent.length
                continue
            }
            let part = min(length - done, tableCoverage - position % tableCoverage)
            let covered = try map(position, part, storage, isEncoded: isEncoded, into: &batch)
            done += covered
            if covered < part { return done }
        }
        return done
    }

    /// The run of absent or zero grains, at most to the end of its table, that begins at `position`; nil if something
    /// else begins there.
    private func run(at position: UInt64, _ length: UInt64, _ known: inout KnownRun) throws(DiskError) -> Extent? {
        let place = directoryOffset + position / tableCoverage * 4
        let tableSector = try table.entry32(at: place)
        guard tableSector != 0 else {
            let end = directoryOffset + (position + length).dividedRoundingUp(by: tableCoverage) * 4
            let tables = try (table.endOfRun(of: 0, in: place..<end) - place) / 4
            return Extent(.absent, length: min(length, tables * tableCoverage - position % tableCoverage))
        }
        let tableOffset = UInt64(tableSector) * 512
        let tableEnd = tableOffset + 4 << tableShift
        guard tableEnd <= end.value else { return nil }
        let inTable = position % tableCoverage
        let entryPlace = tableOffset + inTable / grainSize * 4
        if !known.bytes.contains(entryPlace) {
            let entry = try table.entry32(at: entryPlace)
            guard entry == 0 || entry == 1 && hasZeroGrains else { return nil }
            let limit = max(tableEnd, min(tableEnd + known.ahead, end.value & ~3))
            let runEnd = try table.endOfRun(of: entry, in: entryPlace..<limit)
            known.bytes = entryPlace..<max(runEnd, entryPlace + 4)
            known.entry = entry
            known.ahead = runEnd < limit ? 0 : min(KnownRun.aheadLimit, max(known.ahead * 4, 4 << tableShift))
        }
        let count = (min(known.bytes.upperBound, tableEnd) - entryPlace) / 4
        return Extent(
            known.entry == 0 ? .absent : .zero, length: min(length, count * grainSize - position % grainSize))
    }

    /// How many bytes from `inTable` on, an absent grain of an seSparse table, are absent.
    func absentLength(in tableOffset: UInt64, from inTable: UInt64, upTo length: UInt64) throws(DiskError) -> UInt64 {
        let first = inTable >> grainShift
        let inGrain = inTable & (grainSize - 1)
        guard length >= Self.longRange else { return min(length, grainSize - inGrain) }
        let place = tableOffset + first * 8
        let end = try table.endOfRun(of: 0, in: place..<tableOffset + 8 << tableShift)
        return min(length, max(1, (end - place) / 8) * grainSize - inGrain)
    }
}
