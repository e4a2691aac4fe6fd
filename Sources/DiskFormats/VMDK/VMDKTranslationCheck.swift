internal import DiskImage
internal import DiskStorage

/// Checks an extent that is only read by translating all of it: every entry must lead somewhere.
enum VMDKTranslationCheck {
    /// Looks at every grain; what cannot be translated is lost.
    static func run(_ extent: VMDKOpenExtent, file: String) -> CheckReport {
        var report = CheckReport()
        guard let grains = extent.map.grains else { return report }
        report.totalBlocks = extent.map.length.dividedRoundingUp(by: grains.grainSize)
        guard hasRoomForTables(grains, extent.map.length) else {
            report.add(.init(.loss, file: file, "the grain directory names more grain tables than the file can hold"))
            return report
        }
        var offset: UInt64 = 0
        var batch = ExtentBatch()
        while offset < extent.map.length {
            batch.removeAll()
            do throws(DiskError) {
                offset += try extent.map.map(offset, extent.map.length - offset, into: &batch)
            } catch {
                // What came before the bad entry was translated; go on behind the grain with it.
                offset += batch.coveredLength
                report.add(
                    .init(.loss, file: file, "grain \(offset >> grains.grainShift): \(error.message)"))
                offset = (offset >> grains.grainShift + 1) << grains.grainShift
            }
            for number in 0..<batch.count where batch[number].kind == .data {
                report.allocatedBlocks += batch[number].length.dividedRoundingUp(by: grains.grainSize)
            }
        }
        return report
    }

    /// Whether all tables that the directory names can be tables of their own: then the work is bounded by the file's
    /// length.
    private static func hasRoomForTables(_ grains: VMDKGrainTables, _ length: UInt64) -> Bool {
        var count: UInt64 = 0
        for number in 0..<length.dividedRoundingUp(by: grains.tableCoverage) {
            if let entry = try? grains.table.entry64(at: grains.directoryOffset + number * 8), entry != 0 { count += 1 }
        }
        return count <= grains.end.value / (8 << grains.tableShift)
    }
}
