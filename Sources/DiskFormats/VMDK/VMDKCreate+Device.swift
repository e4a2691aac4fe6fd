internal import DiskImage
internal import DiskStorage
internal import Glibc

extension VMDKCreator {
    /// A descriptor whose only extent is a device.
    func createFullDevice() throws(DiskError) {
        let device = try openDevice()
        let extent = VMDKExtentDescription(sectorCount: device.sectorCount, type: .flat, fileName: device.path)
        try createDescriptorFile { () throws(DiskError) in try descriptor(.fullDevice, [extent]) }
    }

    /// A descriptor of a disk as large as a device, with some of its partitions; the partition tables are copied to
    /// `NAME-pt.vmdk`, and zeros stand for the rest.
    func createPartitionedDevice() throws(DiskError) {
        let device = try openDevice()
        let table = try VMDKPartitionTable(reading: device.storage, sectorCount: device.sectorCount)
        var pieces: [(sectors: Range<UInt64>, partition: Bool)] = table.tableAreas.map { ($0, false) }
        for number in options.partitions {
            guard let partition = table.partitions.first(where: { $0.number == number }) else {
                let known = table.partitions.map { String($0.number) }.joined(separator: ", ")
                throw DiskError(
                    .invalidArgument,
                    "the device has no partition \(number); it has \(known.isEmpty ? "none" : known)",
                    image: device.path)
            }
            pieces.append((partition.sectors, true))
        }
        pieces.sort { $0.sectors.lowerBound < $1.sectors.lowerBound }
        let sideName = baseName + "-pt.vmdk"
        try createDescriptorFile { () throws(DiskError) in
            let side = try createFile(sideName)
            var extents: [VMDKExtentDescription] = []
            var position: UInt64 = 0
            var sideSectors: UInt64 = 0
            for piece in pieces {
                if piece.sectors.lowerBound > position {
                    extents.append(VMDKExtentDescription(sectorCount: piece.sectors.lowerBound - position, type: .zero))
                }
                var extent = VMDKExtentDescription(sectorCount: UInt64(piece.sectors.count), type: .flat)
                extent.fileName = piece.partition ? device.path : sideName
                extent.fileOffsetSector = piece.partition ? piece.sectors.lowerBound : sideSectors
                extents.append(extent)
                if !piece.partition {
                    try copy(piece.sectors, of: device.storage, to: side, at: sideSectors)
                    sideSectors += extent.sectorCount
                }
                position = piece.sectors.upperBound
            }
            if position < device.sectorCount {
                extents.append(VMDKExtentDescription(sectorCount: device.sectorCount - position, type: .zero))
            }
            try side.flush()
            return try descriptor(.partitionedDevice, extents)
        }
    }

    private func copy(
        _ sectors: Range<UInt64>, of device: any Storage, to side: any Storage, at sector: UInt64
    ) throws(DiskError) {
        let chunk: UInt64 = 2048
        for start in stride(from: sectors.lowerBound, to: sectors.upperBound, by: Int(chunk)) {
            let count = Int(min(chunk, sectors.upperBound - start)) * 512
            let bytes = try device.bytes(at: start * 512, count: count, for: .header, "the partition table")
            try side.write(bytes, at: (sector + start - sectors.lowerBound) * 512, for: .guestData)
        }
    }

    /// The device (or the file that takes its place), its absolute path, and its size.
    private func openDevice() throws(DiskError) -> (storage: any Storage, path: String, sectorCount: UInt64) {
        let path = try absolutePath(options.device ?? "")
        guard !path.utf8.contains(where: { $0 < 32 || $0 == UInt8(ascii: "\"") }) else {
            throw DiskError(.invalidArgument, "a VMDK cannot name a device with quotation marks or control characters")
        }
        let storage = try FileStorage(path: path, isWritable: false)
        let sectors = try storage.length() / 512
        guard sectors > 0, sectors <= VMDKExtentDescription.sectorLimit else {
            throw DiskError(.invalidArgument, "the device has \(sectors) sectors", image: path)
        }
        guard sectorCount == 0 || sectorCount == sectors else {
            throw DiskError(
                .invalidArgument,
                "the device has \(sectors * 512) bytes, the disk shall have \(sectorCount * 512): leave the size out",
                image: path)
        }
        return (storage, path, sectors)
    }

    /// What a descriptor names is relative to the descriptor's folder; what an option names, to the caller's.
    private func absolutePath(_ path: String) throws(DiskError) -> String {
        if path.utf8.first == UInt8(ascii: "/") { return path }
        guard let folder = unsafe getcwd(nil, 0) else { throw .system(errno, "find the current folder") }
        defer { unsafe free(folder) }
        return unsafe String(cString: folder) + "/" + path
    }
}
