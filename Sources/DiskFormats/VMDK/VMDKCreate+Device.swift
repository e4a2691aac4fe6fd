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

    /// A part of the device that the image has: some of its partition tables, or a partition.
    private struct Piece {
        let sectors: Range<UInt64>
        /// Nil: tables.
        var partition: VMDKCreateOptions.ChosenPartition?
    }

    /// A descriptor of a disk as large as a device, with some of its partitions; the partition tables are copied to
    /// `NAME-pt.vmdk`, and zeros stand for the rest.
    func createPartitionedDevice() throws(DiskError) {
        let device = try openDevice()
        let table = try VMDKPartitionTable(reading: device.storage, sectorCount: device.sectorCount)
        var pieces = table.tableAreas.map { Piece(sectors: $0) }
        for chosen in options.partitions {
            guard let partition = table.partitions.first(where: { $0.number == chosen.number }) else {
                let known = table.partitions.map { String($0.number) }.joined(separator: ", ")
                throw DiskError(
                    .invalidArgument,
                    "the device has no partition \(chosen.number); it has \(known.isEmpty ? "none" : known)",
                    image: device.path)
            }
            pieces.append(Piece(sectors: partition.sectors, partition: chosen))
        }
        pieces.sort { $0.sectors.lowerBound < $1.sectors.lowerBound }
        let bootCode = try readBootCode()
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
                if let partition = piece.partition {
                    if partition.isReadOnly { extent.access = .readOnly }
                    (extent.fileName, extent.fileOffsetSector) = try place(partition, piece.sectors, device.path)
                } else {
                    (extent.fileName, extent.fileOffsetSector) = (sideName, sideSectors)
                    try copy(piece.sectors, of: device.storage, to: side, at: sideSectors)
                    sideSectors += extent.sectorCount
                }
                extents.append(extent)
                position = piece.sectors.upperBound
            }
            if position < device.sectorCount {
                extents.append(VMDKExtentDescription(sectorCount: device.sectorCount - position, type: .zero))
            }
            try side.write(bootCode, at: 0, for: .guestData)
            try side.flush()
            return try descriptor(.partitionedDevice, extents)
        }
    }

    /// Where a partition's bytes are: on the device or, if that was asked for, on the partition's own.
    private func place(
        _ partition: VMDKCreateOptions.ChosenPartition, _ sectors: Range<UInt64>, _ device: String
    ) throws(DiskError) -> (name: String, sector: UInt64) {
        guard options.usesPartitionDevices else { return (device, sectors.lowerBound) }
        let path = Self.partitionDevice(partition.number, of: device)
        let storage = try FileStorage(path: path, isWritable: false)
        let length = try storage.length() / 512
        guard storage.traits.hasFixedLength, length == UInt64(sectors.count) else {
            throw DiskError(
                .invalidArgument,
                "is not the device of partition \(partition.number), which has \(sectors.count) sectors, not "
                    + "\(length): leave out relative=on", image: path)
        }
        return (path, 0)
    }

    /// The device of a partition, as the kernel calls it: `sda1`, and `p` before the number where the name ends in a
    /// digit (`nvme0n1p1`).
    static func partitionDevice(_ number: Int, of device: String) -> String {
        device + (device.utf8.last.map { (48...57).contains($0) } ?? false ? "p" : "") + String(number)
    }

    /// Bytes of a master boot record before the disk's signature and the partition table.
    private static let bootCodeLength = 440

    /// The boot loader's code that the image has instead of the device's.
    private func readBootCode() throws(DiskError) -> [UInt8] {
        guard let name = options.bootSector else { return [] }
        let file = try FileStorage(path: name, isWritable: false)
        let bytes = try file.availableBytes(at: 0, count: 513, for: .header)
        guard bytes.count >= Self.bootCodeLength, bytes.count <= 512 else {
            throw DiskError(
                .invalidArgument, "a boot sector has \(Self.bootCodeLength) to 512 bytes, not \(try file.length())",
                image: name)
        }
        return Array(bytes.prefix(Self.bootCodeLength))
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
        let given = options.device ?? ""
        let storage = try FileStorage(path: given, isWritable: false)
        // Names by which partitions' devices are found end in the number; those that udev gives do not.
        let path = options.usesPartitionDevices ? try realPath(given) : try absolutePath(given)
        guard !path.utf8.contains(where: { $0 < 32 || $0 == UInt8(ascii: "\"") }) else {
            throw DiskError(.invalidArgument, "a VMDK cannot name a device with quotation marks or control characters")
        }
        guard storage.traits.hasFixedLength || !options.usesPartitionDevices else {
            throw DiskError(
                .invalidArgument, "is no block device, whose partitions have devices: leave out relative=on",
                image: path)
        }
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

    private func realPath(_ path: String) throws(DiskError) -> String {
        guard let real = unsafe realpath(path, nil) else { throw .system(errno, "find the device", image: path) }
        defer { unsafe free(real) }
        return unsafe String(cString: real)
    }

    /// What a descriptor names is relative to the descriptor's folder; what an option names, to the caller's.
    private func absolutePath(_ path: String) throws(DiskError) -> String {
        if path.utf8.first == UInt8(ascii: "/") { return path }
        guard let folder = unsafe getcwd(nil, 0) else { throw .system(errno, "find the current folder") }
        defer { unsafe free(folder) }
        return unsafe String(cString: folder) + "/" + path
    }
}
