import CommandSupport
import DiskPartitions
import VirtualDisk

/// What `info.json` says.
struct DiskInformation: Codable {
    struct DiskRecord: Codable {
        var size: UInt64
        var mode: String
        var partitionTable: String
        var sectorSize: Int
        var identifier: String?
        var warning: String?
        /// Of a disk without partitions.
        var fileSystem: FileSystemRecord?

        enum CodingKeys: String, CodingKey {
            case size, mode, identifier, warning
            case partitionTable = "partition-table"
            case sectorSize = "sector-size"
            case fileSystem = "file-system"
        }
    }

    struct FileSystemRecord: Codable {
        var kind: String
        var version: String?
        var label: String?
        var uuid: String?

        init(_ found: FileSystem) {
            kind = found.kind.rawValue
            version = found.version
            label = found.label
            uuid = found.uuid
        }
    }

    struct PartitionRecord: Codable {
        var number: Int
        var file: String
        var offset: UInt64
        var size: UInt64
        var type: String
        var typeName: String?
        var name: String?
        var uuid: String?
        var isBootable: Bool
        var fileSystem: FileSystemRecord?

        enum CodingKeys: String, CodingKey {
            case number, file, offset, size, type, name, uuid
            case typeName = "type-name"
            case isBootable = "is-bootable"
            case fileSystem = "file-system"
        }
    }

    var disk: DiskRecord
    /// The top image first.
    var images: [MountStatus.Image]
    var partitions: [PartitionRecord]

    /// What the partitions hold is looked at; what cannot be read counts as unknown.
    init(_ disk: Disk, _ table: PartitionTable) {
        func fileSystem(_ offset: UInt64, _ length: UInt64) -> FileSystemRecord? {
            (try? FileSystem.detect(in: disk, offset: offset, length: length)).map(FileSystemRecord.init)
        }
        self.disk = DiskRecord(
            size: disk.size, mode: disk.isWritable ? "rw" : "ro", partitionTable: table.kind.rawValue,
            sectorSize: max(table.sectorSize, Int(disk.sectorSize ?? 0)), identifier: table.diskIdentifier,
            warning: table.warning,
            fileSystem: table.partitions.isEmpty ? fileSystem(0, disk.size) : nil)
        images = disk.layers.map { .init(path: $0.path, format: $0.format) }
        partitions = table.partitions.map {
            PartitionRecord(
                number: $0.number, file: "part\($0.number).raw", offset: $0.offset, size: $0.length, type: $0.type,
                typeName: $0.typeName, name: $0.name, uuid: $0.uuid, isBootable: $0.isBootable,
                fileSystem: fileSystem($0.offset, $0.length))
        }
    }
}
