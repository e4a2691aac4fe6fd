internal import DiskPartitions
internal import DiskStorage

/// One of the two headers. [MS-VHDX] 2.2.2.
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 4 | Signature: `head` |
/// | 4 | 4 | Checksum: CRC-32C of the 4 KiB, with this field 0 |
/// | 8 | 8 | SequenceNumber: of two valid headers the one with the larger number is current |
/// | 16 | 16 | FileWriteGuid: changes before the first write to the file |
/// | 32 | 16 | DataWriteGuid: changes before the first change of what the disk shows |
/// | 48 | 16 | LogGuid: null, or of the log entries that must be replayed |
/// | 64 | 2 | LogVersion: 0 |
/// | 66 | 2 | Version: 1 |
/// | 68 | 4 | LogLength: bytes, a multiple of 1 MiB |
/// | 72 | 8 | LogOffset: a multiple of 1 MiB |
struct VHDXHeader: Sendable, Equatable {
    static let byteCount = 4096
    /// Where the two lie.
    static let offsets: [UInt64] = [64 << 10, 128 << 10]
    static let version: UInt16 = 1
    static let logVersion: UInt16 = 0
    private static let signature: StaticString = "head"

    var sequenceNumber: UInt64
    var fileWriteGUID: DiskUUID
    var dataWriteGUID: DiskUUID
    var logGUID: DiskUUID
    var logVersion = Self.logVersion
    var version = Self.version
    var logLength: UInt32
    var logOffset: UInt64

    /// The log's place in the file.
    var logRange: Range<UInt64> { logOffset..<logOffset + UInt64(logLength) }

    init(
        sequenceNumber: UInt64, fileWriteGUID: DiskUUID, dataWriteGUID: DiskUUID, logGUID: DiskUUID = .null,
        logLength: UInt32, logOffset: UInt64
    ) {
        self.sequenceNumber = sequenceNumber
        self.fileWriteGUID = fileWriteGUID
        self.dataWriteGUID = dataWriteGUID
        self.logGUID = logGUID
        self.logLength = logLength
        self.logOffset = logOffset
    }

    /// Nil: the bytes are no valid header. What a valid one says is not checked yet.
    init?(parsing bytes: [UInt8]) throws(DiskError) {
        let fields = FieldReader(bytes)
        guard bytes.count == Self.byteCount, fields.matches(Self.signature, at: 0),
            VHDXChecksum.isRight(bytes)
        else { return nil }
        sequenceNumber = try fields.littleEndian(at: 8)
        fileWriteGUID = try DiskUUID(mixedEndian: fields.bytes(at: 16, count: 16))
        dataWriteGUID = try DiskUUID(mixedEndian: fields.bytes(at: 32, count: 16))
        logGUID = try DiskUUID(mixedEndian: fields.bytes(at: 48, count: 16))
        logVersion = try fields.littleEndian(at: 64)
        version = try fields.littleEndian(at: 66)
        logLength = try fields.littleEndian(at: 68)
        logOffset = try fields.littleEndian(at: 72)
    }

    /// The 4 KiB.
    func encode() -> [UInt8] {
        var fields = FieldWriter(count: Self.byteCount)
        fields.bytes(Self.signature.bytes, at: 0)
        fields.littleEndian(sequenceNumber, at: 8)
        fields.bytes(fileWriteGUID.mixedEndian, at: 16)
        fields.bytes(dataWriteGUID.mixedEndian, at: 32)
        fields.bytes(logGUID.mixedEndian, at: 48)
        fields.littleEndian(logVersion, at: 64)
        fields.littleEndian(version, at: 66)
        fields.littleEndian(logLength, at: 68)
        fields.littleEndian(logOffset, at: 72)
        return VHDXChecksum.set(fields.bytes)
    }
}

/// The checksum that headers, region tables and log entries have at byte 4.
enum VHDXChecksum {
    private static let offset = 4

    static func isRight(_ bytes: [UInt8]) -> Bool {
        guard bytes.count >= offset + 4 else { return false }
        return set(bytes) == bytes
    }

    /// The same bytes with the checksum that they must have.
    static func set(_ bytes: [UInt8]) -> [UInt8] {
        var fields = FieldWriter(bytes)
        fields.littleEndian(UInt32(0), at: offset)
        fields.littleEndian(CRC32C.checksum(fields.bytes), at: offset)
        return fields.bytes
    }
}

extension StaticString {
    /// Its UTF-8.
    var bytes: [UInt8] { withUTF8Buffer { unsafe Array($0) } }
}
