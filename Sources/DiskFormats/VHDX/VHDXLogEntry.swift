internal import DiskStorage

/// The first bytes of a log entry. [MS-VHDX] 2.3.1.1.
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 4 | Signature: `loge` |
/// | 4 | 4 | Checksum: CRC-32C of the whole entry, with this field 0 |
/// | 8 | 4 | EntryLength: bytes, a multiple of 4 KiB |
/// | 12 | 4 | Tail: where in the log the oldest entry begins that is still needed |
/// | 16 | 8 | SequenceNumber: more than 0 |
/// | 24 | 4 | DescriptorCount |
/// | 32 | 16 | LogGuid: the header's |
/// | 48 | 8 | FlushedFileOffset: how long the file was for certain when the entry was written |
/// | 56 | 8 | LastFileOffset: how long the file must be at least for what the entry says |
struct VHDXLogEntryHeader: Sendable {
    static let byteCount = 64
    /// What log, entries and descriptors count in.
    static let sectorSize = 4096
    /// Changes of an entry, and of all that are replayed, at most: what is known of them is in memory.
    static let descriptorLimit = 1 << 17
    private static let signature: StaticString = "loge"

    var entryLength: UInt32
    var tail: UInt32
    var sequenceNumber: UInt64
    var descriptorCount: UInt32
    var logGUID: DiskUUID
    var flushedFileOffset: UInt64
    var lastFileOffset: UInt64

    /// Sectors of an entry that hold its header and `count` descriptors: 126 in the first one, 128 in each later one.
    static func descriptorSectors(_ count: Int) -> Int {
        (byteCount + count * VHDXLogDescriptor.byteCount + sectorSize - 1) / sectorSize
    }

    /// Nil: the bytes are none of a header.
    init?(parsing fields: FieldReader) throws(DiskError) {
        guard fields.count >= Self.byteCount, fields.matches(Self.signature, at: 0) else { return nil }
        entryLength = try fields.littleEndian(at: 8)
        tail = try fields.littleEndian(at: 12)
        sequenceNumber = try fields.littleEndian(at: 16)
        descriptorCount = try fields.littleEndian(at: 24)
        logGUID = try DiskUUID(mixedEndian: fields.bytes(at: 32, count: 16))
        flushedFileOffset = try fields.littleEndian(at: 48)
        lastFileOffset = try fields.littleEndian(at: 56)
    }

    init(
        entryLength: UInt32, tail: UInt32, sequenceNumber: UInt64, descriptorCount: UInt32, logGUID: DiskUUID,
        fileLength: UInt64
    ) {
        self.entryLength = entryLength
        self.tail = tail
        self.sequenceNumber = sequenceNumber
        self.descriptorCount = descriptorCount
        self.logGUID = logGUID
        flushedFileOffset = fileLength
        lastFileOffset = fileLength
    }

    /// Writes the fields, without the checksum.
    func encode(into fields: inout FieldWriter) {
        fields.bytes(Self.signature.bytes, at: 0)
        fields.littleEndian(entryLength, at: 8)
        fields.littleEndian(tail, at: 12)
        fields.littleEndian(sequenceNumber, at: 16)
        fields.littleEndian(descriptorCount, at: 24)
        fields.bytes(logGUID.mixedEndian, at: 32)
        fields.littleEndian(flushedFileOffset, at: 48)
        fields.littleEndian(lastFileOffset, at: 56)
    }
}

/// One change that a log entry makes to the file. [MS-VHDX] 2.3.1.2 and 2.3.1.3.
///
/// | offset | size | a run of zeros | 4 KiB of data |
/// |---|---|---|---|
/// | 0 | 4 | ZeroSignature: `zero` | DataSignature: `desc` |
/// | 4 | 4 | reserved | TrailingBytes: the last 4 of the 4096 |
/// | 8 | 8 | ZeroLength: bytes, a multiple of 4 KiB | LeadingBytes: the first 8 |
/// | 16 | 8 | FileOffset: a multiple of 4 KiB | the same |
/// | 24 | 8 | SequenceNumber: the entry's | the same |
struct VHDXLogDescriptor: Sendable {
    static let byteCount = 32
    private static let dataSignature: StaticString = "desc"
    private static let zeroSignature: StaticString = "zero"

