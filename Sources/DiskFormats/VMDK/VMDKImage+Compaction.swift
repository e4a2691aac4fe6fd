internal import DiskImage
internal import DiskStorage

/// Grains at the ends of sparse files move to places that were given up, or that nothing ever led to; tables stay.
extension VMDKImage {
    var released: [ReleasedPlaces] { extents.compactMap { $0.writer?.released } }

    func planShrinking() throws(DiskError) -> Bool {
        // Grains that do not lie aligned in the disk stay where they are.
        let canMove = extents.allSatisfy { ($0.map.grains?.grainSize ?? blockSize) == blockSize }
        var plans: [UInt16: ShrinkingPlan] = [:]
        var canShrink = false
        for extent in extents {
            guard let file = extent.writer, let places = try places(of: extent) else { continue }
            let plan = places.plan()
            if canMove { plans[extent.map.storage] = plan }
            canShrink = canShrink || (canMove ? min(plan.end, places.end) : places.end) < file.end.value
        }
        mover.begin(plans)
        return canShrink
    }

    func stopShrinking() { mover.end() }

    func finishShrinking() throws(DiskError) {
        for extent in extents {
            guard let file = extent.writer, let places = try places(of: extent), places.end < file.end.value else {
                continue
            }
            try file.markUnclean()
            try file.cut(at: places.end)
        }
    }

    /// What is in use in a sparse file: all that its directories and tables lead to. Nil if that is too much to know,
    /// or damaged.
    private func places(of extent: VMDKOpenExtent) throws(DiskError) -> FilePlaces? {
        guard let file = extent.writer, let grains = extent.map.grains,
            var places = FilePlaces(unit: grains.grainSize, length: file.end.value)
        else { return nil }
        places.keep(0..<min(grains.firstDataOffset, file.end.value))
        let tableSize = UInt64(4) << grains.tableShift
        let tableCount = extent.map.length.dividedRoundingUp(by: grains.tableCoverage)
        let grainCount = extent.map.length.dividedRoundingUp(by: grains.grainSize)
        for directory in [grains.directoryOffset, grains.redundantDirectoryOffset] where directory != 0 {
            places.keep(directory..<directory + tableCount * 4)
            for number in 0..<tableCount {
                let sector = UInt64(try grains.table.entry32(at: directory + number * 4))
                guard sector != 0 else { continue }
                guard sector * 512 + tableSize <= file.end.value else { return nil }
                places.keep(sector * 512..<sector * 512 + tableSize)
                let entries = min(1 << grains.tableShift, grainCount - number << grains.tableShift)
                let table = sector * 512
                var place = table
                while place < table + entries * 4 {
                    let entry = try grains.table.entry32(at: place)
                    guard entry > 1 else {
                        place = max(
                            place + 4, try grains.table.endOfRun(of: entry, in: place..<table + entries * 4))
                        continue
                    }
                    places.addBlock(at: UInt64(entry) * 512)
                    place += 4
                }
            }
        }
        return places
    }

    // MARK: - Moving

    func allowRelocation() {}
    var needsRelocation: Bool { mover.isMoving }
    func nextRelocation() throws(DiskError) -> Relocation? { try mover.next(in: self) }

    func commit(_ relocation: Relocation) throws(DiskError) {
        let extent = extents[extentIndex(of: relocation.offset)]
        guard let file = extent.writer, let grains = extent.map.grains else {
            preconditionFailure("a grain moves in an extent that has no space")
        }
        try file.markUnclean()
        let grain = (relocation.offset - extent.map.start) >> grains.grainShift
        try setEntry(UInt32(truncatingIfNeeded: relocation.target / 512), grain: grain, grains, file)
        _ = file.released.add(relocation.source..<relocation.source + grains.grainSize, in: file.handle)
    }

    func abandon(_ relocation: Relocation) {}
}
