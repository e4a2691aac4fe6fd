import DiskStorage
import DiskTesting
import Testing

@testable import DiskPartitions

/// Runs a program that must succeed, and answers what it printed.
@discardableResult
func run(_ command: String..., input: String = "") throws -> String { try run(command, input: input) }

@discardableResult
func run(_ command: [String], input: String = "") throws -> String {
    let result = try Subprocess.run(command, input: Array(input.utf8))
    try #require(result.status == 0, "\(command.joined(separator: " ")): \(result.errorText)\(result.outputText)")
    return result.outputText
}

/// A file that is a disk, in a folder of its own.
final class DiskFile {
    let path: String
    private let folder: TemporaryFolder
    private let storage: FileStorage

    /// A disk of that many MiB, all zeros.
    init(mebibytes: UInt64) throws {
        folder = try TemporaryFolder()
        path = folder.file("disk")
        storage = try FileStorage(creating: path)
        try storage.setLength(mebibytes << 20)
    }

    var source: StorageSource {
        get throws { try StorageSource(try FileStorage(path: path, isWritable: false)) }
    }

    func table() throws -> PartitionTable { try PartitionTable.read(from: try source) }

    func zero(_ range: Range<UInt64>) throws { try storage.writeZeros(range, for: .guestData) }

    func write(_ bytes: [UInt8], at offset: UInt64) throws { try storage.write(bytes, at: offset, for: .guestData) }

    func bytes(_ range: Range<UInt64>) throws -> [UInt8] {
        try storage.availableBytes(at: range.lowerBound, count: Int(range.count), for: .guestData)
    }

    var size: UInt64 {
        get throws { try storage.length() }
    }

    func resize(_ length: UInt64) throws { try storage.setLength(length) }

    /// Copies what another disk holds to `offset`.
    func place(_ other: DiskFile, at offset: UInt64) throws {
        try run(
            "dd", "if=\(other.path)", "of=\(path)", "bs=64K", "conv=notrunc,sparse", "oflag=seek_bytes",
            "seek=\(offset)")
    }

    /// What `partx` finds, which is util-linux's library and not ours; extended partitions are left out.
    func foreignRows(sectorSize: Int = 512) throws -> [Row] {
        let text = try run(
            "partx", "-S", "\(sectorSize)", "-P", "-o", "NR,START,SECTORS,TYPE,UUID,NAME", path)
        return text.split(separator: "\n").map { Row(foreign: String($0)) }.filter {
            !["0x5", "0xf", "0x85"].contains($0.type)
        }
    }
}

/// A partition in the words of another program.
struct Row: Equatable, CustomStringConvertible {
    var number: Int
    var offset: UInt64
    var length: UInt64
    var type: String
    var uuid: String
    var name: String

    /// `NR="1" START="2048" SECTORS="20480" …`
    init(foreign line: String) {
        var values: [String: String] = [:]
        for pair in line.split(separator: "\" ") {
            let parts = pair.split(separator: "=", maxSplits: 1).map { $0.filter { $0 != "\"" } }
            if parts.count == 2 { values[parts[0]] = parts[1] }
        }
        number = Int(values["NR"] ?? "") ?? 0
        offset = (UInt64(values["START"] ?? "") ?? 0) * 512
        length = (UInt64(values["SECTORS"] ?? "") ?? 0) * 512
        type = values["TYPE"] ?? ""
        uuid = values["UUID"] ?? ""
        name = values["NAME"] ?? ""
    }

    init(_ partition: Partition) {
        number = partition.number
        offset = partition.offset
        length = partition.length
        // util-linux leaves out zeros in front.
        type = partition.type.hasPrefix("0x0") ? "0x" + partition.type.dropFirst(3) : partition.type
        uuid = partition.uuid ?? ""
        name = partition.name ?? ""
    }

    var description: String { "\(number): \(offset)+\(length) \(type) \(uuid) '\(name)'" }
}