    enum Content: Sendable {
        case zeros(length: UInt64)
        case data(leading: [UInt8], trailing: [UInt8])
    }

    let content: Content
    let fileOffset: UInt64
    let sequenceNumber: UInt64

    /// The bytes of the file that it changes; nil: more than there can be.
    var range: Range<UInt64>? {
        var length = UInt64(VHDXLogEntryHeader.sectorSize)
        if case .zeros(let zeros) = content { length = zeros }
        let (end, overflow) = fileOffset.addingReportingOverflow(length)
        return overflow ? nil : fileOffset..<end
    }

    /// Nil: the bytes are none of a descriptor.
    init?(parsing fields: FieldReader, at offset: Int) throws(DiskError) {
        if fields.matches(Self.dataSignature, at: offset) {
            content = .data(
                leading: try fields.bytes(at: offset + 8, count: 8),
                trailing: try fields.bytes(at: offset + 4, count: 4))
        } else if fields.matches(Self.zeroSignature, at: offset) {
            content = .zeros(length: try fields.littleEndian(at: offset + 8))
        } else {
            return nil
        }
        fileOffset = try fields.littleEndian(at: offset + 16)
        sequenceNumber = try fields.littleEndian(at: offset + 24)
        let unit = UInt64(VHDXLogEntryHeader.sectorSize)
        guard fileOffset % unit == 0 else { return nil }
        if case .zeros(let length) = content, length % unit != 0 { return nil }
    }

    /// Writes the descriptor of 4 KiB of data that go to `fileOffset`.
    static func encode(
        _ data: [UInt8], to fileOffset: UInt64, sequenceNumber: UInt64, at offset: Int, into fields: inout FieldWriter
    ) {
        fields.bytes(dataSignature.bytes, at: offset)
        fields.bytes(data.suffix(4), at: offset + 4)
        fields.bytes(data.prefix(8), at: offset + 8)
        fields.littleEndian(fileOffset, at: offset + 16)
        fields.littleEndian(sequenceNumber, at: offset + 24)
    }
}

/// What a log keeps of 4 KiB of data besides its first and last bytes. [MS-VHDX] 2.3.1.4.
///
/// | offset | size | name |
/// |---|---|---|
/// | 0 | 4 | DataSignature: `data` |
/// | 4 | 4 | SequenceHigh: of the entry's sequence number |
/// | 8 | 4084 | Data |
/// | 4092 | 4 | SequenceLow |
enum VHDXLogDataSector {
    private static let signature: StaticString = "data"
    private static let dataRange = 8..<4092

    /// Whether the bytes are a data sector of the entry with that number.
    static func isValid(_ fields: FieldReader, sequenceNumber: UInt64) throws(DiskError) -> Bool {
        guard fields.matches(signature, at: 0) else { return false }
        let high: UInt32 = try fields.littleEndian(at: 4)
        let low: UInt32 = try fields.littleEndian(at: 4092)
        return UInt64(high) << 32 | UInt64(low) == sequenceNumber
    }

    /// The 4 KiB that sector and descriptor hold together.
    static func content(_ sector: [UInt8], leading: [UInt8], trailing: [UInt8]) -> [UInt8] {
        leading + sector[dataRange] + trailing
    }

    /// Writes the sector for 4 KiB of data.
    static func encode(_ data: [UInt8], sequenceNumber: UInt64, at offset: Int, into fields: inout FieldWriter) {
        fields.bytes(signature.bytes, at: offset)
        fields.littleEndian(UInt32(truncatingIfNeeded: sequenceNumber >> 32), at: offset + 4)
        fields.bytes(data[dataRange], at: offset + 8)
        fields.littleEndian(UInt32(truncatingIfNeeded: sequenceNumber), at: offset + 4092)
    }
}
