import DiskPartitions
import DiskStorage

/// What libFuzzer calls with every input.
///
/// The first byte says how the disk is used, the next four how many sectors of 512 bytes it has. The rest are pieces
/// of it: a sector's number (from the disk's end if the top bit is set), in two bytes how many bytes follow, and these;
/// everything else is zeros. Whatever that makes: the library must end each call, and keep what it promises.
@_cdecl("LLVMFuzzerTestOneInput")
public func fuzzOneInput(_ data: UnsafePointer<UInt8>, _ count: Int) -> CInt {
    let input = [UInt8](UnsafeBufferPointer(start: data, count: count))
    guard input.count > 5 else { return 0 }
    var disk = PieceSource(parsing: input)
    if input[0] & 1 != 0 { disk.repairChecksums() }
    exercise(disk)
    return 0
}

private func exercise(_ disk: PieceSource) {
    guard let table = try? PartitionTable.read(from: disk) else { preconditionFailure("the source does not fail") }
    var end: UInt64 = 0
    for range in (table.partitions.map(\.range) + table.areas).sorted(by: { $0.lowerBound < $1.lowerBound }) {
        precondition(range.lowerBound >= end && range.upperBound <= disk.size && !range.isEmpty, "\(table)")
        end = range.upperBound
    }
    precondition(table.partitions.count <= 8192)
    precondition(table.kind != .none || table.partitions.isEmpty && table.warning == nil)
    let places = [0..<disk.size] + table.partitions.prefix(4).map(\.range) + [disk.size / 3..<disk.size]
    for place in places {
        let length = place.upperBound - place.lowerBound
        guard let found = try? FileSystem.detect(in: disk, offset: place.lowerBound, length: length) else { continue }
        precondition(found.label?.unicodeScalars.contains { $0.value < 0x20 } != true)
    }
    lookForFreeSpace(disk)
}

/// Free runs lie inside their file system, in order.
private func lookForFreeSpace(_ disk: PieceSource) {
    guard let found = try? FreeSpace.find(in: disk) else { preconditionFailure("the source does not fail") }
    for system in found.fileSystems {
        var end = system.offset
        try? system.forEachFreeRun(in: disk) { run in
            precondition(run.lowerBound >= end && !run.isEmpty && run.upperBound <= system.offset + system.length)
            precondition(run.upperBound <= disk.size)
            end = run.upperBound
        }
    }
}

/// A disk of zeros with pieces in it; later ones lie over earlier ones.
struct PieceSource: SectorSource {
    let size: UInt64
    private var pieces: [(offset: UInt64, bytes: [UInt8])] = []

    init(parsing input: [UInt8]) {
        func number(_ place: Int, _ count: Int) -> UInt64 {
            input[place..<place + count].reversed().reduce(0) { $0 << 8 | UInt64($1) }
        }
        // A size that is no multiple of a sector now and then.
        size = number(1, 4) * 512 + (input[0] & 2 != 0 ? 100 : 0)
        var position = 5
        while position + 6 < input.count, pieces.count < 64 {
            let sector = number(position, 4)
            let count = min(Int(number(position + 4, 2)), input.count - position - 6)
            let offset = (sector & 0x7fff_ffff) * 512
            let bytes = Array(input[position + 6..<position + 6 + count])
            pieces.append((sector >> 31 == 0 ? offset : size - min(size, offset), bytes))
            position += 6 + count
        }
    }

    func read(into buffer: IOBuffer, at offset: UInt64) {
        precondition(offset <= size && UInt64(buffer.count) <= size - offset, "outside of the disk")
        buffer.zero()
        let end = offset + UInt64(buffer.count)
        for piece in pieces {
            let first = max(piece.offset, offset)
            let last = min(piece.offset + UInt64(piece.bytes.count), end)
            guard first < last else { continue }
            let part = Array(piece.bytes[Int(first - piece.offset)..<Int(last - piece.offset)])
            try? part.withIOBytes { buffer.slice(Int(first - offset), part.count).copy(from: $0) }
        }
    }

    private func bytes(at offset: UInt64, _ count: Int) -> [UInt8]? {
        guard offset <= size, UInt64(count) <= size - offset else { return nil }
        var bytes = [UInt8](repeating: 0, count: count)
        try? bytes.withIOBuffer { read(into: $0, at: offset) }
        return bytes
    }

    /// Makes the checksums of GUID partition tables right: the fuzzer would hardly guess them.
    mutating func repairChecksums() {
        for sectorSize in [512, 4096] as [UInt64] where size >= 4 * sectorSize {
            for place in [sectorSize, (size / sectorSize - 1) * sectorSize] {
                guard var header = bytes(at: place, Int(sectorSize)), header.starts(with: "EFI PART".utf8) else {
                    continue
                }
                func number(_ place: Int, _ count: Int) -> UInt64 {
                    header[place..<place + count].reversed().reduce(0) { $0 << 8 | UInt64($1) }
                }
                func put(_ value: UInt32, at place: Int) {
                    for index in 0..<4 { header[place + index] = UInt8(truncatingIfNeeded: value >> UInt32(8 * index)) }
                }
                let length = number(80, 4) * number(84, 4)
                let start = number(72, 8).multipliedReportingOverflow(by: sectorSize)
                if length <= 1 << 20, !start.overflow, let entries = bytes(at: start.partialValue, Int(length)) {
                    put(checksum(entries), at: 88)
                }
                put(0, at: 16)
                let headerSize = number(12, 4)
                if headerSize <= sectorSize { put(checksum(Array(header[..<Int(headerSize)])), at: 16) }
                pieces.append((place, header))
            }
        }
    }
}

private let checksumTable: [UInt32] = (0..<256).map { byte in
    (0..<8).reduce(UInt32(byte)) { value, _ in value & 1 != 0 ? value >> 1 ^ 0xedb8_8320 : value >> 1 }
}

/// The CRC-32 of the GUID partition table.
private func checksum(_ bytes: [UInt8]) -> UInt32 {
    ~bytes.reduce(UInt32.max) { $0 >> 8 ^ checksumTable[Int(UInt8(truncatingIfNeeded: $0) ^ $1)] }
}