/// Asserts what every table promises, whatever it was read from.
func checkPromises(_ table: PartitionTable, size: UInt64, _ comment: String = "") {
    var end: UInt64 = 0
    for range in (table.partitions.map(\.range) + table.areas).sorted(by: { $0.lowerBound < $1.lowerBound }) {
        #expect(range.lowerBound >= end && range.upperBound <= size && !range.isEmpty, "\(comment): \(table)")
        end = range.upperBound
    }
    #expect(zip(table.partitions, table.partitions.dropFirst()).allSatisfy { $0.number < $1.number })
    if table.kind == .none { #expect(table.partitions.isEmpty && table.warning == nil, "\(comment): \(table)") }
}

/// Tables made here, to be wrong in every way.
struct TableBuilder {
    var bytes: [UInt8]

    init(size: Int) { bytes = [UInt8](repeating: 0, count: size) }

    var source: StorageSource {
        get throws { try StorageSource(MemoryStorage(bytes)) }
    }

    func table() throws -> PartitionTable {
        let table = try PartitionTable.read(from: try source)
        checkPromises(table, size: UInt64(bytes.count))
        return table
    }

    mutating func write(_ new: [UInt8], at offset: Int) {
        bytes.replaceSubrange(offset..<offset + new.count, with: new)
    }

    /// A boot record in a sector of 512 bytes, or another size.
    mutating func bootRecord(
        at sector: Int, sectorSize: Int = 512, signature: UInt32 = 0,
        _ entries: [(type: UInt8, start: UInt32, count: UInt32)]
    ) {
        var fields = FieldWriter(count: 512)
        fields.littleEndian(signature, at: 440)
        for (index, entry) in entries.enumerated() {
            fields.byte(entry.type, at: 446 + 16 * index + 4)
            fields.littleEndian(entry.start, at: 446 + 16 * index + 8)
            fields.littleEndian(entry.count, at: 446 + 16 * index + 12)
        }
        fields.littleEndian(UInt16(0xaa55), at: 510)
        write(fields.bytes, at: sector * sectorSize)
    }
}

/// A GUID partition table, both copies of it, with the fields as they should be unless told otherwise.
struct GUIDTable {
    var sectorSize = 512
    var entryCount = 128
    var entrySize = 128
    var headerSize = 92
    /// Changed in both headers before the checksums are made.
    var change: (inout FieldWriter) -> Void = { _ in }
    var partitions: [(first: UInt64, last: UInt64)] = []

    /// Writes it to a disk. The copies are at the front and at the end.
    func write(to disk: inout TableBuilder, primary: Bool = true, backup: Bool = true) {
        disk.bootRecord(at: 0, [(0xee, 1, UInt32(disk.bytes.count / sectorSize - 1))])
        let last = disk.bytes.count / sectorSize - 1
        var entries = FieldWriter(count: entryCount * entrySize)
        for (index, partition) in partitions.enumerated() {
            entries.bytes([0xaf, 0x3d, 0xc6, 0x0f], at: index * entrySize)
            entries.byte(UInt8(index + 1), at: index * entrySize + 16)
            entries.littleEndian(partition.first, at: index * entrySize + 32)
            entries.littleEndian(partition.last, at: index * entrySize + 40)
        }
        let sectors = (entries.bytes.count + sectorSize - 1) / sectorSize
        let copies = [(own: 1, other: last, entries: 2), (own: last, other: 1, entries: last - sectors)]
        for (copy, wanted) in zip(copies, [primary, backup]) where wanted {
            var header = FieldWriter(count: sectorSize)
            header.bytes("EFI PART".utf8, at: 0)
            header.littleEndian(UInt32(0x1_0000), at: 8)
            header.littleEndian(UInt32(headerSize), at: 12)
            header.littleEndian(UInt64(copy.own), at: 24)
            header.littleEndian(UInt64(copy.other), at: 32)
            header.littleEndian(UInt64(2 + sectors), at: 40)
            header.littleEndian(UInt64(last - sectors - 1), at: 48)
            header.bytes([UInt8](0..<16), at: 56)
            header.littleEndian(UInt64(copy.entries), at: 72)
            header.littleEndian(UInt32(entryCount), at: 80)
            header.littleEndian(UInt32(entrySize), at: 84)
            header.littleEndian(crc32(entries.bytes), at: 88)
            change(&header)
            disk.write(Self.withChecksum(header.bytes), at: copy.own * sectorSize)
            disk.write(entries.bytes, at: copy.entries * sectorSize)
        }
    }

    /// A header whose checksum is right for its size, if that is possible.
    static func withChecksum(_ header: [UInt8]) -> [UInt8] {
        var fields = FieldWriter(header)
        fields.littleEndian(UInt32(0), at: 16)
        let size = header[12..<16].reversed().reduce(0) { $0 << 8 | Int($1) }
        if size <= header.count { fields.littleEndian(crc32(Array(fields.bytes[..<size])), at: 16) }
        return fields.bytes
    }
}
