internal import DiskImage
internal import DiskStorage

extension VMDKImage {
    /// The disk gets longer or shorter at its end: in the last extent and, of a split image, in extents that come or
    /// go.
    ///
    /// Before the descriptor gives an extent more sectors its file has them; a file has fewer after the descriptor
    /// does.
    func resize(to size: UInt64, hidingParentUpTo parentEnd: UInt64) throws(DiskError) {
        guard isWritable else { throw DiskError(.readOnly, "was opened read-only", image: files.first) }
        guard size > 0, size % 512 == 0, size / 512 <= VMDKExtentDescription.sectorLimit else {
            throw DiskError(
                .unsupported, "a disk of \(size) bytes cannot be: it must be a multiple of 512, below 2^63",
                image: files.first)
        }
        try flush()
        var file = descriptor.withLock { $0 }
        if file.isMissing { return try file.replaceAtomically(with: file.text) }
        if let type = file.text.createType,
            [.fullDevice, .partitionedDevice, .vmfsRaw, .vmfsRDM, .vmfsRDMP].contains(type)
        {
            throw DiskError(
                .unsupported, "a VMDK of type \(type.rawValue) has the size of its device", image: files.first)
        }
        let sectors = size / 512
        let current = file.text.sectorCount
        if sectors > current {
            try grow(&file, to: sectors, hidingUpTo: min(sectors, parentEnd.dividedRoundingUp(by: 512)))
        }
        if sectors < current { try shrink(&file, to: sectors) }
        descriptor.withLock { $0 = file }
    }

    /// Whether the file of an extent belongs to the image, by its name, so that it goes when the extent goes.
    private func isOwn(_ line: VMDKExtentDescription) -> Bool {
        guard let name = line.fileName else { return false }
        return !name.utf8.contains(UInt8(ascii: "/")) && hasSameLetters(name.suffix(5), ".vmdk")
    }

    /// The descriptor with other extents.
    private func setExtents(
        _ extents: [VMDKExtentDescription], in file: inout VMDKDescriptorFile
    ) throws(DiskError) {
        var text = file.text
        text.extents = extents
        let sectors = text.sectorCount
        text.geometry = .vmdk(sectorCount: sectors, adapterType: text.adapterType ?? "ide")
        text.biosGeometry = text.biosGeometry?.resized(to: sectors, cylinderLimit: 1024)
        try file.replaceAtomically(with: text)
    }

    // MARK: - Growing

    /// Sectors of an extent at most; nil where the last one alone grows.
    private func splitSectors(_ text: VMDKDescriptor) -> UInt64? {
        guard let type = text.createType, [.twoGbMaxExtentSparse, .twoGbMaxExtentFlat].contains(type) else {
            return nil
        }
        let sizes = text.extents.map(\.sectorCount).filter { $0 > 0 }
        return sizes.dropLast().max() ?? max(VMDKCreator.usualSplitSectors, sizes.last ?? 0)
    }

    private func grow(
        _ file: inout VMDKDescriptorFile, to sectors: UInt64, hidingUpTo hidden: UInt64
    ) throws(DiskError) {
        var lines = file.text.extents
        guard let index = lines.lastIndex(where: { $0.sectorCount > 0 }), let extent = extents.last else {
            throw DiskError(.unsupported, "has no extent that could grow", image: files.first)
        }
        let last = lines[index]
        let split = splitSectors(file.text)
        var missing = sectors - file.text.sectorCount
        let grown = last.sectorCount + min(missing, split.map { $0 - min($0, last.sectorCount) } ?? missing)
        missing -= grown - last.sectorCount
        let count = split.map { missing.dividedRoundingUp(by: $0) } ?? 0
        guard UInt64(lines.count) + count <= UInt64(VMDKDescriptor.extentLimit) else {
            throw DiskError(
                .unsupported, "the disk would have more than \(VMDKDescriptor.extentLimit) extents",
                image: files.first)
        }
        // What of an extent must hide the parent.
        var start = file.text.sectorCount - last.sectorCount
        func hiddenSectors(of count: UInt64) -> UInt64 { min(count, hidden - min(hidden, start)) }
        if grown > last.sectorCount {
            try grow(extent, last, to: grown, in: lines, hidingUpTo: hiddenSectors(of: grown))
        }
        lines[index].sectorCount = grown
        start += grown
        var created: [String] = []
        do throws(DiskError) {
            while missing > 0, let split {
                var line = last
                (line.fileOffsetSector, line.rest) = (0, "")
                line.sectorCount = min(missing, split)
                line.fileName = try createExtent(
                    like: extent, line, after: lines, hidingUpTo: hiddenSectors(of: line.sectorCount))
                created.append(line.fileName ?? "")
                lines.append(line)
                missing -= line.sectorCount
                start += line.sectorCount
            }
            try setExtents(lines, in: &file)
        } catch {
            for name in created { try? companions.removeCompanion(name, of: files[0]) }
            throw error
        }
    }

