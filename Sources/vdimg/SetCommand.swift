import ArgumentParser
import DiskImage
import DiskStorage
import VirtualDisk

/// `vdimg set`: changes what an image says of itself.
struct SetCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "set", abstract: "Change the comment, the UUIDs or the geometry that an image stores.",
        discussion: """
            The disk is not touched. All is changed, or nothing: a property that the image cannot store is an error; \
            'vdimg info --json' lists under "settable" what it can.

            A child records the UUIDs of its parent. If those of an image with children are changed, the children do \
            not open any more until theirs are changed too (--parent-uuid, --parent-modification-uuid); children \
            are not searched for.

            EXAMPLES
              vdimg set --comment 'before the update' disk.vdi
              vdimg set --uuid random copy.vdi
              vdimg set --physical-geometry 1024/16/63 disk.vmdk
            """)

    @OptionGroup var image: ImageOptions
    @Option(help: "The comment; an empty one removes it.") var comment: String?
    @Option(help: ArgumentHelp("The image's UUID.", valueName: "UUID|random|none")) var uuid: UUIDArgument?
    @Option(help: ArgumentHelp("The UUID of its last modification.", valueName: "UUID|random|none"))
    var modificationUUID: UUIDArgument?
    @Option(help: ArgumentHelp("The parent's UUID, as the image records it.", valueName: "UUID|random|none"))
    var parentUUID: UUIDArgument?
    @Option(
        help: ArgumentHelp("The parent's modification UUID, as the image records it.", valueName: "UUID|random|none"))
    var parentModificationUUID: UUIDArgument?
    @Option(help: ArgumentHelp("The geometry of the disk as hardware.", valueName: "C/H/S"))
    var physicalGeometry: GeometryArgument?
    @Option(help: ArgumentHelp("The geometry as a BIOS shows it.", valueName: "C/H/S"))
    var logicalGeometry: GeometryArgument?
    @Flag(help: "Say nothing on success.") var quiet = false
    @Argument(help: "The image.", completion: .file()) var path: String

    private var changes: ImageChanges {
        var changes = ImageChanges()
        changes.metadata.comment = comment
        changes.metadata.uuid = uuid?.uuid
        changes.metadata.modificationUUID = modificationUUID?.uuid
        changes.metadata.parentUUID = parentUUID?.uuid
        changes.metadata.parentModificationUUID = parentModificationUUID?.uuid
        changes.metadata.physicalGeometry = physicalGeometry?.geometry
        changes.metadata.logicalGeometry = logicalGeometry?.geometry
        return changes
    }

    func validate() throws {
        if changes.isEmpty { throw ValidationError("say what shall be changed, as with --comment TEXT") }
    }

    func run() throws {
        let changes = changes  // each time another random UUID
        try reportingErrors { () throws(DiskError) in
            try ImageEditor.apply(changes, to: path, options: image.diskOptions(isWritable: true))
        }
        if !quiet { print("\(path): changed: \(changes.metadata.fields.names.joined(separator: ", "))".printable()) }
    }
}

/// A UUID, a new random one, or none.
struct UUIDArgument: ExpressibleByArgument {
    let uuid: DiskUUID

    init?(argument: String) {
        switch argument.lowercased() {
        case "random": uuid = .random()
        case "none": uuid = .null
        default:
            guard let value = DiskUUID(argument) else { return nil }
            uuid = value
        }
    }
}

/// Cylinders, heads and sectors.
struct GeometryArgument: ExpressibleByArgument {
    let geometry: DiskGeometry

    init?(argument: String) {
        guard let value = DiskGeometry(argument) else { return nil }
        geometry = value
    }
}
