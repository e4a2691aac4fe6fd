internal import DiskStorage

/// Where everything lies in a new hosted sparse extent:
///
///     header | descriptor | redundant directory | its tables | directory | its tables | (to a grain's multiple) grains
///
/// as VMware and QEMU lay it out. All grain tables exist from the beginning, as zeros that take no space.
struct VMDKSparseLayout {
    let header: VMDKSparseHeader

    /// `descriptorSectors`: room for an embedded descriptor, 0 for none.
    init(
        capacitySectors: UInt64, grainSectors: UInt64, descriptorSectors: UInt64, zeroedGrain: Bool
    ) throws(DiskError) {
        var header = VMDKSparseHeader(capacitySectors: capacitySectors)
        header.grainSectors = grainSectors
        if zeroedGrain {
            header.version = 2
            header.flags.insert(.zeroGrains)
        }
        if descriptorSectors > 0 {
            header.descriptorSector = 1
            header.descriptorSectorCount = descriptorSectors
        }
        let (copySectors, isTooLarge) = header.directoryEntryCount.multipliedReportingOverflow(
            by: header.tableSectorCount)
        guard !isTooLarge, copySectors < VMDKSparseHeader.fileSectorLimit else { throw Self.tooLarge(capacitySectors) }
        header.redundantDirectorySector = 1 + descriptorSectors
        header.directorySector = header.redundantDirectorySector + header.directorySectorCount + copySectors
        let metadata = header.directorySector + header.directorySectorCount + copySectors
        header.overheadSectors = metadata.dividedRoundingUp(by: grainSectors) * grainSectors
        let grains = capacitySectors.dividedRoundingUp(by: grainSectors)
        // The last grain, too, must begin at a sector that a 32-bit entry can name.
        guard capacitySectors <= VMDKSparseHeader.fileSectorLimit,
            header.overheadSectors + grains * grainSectors <= VMDKSparseHeader.fileSectorLimit
        else { throw Self.tooLarge(capacitySectors) }
        self.header = header
    }

    private static func tooLarge(_ sectors: UInt64) -> DiskError {
        DiskError(
            .invalidArgument,
            "a disk of \(sectors * 512) bytes does not fit into one sparse file, which ends at 2 TiB with its tables: "
                + "use the variant 'split' or 'fixed'")
    }

    /// Whether a disk of that size fits into one file.
    static func fits(_ sectors: UInt64, _ options: VMDKCreateOptions, _ grainSectors: UInt64) -> Bool {
        let layout = try? VMDKSparseLayout(
            capacitySectors: sectors, grainSectors: grainSectors,
            descriptorSectors: VMDKSparseHeader.descriptorLimit, zeroedGrain: options.zeroedGrain)
        return layout != nil
    }

    /// Writes all but the header and the descriptor.
    func writeTables(to storage: any Storage) throws(DiskError) {
        try storage.setLength(header.overheadSectors * 512)
        for directory in [header.redundantDirectorySector, header.directorySector] {
            try storage.write(directoryBytes(at: directory), at: directory * 512, for: .table)
        }
    }

    /// A directory whose tables follow it.
    private func directoryBytes(at sector: UInt64) -> [UInt8] {
        var fields = FieldWriter(count: Int(header.directoryEntryCount * 4))
        let firstTable = sector + header.directorySectorCount
        for index in 0..<header.directoryEntryCount {
            let table = firstTable + index * header.tableSectorCount
            fields.littleEndian(UInt32(truncatingIfNeeded: table), at: Int(index * 4))
        }
        return fields.bytes
    }
}

extension VMDKCreator {
    /// Sectors that are set aside for an embedded descriptor: VMware's 20, more if a long comment needs them.
    static func descriptorRoom(_ text: [UInt8]) throws(DiskError) -> UInt64 {
        let needed = UInt64(text.count + 1024).dividedRoundingUp(by: 512)
        guard needed <= VMDKSparseHeader.descriptorLimit else {
            throw DiskError(.invalidArgument, "the descriptor would have \(text.count) bytes; 2 MiB are the limit")
        }
        return max(20, needed)
    }

    /// One file: header, descriptor, tables, grains.
    func createMonolithicSparse() throws(DiskError) {
        let extent = VMDKExtentDescription(sectorCount: sectorCount, type: .sparse, fileName: fileName)
        let text = try descriptor(.monolithicSparse, [extent]).encoded()
        let layout = try VMDKSparseLayout(
            capacitySectors: sectorCount, grainSectors: try Self.grainSectors(request, variant),
            descriptorSectors: try Self.descriptorRoom(text), zeroedGrain: options.zeroedGrain)
        let file = try createFile(fileName)
        try layout.writeTables(to: file)
        try file.flush()
        try file.write(text, at: 512, for: .descriptor)
        try file.write(layout.header.encode(), at: 0, for: .header)
        try file.flush()
    }

    /// A descriptor and `NAME-s001.vmdk`, …
    func createSplitSparse() throws(DiskError) {
        let grainSectors = try Self.grainSectors(request, variant)
        let pieces = try splitPieces("s", type: .sparse)
        guard pieces.count == 1 || pieces[0].sectorCount % grainSectors == 0 else {
            throw DiskError(
                .invalidArgument,
                "split-size=\(pieces[0].sectorCount * 512) is no multiple of the grain size, "
                    + "\(grainSectors * 512) bytes")
        }
        try createDescriptorFile { () throws(DiskError) in
            for piece in pieces {
                let layout = try VMDKSparseLayout(
                    capacitySectors: piece.sectorCount, grainSectors: grainSectors, descriptorSectors: 0,
                    zeroedGrain: options.zeroedGrain)
                let file = try createFile(piece.fileName ?? "")
                try layout.writeTables(to: file)
                try file.write(layout.header.encode(), at: 0, for: .header)
                try file.flush()
            }
            return try descriptor(.twoGbMaxExtentSparse, pieces)
        }
    }

    /// The extents of a split image, `NAME-s001.vmdk` or `NAME-f001.vmdk` on.
    func splitPieces(_ letter: String, type: VMDKExtentType) throws(DiskError) -> [VMDKExtentDescription] {
        let size = options.splitSectors ?? Self.usualSplitSectors
        let count = sectorCount.dividedRoundingUp(by: size)
        guard count <= UInt64(VMDKDescriptor.extentLimit) / 4 else {
            throw DiskError(
                .invalidArgument,
                "\(count) extents of \(size * 512) bytes are too many: give a larger split-size")
        }
        return (0..<count).map { index in
            let number = String(index + 1)
            let digits = String(repeating: "0", count: max(0, 3 - number.utf8.count)) + number
            return VMDKExtentDescription(
                sectorCount: min(size, sectorCount - index * size), type: type,
                fileName: "\(baseName)-\(letter)\(digits).vmdk")
        }
    }
}