    /// Makes the last extent's file longer.
    private func grow(
        _ extent: VMDKOpenExtent, _ line: VMDKExtentDescription, to sectors: UInt64,
        in lines: [VMDKExtentDescription], hidingUpTo hidden: UInt64
    ) throws(DiskError) {
        switch extent.map.kind {
        case .zero: return
        case .flat: try growFlat(extent, line, to: sectors, in: lines)
        case .sparse:
            let (storage, layout) = try resizable(extent)
            var resizer = try VMDKSparseResizer(storage, layout)
            try resizer.grow(from: line.sectorCount, to: sectors, hidingUpTo: hidden)
        case .compressed, .seSparse, .inaccessible: throw cannotResize(extent)
        }
    }

    private func resizable(
        _ extent: VMDKOpenExtent
    ) throws(DiskError) -> (storage: any Storage, layout: VMDKSparseFile.Layout) {
        guard let writer = extent.writer else { throw cannotResize(extent) }
        return (writer.handle.storage, writer.layout)
    }

    private func cannotResize(_ extent: VMDKOpenExtent) -> DiskError {
        let what =
            switch extent.map.kind {
            case .compressed: "a streamOptimized image"
            case .seSparse: "an seSparse extent"
            default: "an extent that cannot be written"
            }
        return DiskError(
            .unsupported, "\(what) cannot be resized: convert it to another variant first", image: files.first)
    }

    private func growFlat(
        _ extent: VMDKOpenExtent, _ line: VMDKExtentDescription, to sectors: UInt64, in lines: [VMDKExtentDescription]
    ) throws(DiskError) {
        let storage = storages[Int(extent.map.storage)].storage
        guard storage.traits.isWritable, !storage.traits.hasFixedLength else { throw cannotResize(extent) }
        let end = extent.map.fileOffset + extent.map.length
        let length = try storage.length()
        // Another extent of the same file must not be behind this one.
        let isShared = lines.contains { $0.fileName == line.fileName && $0.fileOffsetSector > line.fileOffsetSector }
        guard !isShared, length == end || isOwn(line) else {
            throw DiskError(
                .unsupported, "the file goes on behind the disk's last extent, at byte \(end): it cannot grow there",
                image: storage.name)
        }
        let newEnd = try line.fileOffsetSector.adding(sectors, "the extent's end").multiplied(by: 512)
        let isAllocated = try storage.allocatedBytes() >= length
        if length > end { try storage.discard(end..<min(length, newEnd), mustZero: true, for: .guestData) }
        if newEnd > length {
            do throws(DiskError) {
                if isAllocated { try storage.allocate(newEnd) }
                if try storage.length() < newEnd { try storage.setLength(newEnd) }
            } catch {
                try? storage.setLength(length)
                throw error
            }
        }
        try storage.flush()
    }

    /// Creates the file of one more extent of a split image, with the next number that no file has; answers its name.
    private func createExtent(
        like extent: VMDKOpenExtent, _ line: VMDKExtentDescription, after lines: [VMDKExtentDescription],
        hidingUpTo hidden: UInt64
    ) throws(DiskError) -> String {
        let names = VMDKExtentNames(after: lines, isFlat: line.type.isFlat, image: files[0])
        for number in names.next..<names.next + 1000 {
            let name = names.name(number)
            let file: any Storage
            do throws(DiskError) {
                file = try companions.createCompanion(name, of: files[0]).storage
            } catch {
                guard error.errno == 17 else { throw error }  // EEXIST: perhaps of a resize that was cut off
                continue
            }
            do throws(DiskError) {
                try fill(file, like: extent, line, hidingUpTo: hidden)
            } catch {
                try? companions.removeCompanion(name, of: files[0])
                throw error
            }
            return name
        }
        throw DiskError(
            .refused, "no name is free for another extent: files as \(names.name(names.next)) are there already",
            image: files[0])
    }

