internal import DiskImage
internal import DiskStorage

extension VMDKCreator {
    /// A descriptor and files that hold the disk's bytes as they are: `NAME-flat.vmdk`, or `NAME-f001.vmdk`, …
    func createFlat(_ createType: VMDKCreateType) throws(DiskError) {
        let pieces: [VMDKExtentDescription] =
            switch createType {
            case .twoGbMaxExtentFlat: try splitPieces("f", type: .flat)
            case .vmfs: [flatPiece(.vmfs)]
            default: [flatPiece(.flat)]
            }
        try createDescriptorFile { () throws(DiskError) in
            for piece in pieces {
                let file = try createFile(piece.fileName ?? "")
                let length = piece.sectorCount * 512
                if options.preallocates { try file.allocate(length) }
                try file.setLength(length)
                try file.flush()
            }
            var text = try descriptor(createType, pieces)
            if createType == .vmfs, !options.preallocates { text.setDiskDatabase("thinProvisioned", "1") }
            return text
        }
    }

    private func flatPiece(_ type: VMDKExtentType) -> VMDKExtentDescription {
        VMDKExtentDescription(sectorCount: sectorCount, type: type, fileName: baseName + "-flat.vmdk")
    }

    /// A descriptor and `NAME-delta.vmdk`, an ESX sparse extent. ESX makes tables when it needs them; here they are
    /// there from the beginning, as zeros that take no space: where one is missing, QEMU 7.2 writes over the header.
    func createESXSparse() throws(DiskError) {
        let grainSectors = UInt32(truncatingIfNeeded: try Self.grainSectors(request, variant))
        guard let capacity = UInt32(exactly: sectorCount) else { throw tooLargeForESXSparse }
        let tableCount = COWDHeader.directoryEntryCount(capacity, grainSectors)
        let headerSectors = UInt32(COWDHeader.byteCount / 512)
        let firstTable = headerSectors + tableCount.dividedRoundingUp(by: 128)
        let metadata = UInt64(firstTable) + UInt64(tableCount) * UInt64(COWDHeader.tableSectorCount)
        let firstGrain = metadata.dividedRoundingUp(by: UInt64(grainSectors)) * UInt64(grainSectors)
        let end = firstGrain + UInt64(capacity.dividedRoundingUp(by: grainSectors)) * UInt64(grainSectors)
        guard end <= VMDKSparseHeader.fileSectorLimit else { throw tooLargeForESXSparse }
        let header = COWDHeader(
            capacitySectors: capacity, grainSectors: grainSectors, freeSector: UInt32(truncatingIfNeeded: firstGrain),
            geometry: request.parent == nil
                ? .vmdk(sectorCount: sectorCount, adapterType: options.adapterType) : nil)
        var directory = FieldWriter(count: Int(tableCount) * 4)
        for index in 0..<tableCount {
            directory.littleEndian(firstTable + index * COWDHeader.tableSectorCount, at: Int(index) * 4)
        }
        let piece = VMDKExtentDescription(
            sectorCount: sectorCount, type: .vmfsSparse, fileName: baseName + "-delta.vmdk")
        try createDescriptorFile { () throws(DiskError) in
            let file = try createFile(piece.fileName ?? "")
            try file.setLength(firstGrain * 512)
            try file.write(directory.bytes, at: UInt64(headerSectors) * 512, for: .table)
            try file.write(header.encode(), at: 0, for: .header)
            try file.flush()
            return try descriptor(.vmfsSparse, [piece])
        }
    }

    private var tooLargeForESXSparse: DiskError {
        DiskError(
            .invalidArgument,
            "a disk of \(request.virtualSize) bytes does not fit into an ESX sparse file, which ends at 2 TiB with its "
                + "tables: use the variant 'split' or 'esx'")
    }

    /// One compressed file, with no grain in it yet (nor ever: it is written once, by ``VMDKStreamWriter``).
    func createStream() throws(DiskError) {
        let file = try createFile(fileName)
        var offset: UInt64 = 0
        let writer = try VMDKStreamWriter(
            descriptor: try streamDescriptor(), grainSectors: try Self.grainSectors(request, variant)
        ) { (bytes) throws(DiskError) in
            try file.write(bytes, at: offset, for: .guestData)
            offset += UInt64(bytes.count)
        }
        try writer.finish()
        try file.flush()
    }

    /// The descriptor of a streamOptimized image as the request describes it.
    func streamDescriptor() throws(DiskError) -> VMDKDescriptor {
        try descriptor(
            .streamOptimized,
            [VMDKExtentDescription(sectorCount: sectorCount, type: .sparse, fileName: fileName)])
    }
}
