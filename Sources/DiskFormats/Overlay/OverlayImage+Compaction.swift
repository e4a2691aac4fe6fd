internal import DiskImage
internal import DiskStorage

/// Blocks at the file's end move to places that were given up.
extension OverlayImage {
    var released: [ReleasedPlaces] { [releasedPlaces] }

    func planShrinking() throws(DiskError) -> Bool {
        guard let places = try places() else { return false }
        let plan = places.plan()
        mover.begin([0: plan])
        return min(plan.end, places.end) < end.value
    }

    func stopShrinking() { mover.end() }

    func finishShrinking() throws(DiskError) {
        if let places = try places() { try cut(at: places.end) }
    }

    private func places() throws(DiskError) -> FilePlaces? {
        guard var places = FilePlaces(unit: blockSize, length: end.value) else { return nil }
        places.keep(0..<header.dataOffset)
        var batch = ExtentBatch()
        var position: UInt64 = 0
        while position < virtualSize {
            batch.removeAll()
            try map(offset: position, length: virtualSize - position, into: &batch)
            for number in 0..<batch.count where batch[number].kind.isStored {
                let extent = batch[number]
                for offset in stride(
                    from: extent.fileOffset, to: extent.fileOffset + extent.length, by: Int(blockSize))
                {
                    places.addBlock(at: offset)
                }
            }
            position += batch.coveredLength
        }
        return places
    }

    // MARK: - Moving

    func allowRelocation() {}
    var needsRelocation: Bool { mover.isMoving }
    func nextRelocation() throws(DiskError) -> Relocation? { try mover.next(in: self) }

    func commit(_ relocation: Relocation) throws(DiskError) {
        try store(
            UInt32(truncatingIfNeeded: relocation.target / blockSize), block: relocation.offset / blockSize)
        _ = releasedPlaces.add(relocation.source..<relocation.source + blockSize, in: storages[0])
    }

    func abandon(_ relocation: Relocation) {}
}
