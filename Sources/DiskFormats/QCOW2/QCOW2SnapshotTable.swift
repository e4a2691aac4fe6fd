internal import DiskImage
internal import DiskStorage

/// An entry of the snapshot table, big endian (QEMU, docs/interop/qcow2, "Snapshots").
///
/// | offset | size | name in the specification |
/// |---|---|---|
/// | 0 | 8 | L1 table offset |
/// | 8 | 4 | L1 table entries |
/// | 12 | 2 | bytes of the ID string |
/// | 14 | 2 | bytes of the name |
/// | 16 | 4 | time: seconds since 1970 |
/// | 20 | 4 | nanoseconds of the time |
/// | 24 | 8 | time that the guest had run, in nanoseconds |
/// | 32 | 4 | bytes of VM state, where there is no extra data |
/// | 36 | 4 | bytes of extra data |
/// | 40 | 8 | extra data: bytes of VM state |
/// | 48 | 8 | extra data: bytes of the disk |
/// | 56 | 8 | extra data: instructions executed |
/// | … | … | ID string and name, filled up to a multiple of 8 bytes |
struct QCOW2Snapshot: Sendable, Equatable {
    static let fixedByteCount = 40
    /// Bytes of extra data at most (QEMU's limit too).
    static let extraLimit: UInt32 = 1024
    /// Bytes of a table at most: 1 KiB for each of the snapshots that there can be.
    static let tableByteLimit: UInt64 = 64 << 20

    var l1TableOffset: UInt64
    var l1Size: UInt32
    var id: String
    var name: String
    var seconds: UInt32
    var nanoseconds: UInt32
    var clock: UInt64
    var stateSize: UInt64
    /// Bytes of the disk; nil: as many as now.
    var diskSize: UInt64?
    /// Bytes of the entry with its padding.
    var byteCount: UInt64

    /// What the image lets users see.
    func description(currentSize: UInt64) -> InternalSnapshot {
        InternalSnapshot(
            id: id, name: name, virtualSize: diskSize ?? currentSize, date: UInt64(seconds), machineStateSize: stateSize
        )
    }

    /// Stands for the snapshot where an image has a UUID: the same for as long as it exists, and hardly that of
    /// another.
    var uuid: DiskUUID {
        var bytes: [UInt8] = []
        var text = Array("\(id)\n\(name)\n\(seconds)\n\(nanoseconds)\n\(clock)\n\(diskSize ?? 0)\n".utf8)
        for round in 0..<2 as Range<UInt8> {
            text.append(round)
            // FNV-1a
            let hash = text.reduce(0xcbf2_9ce4_8422_2325 as UInt64) { ($0 ^ UInt64($1)) &* 0x100_0000_01b3 }
            for shift in stride(from: 56, through: 0, by: -8) {
                bytes.append(UInt8(truncatingIfNeeded: hash >> UInt64(shift)))
            }
        }
        bytes[6] = bytes[6] & 0x0f | 0x80
        bytes[8] = bytes[8] & 0x3f | 0x80
        return (try? DiskUUID(bigEndian: bytes)) ?? .null
    }

    /// Parses the entry at `offset` of the file.
    init(_ storage: any Storage, at offset: UInt64) throws(DiskError) {
        let fixed = FieldReader(try storage.bytes(at: offset, count: Self.fixedByteCount, for: .table, "a snapshot"))
        l1TableOffset = try fixed.bigEndian(at: 0)
        l1Size = try fixed.bigEndian(at: 8)
        let idCount = Int(try fixed.bigEndian(at: 12, as: UInt16.self))
        let nameCount = Int(try fixed.bigEndian(at: 14, as: UInt16.self))
        seconds = try fixed.bigEndian(at: 16)
        nanoseconds = try fixed.bigEndian(at: 20)
        clock = try fixed.bigEndian(at: 24)
        stateSize = UInt64(try fixed.bigEndian(at: 32, as: UInt32.self))
        let extraCount: UInt32 = try fixed.bigEndian(at: 36)
        guard extraCount <= Self.extraLimit else {
            throw DiskError(
                .invalidImage, "a snapshot is said to have \(extraCount) bytes of extra data", offset: offset + 36)
        }
        let count = Int(extraCount) + idCount + nameCount
        let rest = FieldReader(
            try storage.bytes(at: offset + UInt64(Self.fixedByteCount), count: count, for: .table, "a snapshot"))
        if extraCount >= 8 { stateSize = try rest.bigEndian(at: 0) }
        if extraCount >= 16 { diskSize = try rest.bigEndian(at: 8) }
        id = String(decoding: try rest.bytes(at: Int(extraCount), count: idCount), as: UTF8.self)
        name = String(decoding: try rest.bytes(at: Int(extraCount) + idCount, count: nameCount), as: UTF8.self)
        byteCount = (UInt64(Self.fixedByteCount + count) + 7) & ~7
    }
}

/// The table of an image's internal snapshots, read one by one.
struct QCOW2SnapshotTable: Sendable {
    let storage: any Storage
    let offset: UInt64
    let count: UInt32

    init(_ header: QCOW2Header, _ storage: any Storage) {
        self.storage = storage
        offset = header.snapshotsOffset
        count = header.snapshotCount
    }

    /// Calls `body` with each snapshot until it answers false; answers how many bytes were looked at.
    @discardableResult
    func visit(_ body: (QCOW2Snapshot) throws(DiskError) -> Bool) throws(DiskError) -> UInt64 {
        var used: UInt64 = 0
        for _ in 0..<count {
            let snapshot = try QCOW2Snapshot(storage, at: offset + used)
            used += snapshot.byteCount
            guard used <= QCOW2Snapshot.tableByteLimit else {
                throw DiskError(
                    .invalidImage, "the snapshot table is longer than \(QCOW2Snapshot.tableByteLimit) bytes")
            }
            guard try body(snapshot) else { break }
        }
        return used
    }

    /// The snapshot with that ID or, if none has it, of that name.
    func find(_ wanted: String) throws(DiskError) -> QCOW2Snapshot {
        var found: QCOW2Snapshot?
        var names: [String] = []
        try visit { (snapshot) throws(DiskError) in
            if snapshot.id == wanted {
                found = snapshot
                return false
            }
            if snapshot.name == wanted, found == nil { found = snapshot }
            if names.count < 20 { names.append("'\(snapshot.name)'") }
            return true
        }
        if let found { return found }
        let known = names.isEmpty ? "it has none" : "it has \(names.joined(separator: ", "))"
        throw DiskError(.notFound, "has no internal snapshot '\(wanted)': \(known)")
    }
}
