import ArgumentParser
import CommandSupport
import DiskImage
import DiskStorage
import Glibc
import VirtualDisk

/// `vdimg info`: what an image, or each of its chain, is.
struct InfoCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "info", abstract: "Show what an image is: format, sizes, identity, parent.",
        discussion:
            "Works on images that are in use. With --chain the parents are found, opened and checked as for a mount.")

    @OptionGroup var image: ImageOptions
    @Flag(help: "Also show the parents, the newest image first.") var chain = false
    @Flag(help: "Write JSON: a list of images, the newest first.") var json = false
    @Argument(help: "The image.", completion: .file()) var path: String

    func run() throws {
        try reportingErrors { () throws(DiskError) in
            let images = try ImageInformation.read(path, options: image.diskOptions(), wholeChain: chain)
            if json {
                do { try print(jsonText(images.map(ImageRecord.init))) } catch { throw DiskError(.system, "\(error)") }
                return
            }
            for (index, image) in images.enumerated() {
                if index > 0 { print() }
                show(image)
            }
        }
    }

    private func show(_ image: ImageInformation) {
        var rows = [
            ("image", image.path), ("format", image.format),
            ("virtual size", "\(humanSize(image.virtualSize)) (\(image.virtualSize) bytes)"),
            (
                "disk usage",
                "\(humanSize(image.allocatedBytes)) of \(humanSize(image.fileLength)) in "
                    + (image.files.count == 1 ? "1 file" : "\(image.files.count) files")
            ),
        ]
        if image.blockSize > 0 { rows.append(("block size", humanSize(image.blockSize))) }
        if image.sectorSize != 512 {
            let size = image.sectorSize
            rows.append(("sector size", "\(size) bytes: a loop device needs 'losetup --sector-size \(size)'"))
        }
        let known = metadataRows(image.metadata)
        rows += known.map { ($0.title, $0.value) }
        // Some formats tell the same among what is their own.
        let shown = Set(known.map(\.property))
        rows += image.properties.filter { !shown.contains($0.key) }.map { ($0.title, $0.value) }
        for file in image.files.dropFirst() { rows.append(("file", file)) }
        rows += image.snapshots.map { ("internal snapshot", describe($0)) }
        printRows(rows)
    }
}

/// What an image stores of itself, each with the key that it has among the properties of some formats.
private func metadataRows(_ metadata: ImageMetadata) -> [(property: String, title: String, value: String)] {
    let rows: [(String, String, String?)] = [
        ("comment", "comment", metadata.comment),
        ("uuid", "UUID", metadata.uuid?.description),
        ("modification-uuid", "modification UUID", metadata.modificationUUID?.description),
        ("parent-uuid", "parent UUID", metadata.parentUUID?.description),
        ("parent-modification-uuid", "parent modification UUID", metadata.parentModificationUUID?.description),
        ("geometry", "physical geometry (CHS)", metadata.physicalGeometry?.description),
        ("geometry-bios", "logical geometry (CHS)", metadata.logicalGeometry?.description),
    ]
    return rows.compactMap { row in row.2.map { (row.0, row.1, $0) } }
}

/// `ID, NAME, made at TIME, SIZE`, and what was saved of a machine.
private func describe(_ snapshot: InternalSnapshot) -> String {
    var seconds = time_t(clamping: snapshot.date)
    var fields = unsafe tm()
    unsafe gmtime_r(&seconds, &fields)
    func two(_ number: Int32) -> String { number < 10 ? "0\(number)" : "\(number)" }
    let day = unsafe "\(Int(fields.tm_year) + 1900)-\(two(fields.tm_mon + 1))-\(two(fields.tm_mday))"
    let time = unsafe "\(two(fields.tm_hour)):\(two(fields.tm_min)):\(two(fields.tm_sec))"
    let machine =
        snapshot.machineStateSize > 0 ? ", with \(humanSize(snapshot.machineStateSize)) of machine state" : ""
    return "\(snapshot.id), \(snapshot.name), made \(day) \(time) UTC, "
        + "\(humanSize(snapshot.virtualSize))\(machine)"
}

/// An image as JSON shows it.
struct ImageRecord: Encodable {
    let image: String
    let format: String
    let virtualSize: UInt64
    let blockSize: UInt64
    let sectorSize: UInt32
    let fileLength: UInt64
    let allocatedBytes: UInt64
    let files: [String]
    let isDifferencing: Bool
    let parentPaths: [String]
    let metadata: MetadataRecord
    let settable: [String]
    let properties: [String: String]
    let snapshots: [SnapshotRecord]

    /// What the image stores of itself; what it does not is left out.
    struct MetadataRecord: Encodable {
        let comment: String?
        let uuid: String?
        let modificationUUID: String?
        let parentUUID: String?
        let parentModificationUUID: String?
        let physicalGeometry: String?
        let logicalGeometry: String?

        enum CodingKeys: String, CodingKey {
            case comment, uuid
            case modificationUUID = "modification-uuid"
            case parentUUID = "parent-uuid"
            case parentModificationUUID = "parent-modification-uuid"
            case physicalGeometry = "physical-geometry"
            case logicalGeometry = "logical-geometry"
        }

        init(_ metadata: ImageMetadata) {
            comment = metadata.comment
            uuid = metadata.uuid?.description
            modificationUUID = metadata.modificationUUID?.description
            parentUUID = metadata.parentUUID?.description
            parentModificationUUID = metadata.parentModificationUUID?.description
            physicalGeometry = metadata.physicalGeometry?.description
            logicalGeometry = metadata.logicalGeometry?.description
        }
    }

    /// An internal snapshot.
    struct SnapshotRecord: Encodable {
        let id: String
        let name: String
        let virtualSize: UInt64
        let date: UInt64
        let machineStateSize: UInt64

        enum CodingKeys: String, CodingKey {
            case id, name, date
            case virtualSize = "virtual-size"
            case machineStateSize = "machine-state-size"
        }
    }

    init(_ information: ImageInformation) {
        image = information.path
        format = information.format
        virtualSize = information.virtualSize
        blockSize = information.blockSize
        sectorSize = information.sectorSize
        fileLength = information.fileLength
        allocatedBytes = information.allocatedBytes
        files = information.files
        isDifferencing = information.parent != nil
        parentPaths = information.parent?.paths ?? []
        metadata = MetadataRecord(information.metadata)
        settable = information.settableFields.names
        properties = Dictionary(information.properties.map { ($0.key, $0.value) }) { first, _ in first }
        snapshots = information.snapshots.map {
            SnapshotRecord(
                id: $0.id, name: $0.name, virtualSize: $0.virtualSize, date: $0.date,
                machineStateSize: $0.machineStateSize)
        }
    }

    enum CodingKeys: String, CodingKey {
        case image, format, files, metadata, settable, properties, snapshots
        case virtualSize = "virtual-size"
        case blockSize = "block-size"
        case sectorSize = "sector-size"
        case fileLength = "file-length"
        case allocatedBytes = "allocated-bytes"
        case isDifferencing = "is-differencing"
        case parentPaths = "parent-paths"
    }
}
