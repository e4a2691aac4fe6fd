internal import DiskFormats
internal import DiskStorage

extension BlockCache {
    /// Called before every change: makes it durable, once, that the file is in use, and answers whether there may be
    /// changes. A crash from then on leaves a cache that is emptied.
    func begin() -> Bool {
        beginning.withLock { beginning in
            if beginning.hasBegun { return isOn }
            guard isOn else { return false }
            do throws(DiskError) {
                try VCIFile.write(header(isUnclean: true, identity), to: storage)
                try storage.flush()
                if beginning.isStale { try VCIFile.takeSpace(storage, layout, type) }
                beginning.hasBegun = true
                return true
            } catch {
                turnOff(error)
                return false
            }
        }
    }

    private func header(isUnclean: Bool, _ identity: CacheIdentity) -> VCIHeader {
        var header = VCIHeader(layout, type: type)
        header.isUnclean = isUnclean
        // Of images whose changes do not show nothing is kept: then it belongs to none.
        guard identity.isReliable else { return header }
        header.imageUUID = identity.uuid
        header.modificationUUID = identity.modificationUUID
        return header
    }

    /// Saves what is where and the order of use. No call follows it. `changed`: what the cached images are now, if this
    /// process has changed them.
    func close(as changed: CacheIdentity? = nil) {
        guard isOn else { return }
        let identity = changed ?? identity
        let hasBegun = beginning.withLock { $0.hasBegun }
        // What was only read changed the order of use.
        guard hasBegun || changed != nil || index.foundBytes > 0, begin() else { return }
        do throws(DiskError) {
            // What is cached of images whose changes do not show would have to be given up at the next opening.
            try VCIFile.save(identity.isReliable ? extents() : [], to: storage, layout)
            try storage.flush()
            try VCIFile.write(header(isUnclean: false, identity), to: storage)
            try storage.flush()
        } catch {
            report(
                CacheNotice(
                    isWarning: true, text: "\(error.about(path)); what is in the block cache cannot be used again"))
        }
    }

    /// All that is cached, in the order of the disk, linked in the order of use.
    private func extents() -> [VCIExtent] {
        let slots = slotsByUse()
        // The numbers in the order of use, sorted by chunk: then each one's place in that is its number in the disk's.
        var sorted = Array(0..<UInt32(slots.count))
        sorted.sort { slots[Int($0)].chunk < slots[Int($1)].chunk }
        var order = [UInt32](repeating: 0, count: slots.count)
        var extents: [VCIExtent] = []
        extents.reserveCapacity(slots.count)
        for (number, use) in sorted.enumerated() {
            order[Int(use)] = UInt32(number)
            let (slot, chunk) = slots[Int(use)]
            extents.append(extent(chunk, inSlot: UInt64(slot)))
        }
        VCIUseOrder.link(&extents, order, VCITreeShape(extentCount: extents.count, layout))
        return extents
    }

    /// What the file says of a chunk in a slot.
    private func extent(_ chunk: UInt64, inSlot slot: UInt64) -> VCIExtent {
        let range = range(of: chunk)
        let blocks = (range.upperBound - range.lowerBound).dividedRoundingUp(by: VCILayout.blockSize)
        return VCIExtent(
            first: range.lowerBound / VCILayout.blockSize, blocks: UInt32(blocks),
            address: layout.address(ofSlot: slot))
    }
}