    private func fill(
        _ file: any Storage, like extent: VMDKOpenExtent, _ line: VMDKExtentDescription, hidingUpTo hidden: UInt64
    ) throws(DiskError) {
        if extent.map.kind == .flat {
            let sibling = storages[Int(extent.map.storage)].storage
            let length = line.sectorCount * 512
            if try sibling.allocatedBytes() >= sibling.length() { try file.allocate(length) }
            try file.setLength(length)
        } else {
            let (storage, layout) = try resizable(extent)
            guard layout == .hosted else { throw cannotResize(extent) }
            let sibling = try VMDKSparseResizer(storage, layout)
            let new = try VMDKSparseLayout(
                capacitySectors: line.sectorCount, grainSectors: sibling.grainSectors, descriptorSectors: 0,
                zeroedGrain: sibling.hasZeroGrains)
            try new.writeTables(to: file)
            try file.write(new.header.encode(), at: 0, for: .header)
            if hidden > 0 {
                var resizer = try VMDKSparseResizer(file, layout)
                try resizer.grow(from: 0, to: line.sectorCount, hidingUpTo: hidden)
            }
        }
        try file.flush()
    }

    // MARK: - Shrinking

    private func shrink(_ file: inout VMDKDescriptorFile, to sectors: UInt64) throws(DiskError) {
        var lines: [VMDKExtentDescription] = []
        var removed: [VMDKExtentDescription] = []
        var cut: (extent: VMDKOpenExtent, line: VMDKExtentDescription)?
        var opened = extents[...]
        var left = sectors
        for line in file.text.extents where line.sectorCount > 0 {
            guard let extent = opened.popFirst() else { break }
            if left == 0 {
                removed.append(line)
                continue
            }
            var kept = line
            kept.sectorCount = min(left, line.sectorCount)
            if kept.sectorCount < line.sectorCount {
                if [.compressed, .seSparse, .inaccessible].contains(extent.map.kind) { throw cannotResize(extent) }
                if extent.map.kind == .sparse { _ = try resizable(extent) }
                cut = (extent, kept)
            }
            lines.append(kept)
            left -= kept.sectorCount
        }
        try setExtents(lines, in: &file)
        if let cut { try shrink(cut.extent, to: cut.line) }
        for line in removed where isOwn(line) && !lines.contains(where: { $0.fileName == line.fileName }) {
            // The disk is what it shall be; a file that stays does no harm.
            try? companions.removeCompanion(line.fileName ?? "", of: files[0])
        }
    }

    private func shrink(_ extent: VMDKOpenExtent, to line: VMDKExtentDescription) throws(DiskError) {
        switch extent.map.kind {
        case .sparse:
            let (storage, layout) = try resizable(extent)
            var resizer = try VMDKSparseResizer(storage, layout)
            try resizer.shrink(to: line.sectorCount)
        case .flat:
            let storage = storages[Int(extent.map.storage)].storage
            guard isOwn(line), !storage.traits.hasFixedLength,
                try storage.length() == extent.map.fileOffset + extent.map.length
            else { return }
            try storage.setLength(extent.map.fileOffset + line.sectorCount * 512)
            try storage.flush()
        case .zero, .compressed, .seSparse, .inaccessible: return
        }
    }
}

/// The names of a split image's files: `BASE-s001.vmdk` or `BASE-f001.vmdk` on, as its last one is called.
struct VMDKExtentNames {
    /// What comes before the number.
    private let prefix: String
    /// The number after the last one's.
    let next: Int

    init(after lines: [VMDKExtentDescription], isFlat: Bool, image: String) {
        let last: String = lines.filter { $0.sectorCount > 0 }.compactMap(\.fileName).last ?? ""
        let stem = hasSameLetters(last.suffix(5), ".vmdk") ? last.dropLast(5) : last[...]
        let digits = String(stem.reversed().prefix { $0.isASCII && $0.isNumber }.reversed())
        let front = stem.dropLast(digits.count)
        if let number = Int(digits), digits.utf8.count >= 3, number < 1 << 30, front.hasSuffix(isFlat ? "-f" : "-s"),
            !front.utf8.contains(UInt8(ascii: "/"))
        {
            prefix = String(front)
            next = number + 1
        } else {
            prefix = VMDKCreator.baseName(of: image) + (isFlat ? "-f" : "-s")
            next = lines.count(where: { $0.sectorCount > 0 }) + 1
        }
    }

    func name(_ number: Int) -> String {
        let digits = String(number)
        return prefix + String(repeating: "0", count: max(0, 3 - digits.utf8.count)) + digits + ".vmdk"
    }
}
