import DiskPartitions
import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// Tables that sfdisk, fdisk, parted and sgdisk made, compared with what util-linux's library reads.
@Suite struct ToolTableTests {
    /// Four partitions, the third of which is missing, with names and attributes.
    private func guidDisk() throws -> DiskFile {
        let disk = try DiskFile(mebibytes: 64)
        let script = """
            label: gpt
            label-id: 01234567-89AB-CDEF-0123-456789ABCDEF
            1 : size=10M, type=U, name="Startbereich"
            2 : size=5M, type=L, attrs="LegacyBIOSBootable"
            4 : size=7M, type=S, name="größer"
            5 : type=V

            """
        try run("sfdisk", "-q", disk.path, input: script)
        return disk
    }

    @Test func guidTableBySfdisk() throws {
        let disk = try guidDisk()
        let table = try disk.table()
        #expect(table.kind == .gpt)
        #expect(table.sectorSize == 512)
        #expect(table.diskIdentifier == "01234567-89ab-cdef-0123-456789abcdef")
        #expect(table.warning == nil)
        #expect(table.partitions.map(\.number) == [1, 2, 4, 5])
        #expect(table.partitions.map(\.name) == ["Startbereich", nil, "größer", nil])
        #expect(table.partitions.map(\.isBootable) == [false, true, false, false])
        #expect(
            table.partitions.map(\.typeName) == [
                "EFI system partition", "Linux filesystem", "Linux swap", "Linux LVM",
            ])
        let json = try run("sfdisk", "--json", disk.path)
        for partition in table.partitions {
            #expect(json.contains("\"start\": \(partition.offset / 512),"))
            #expect(json.contains("\"size\": \(partition.length / 512),"))
            #expect(json.contains("\"uuid\": \"\(partition.uuid?.uppercased() ?? "")\""))
        }
        let foreign = try disk.foreignRows()
        var rows = table.partitions.map { Row($0) }
        rows[2].name = foreign[2].name  // partx prints what is not ASCII in its own way
        #expect(rows == foreign)
        checkPromises(table, size: try disk.size)
    }

    @Test func guidTableByParted() throws {
        let disk = try DiskFile(mebibytes: 64)
        try run(
            "parted", "-s", disk.path, "mklabel", "gpt", "mkpart", "first", "ext4", "1MiB", "20MiB", "mkpart", "second",
            "linux-swap", "20MiB", "30MiB", "mkpart", "third", "ntfs", "31MiB", "100%", "set", "1", "esp", "on")
        let table = try disk.table()
        #expect(table.kind == .gpt && table.warning == nil && table.partitions.count == 3)
        #expect(table.partitions.map { Row($0) } == (try disk.foreignRows()))
    }

    @Test(arguments: [4, 128, 500]) func guidTableBySgdisk(entries: Int) throws {
        let disk = try DiskFile(mebibytes: 64)
        try run(
            "sgdisk", "-S", "\(entries)", "-n", "1:0:+10M", "-n", "3:0:+5M", "-n", "2:0:0", "-c", "3:three", "-t",
            "2:fd00", disk.path)
        let table = try disk.table()
        #expect(table.kind == .gpt && table.warning == nil && table.partitions.map(\.number) == [1, 2, 3])
        #expect(table.partitions.map { Row($0) } == (try disk.foreignRows()))
    }

    // MARK: - Damage

    @Test(arguments: [512..<1024 as Range<UInt64>, 1024..<17_408, 512..<1 << 20, 0..<1 << 20, 600..<601])
    func damagedPrimary(_ range: Range<UInt64>) throws {
        let disk = try guidDisk()
        let whole = try disk.table()
        let old = try disk.bytes(range)
        try disk.write(old.map { range.count == 1 ? $0 ^ 1 : 0 }, at: range.lowerBound)
        let table = try disk.table()
        #expect(table.partitions == whole.partitions)
        #expect(table.diskIdentifier == whole.diskIdentifier)
        #expect(table.warning?.contains("copy") == true)
        checkPromises(table, size: try disk.size)
    }

    @Test func damagedCopyIsNotMissed() throws {
        let disk = try guidDisk()
        let whole = try disk.table()
        let size = try disk.size
        try disk.zero(size - 1024..<size)
        let table = try disk.table()
        #expect(table.partitions == whole.partitions && table.warning == nil)
    }

    @Test func bothDamaged() throws {
        let disk = try guidDisk()
        let size = try disk.size
        try disk.zero(size - 512..<size)
        try disk.write([1], at: 512 + 60)
        let table = try disk.table()
        #expect(table.kind == .gpt && table.partitions.isEmpty)
        #expect(table.warning?.contains("checksum") == true)
    }

    /// Something else is written to the front later, and the copy at the end remains.
    @Test func remainderBehindFileSystem() throws {
        let disk = try guidDisk()
        try run("mkfs.ext4", "-q", "-F", disk.path, "40M")
        let size = try disk.size
        #expect(try disk.bytes(size - 512..<size - 504) == Array("EFI PART".utf8))
        let table = try disk.table()
        #expect(table.kind == .none && table.warning == nil)
    }

    @Test func bootRecordInsteadOfOlderTable() throws {
        let disk = try guidDisk()
        let old = try disk.bytes(512..<34 * 512)
        try run("wipefs", "-q", "-a", disk.path)
        try run("sfdisk", "-q", disk.path, input: "label: dos\nsize=20M\n")
        try disk.write(old, at: 512)
        let table = try disk.table()
        #expect(table.kind == .mbr && table.partitions.count == 1 && table.warning == nil)
    }

    @Test func shortened() throws {
        let disk = try guidDisk()
        try disk.resize(50 << 20)
        let table = try disk.table()
        #expect(table.kind == .gpt && table.partitions.isEmpty)
        #expect(table.warning?.contains("sectors") == true)
    }

    /// The copy is in the middle then; the primary header tells where.
    @Test func madeLonger() throws {
        let disk = try guidDisk()
        let whole = try disk.table()
        try disk.resize(90 << 20)
        #expect(try disk.table().partitions == whole.partitions)
        #expect(try disk.table().warning == nil)
        try disk.zero(1024..<2048)
        let table = try disk.table()
        #expect(table.partitions == whole.partitions)
        #expect(table.warning?.contains("entries' checksum") == true)
    }

    // MARK: - Larger sectors

    @Test func guidTableOfLargeSectors() throws {
        let disk = try DiskFile(mebibytes: 64)
        try run("fdisk", "-b", "4096", disk.path, input: "g\nn\n\n\n+10M\nn\n\n\n+5M\nn\n\n\n\nt\n2\n1\nw\n")
        let table = try disk.table()
        #expect(table.kind == .gpt && table.sectorSize == 4096 && table.warning == nil)
        #expect(table.partitions.count == 3)
        #expect(table.partitions.map { Row($0) } == (try disk.foreignRows(sectorSize: 4096)))
        checkPromises(table, size: try disk.size)
        try disk.zero(4096..<8192)
        let damaged = try disk.table()
        #expect(damaged.sectorSize == 4096 && damaged.partitions == table.partitions && damaged.warning != nil)
    }

    /// A boot record does not tell the size of its sectors; what lies in the partitions does.
    @Test func bootRecordOfLargeSectors() throws {
        let disk = try DiskFile(mebibytes: 64)
        try run("fdisk", "-b", "4096", disk.path, input: "o\nn\np\n1\n\n+20M\nn\np\n2\n\n\nw\n")
        let foreign = try disk.foreignRows(sectorSize: 4096)
        #expect(foreign.count == 2)
        #expect(try disk.table().sectorSize == 512, "nothing tells")
        let content = try DiskFile(mebibytes: 10)
        try run("mkfs.ext4", "-q", content.path)
        try disk.place(content, at: foreign[1].offset)
        let table = try disk.table()
        #expect(table.kind == .mbr && table.sectorSize == 4096 && table.warning == nil)
        #expect(table.partitions.map { Row($0) } == foreign)
    }

    @Test func logicalPartitionsOfLargeSectors() throws {
        let disk = try DiskFile(mebibytes: 64)
        let commands = "o\nn\np\n1\n\n+10M\nn\ne\n2\n\n\nn\nl\n\n+10M\nn\nl\n\n+10M\nw\n"
        try run("fdisk", "-b", "4096", disk.path, input: commands)
        let table = try disk.table()
        #expect(table.sectorSize == 4096 && table.partitions.map(\.number) == [1, 5, 6])
        #expect(table.partitions.map { Row($0) } == (try disk.foreignRows(sectorSize: 4096)))
    }

    // MARK: - Boot records

    @Test func bootRecordBySfdisk() throws {
        let disk = try DiskFile(mebibytes: 64)
        let script = """
            label: dos
            label-id: 0x1234abcd
            start=2048, size=10M, type=83, bootable
            size=3M, type=7
            size=40M, type=f
            size=2M, type=ef
            size=5M, type=82
            size=5M, type=8e
            size=1M
            size=1M, type=c

            """
        try run("sfdisk", "-q", disk.path, input: script)
        let table = try disk.table()
        #expect(table.kind == .mbr && table.sectorSize == 512 && table.warning == nil)
        #expect(table.diskIdentifier == "0x1234abcd")
        #expect(table.partitions.map(\.number) == [1, 2, 4, 5, 6, 7, 8])
        #expect(table.partitions.map(\.isBootable) == [true] + [Bool](repeating: false, count: 6))
        #expect(table.partitions[5].typeName == "Linux" && table.partitions[6].uuid == "1234abcd-08")
        #expect(table.partitions.map { Row($0) } == (try disk.foreignRows()))
        let json = try run("sfdisk", "--json", disk.path)
        for partition in table.partitions {
            #expect(json.contains("\"node\": \"\(disk.path)\(partition.number)\""))
            #expect(json.contains("\"start\": \(partition.offset / 512),"))
        }
        checkPromises(table, size: try disk.size)
        // The numbers move down when a logical partition goes, the chain has a gap.
        try run("sfdisk", "-q", "--delete", disk.path, "5")
        #expect(try disk.table().partitions.map { Row($0) } == (try disk.foreignRows()))
    }

    @Test func bootRecordByParted() throws {
        let disk = try DiskFile(mebibytes: 64)
        try run(
            "parted", "-s", disk.path, "mklabel", "msdos", "mkpart", "extended", "1MiB", "60MiB", "mkpart", "logical",
            "2MiB", "20MiB", "mkpart", "logical", "21MiB", "30MiB", "mkpart", "logical", "31MiB", "32MiB", "mkpart",
            "primary", "60MiB", "63MiB")
        let table = try disk.table()
        #expect(table.partitions.map(\.number) == [2, 5, 6, 7] && table.warning == nil)
        #expect(table.partitions.map { Row($0) } == (try disk.foreignRows()))
    }

    @Test func hybrid() throws {
        let disk = try guidDisk()
        try run("sgdisk", "-h", "2:4", disk.path)
        let table = try disk.table()
        #expect(table.kind == .gpt && table.partitions.map(\.number) == [1, 2, 4, 5] && table.warning == nil)
    }

    /// A disk in an image is read like any other.
    @Test func inAnImage() throws {
        let disk = try guidDisk()
        let content = try DiskFile(mebibytes: 5)
        try run("mkfs.ext4", "-q", "-L", "inside", content.path)
        let whole = try disk.table()
        try disk.place(content, at: whole.partitions[1].offset)
        let folder = try TemporaryFolder()
        try run("qemu-img", "convert", "-O", "vmdk", disk.path, folder.file("disk.vmdk"))
        let image = try Disk.open(folder.file("disk.vmdk"), options: DiskOptions(isWritable: false))
        let table = try PartitionTable.read(from: image)
        #expect(table.partitions == whole.partitions && table.warning == nil)
        let found = try table.partitions.map { (partition) throws in
            try FileSystem.detect(in: image, offset: partition.offset, length: partition.length)
        }
        #expect(found.map(\.?.kind) == [nil, .ext4, nil, nil])
        #expect(found[1]?.label == "inside")
        try image.close()
    }

    // MARK: - None

    @Test(arguments: [
        ["mkfs.ext4", "-q"], ["mkfs.xfs", "-q"], ["mkfs.vfat"], ["mkfs.vfat", "--mbr=yes"], ["mkfs.vfat", "-F", "32"],
        ["mkfs.ntfs", "-q", "-F"], ["mkfs.exfat"], ["mkswap"], ["mkfs.btrfs", "-q"],
    ])
    func fileSystemWithoutTable(_ command: [String]) throws {
        // XFS wants 300 MB.
        let disk = try DiskFile(mebibytes: command[0] == "mkfs.xfs" ? 320 : 128)
        try run(command + [disk.path])
        let table = try disk.table()
        #expect(table.kind == .none && table.warning == nil && table.partitions.isEmpty)
        // A boot loader's first sector ends like a boot record.
        if command[0] == "mkfs.ext4" {
            try disk.write(Array("Missing operating system, press any key to restart it and hope for t".utf8), at: 440)
            try disk.write([0x55, 0xaa], at: 510)
            #expect(try disk.table().kind == .none)
            #expect(try disk.table().warning == nil)
        }
    }

    @Test func emptyTables() throws {
        let disk = try DiskFile(mebibytes: 64)
        #expect(try disk.table().kind == .none)
        try run("sfdisk", "-q", disk.path, input: "label: dos\n")
        #expect(try disk.table().kind == .mbr)
        try run("sfdisk", "-q", "--wipe", "always", disk.path, input: "label: gpt\n")
        let table = try disk.table()
        #expect(table.kind == .gpt && table.partitions.isEmpty && table.warning == nil)
    }
}
