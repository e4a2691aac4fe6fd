internal import DiskImage
internal import DiskStorage

/// Creates an image of one of the ``vmdkVariants``. All its files are new and flushed when this returns; when it
/// throws, the caller removes those that it has made.
func createVMDK(_ request: CreateRequest, companions: any CompanionOpener) throws(DiskError) {
    try VMDKCreator(request, companions).create()
}

/// Makes the files of a new image. What makes them an image, the descriptor, is written last.
struct VMDKCreator {
    let request: CreateRequest
    let companions: any CompanionOpener
    let variant: VMDKVariant
    let options: VMDKCreateOptions
    /// The file's name without its folder.
    let fileName: String
    /// What the other files' names begin with: the file's name without `.vmdk`.
    let baseName: String
    /// Sectors of the disk; 0 where a device says it.
    let sectorCount: UInt64

    /// Sectors of a split image's extent: 2 GiB, as QEMU makes them (VMware: 64 KiB less than 2 GiB, VirtualBox both).
    static let usualSplitSectors: UInt64 = 2 << 21
    /// The same where nobody asked for a split image and the disk is too large for one sparse file.
    private static let largeSplitSectors: UInt64 = 1 << 31

    init(_ request: CreateRequest, _ companions: any CompanionOpener) throws(DiskError) {
        self.request = request
        self.companions = companions
        fileName = Self.fileName(of: request.path)
        baseName = Self.baseName(of: request.path)
        guard !fileName.isEmpty, !fileName.utf8.contains(where: { $0 < 32 || $0 == UInt8(ascii: "\"") }) else {
            throw DiskError(
                .invalidArgument,
                "a VMDK's file name cannot hold quotation marks or control characters: '\(clipped(fileName))'")
        }
        guard request.virtualSize % 512 == 0, request.virtualSize / 512 <= VMDKExtentDescription.sectorLimit else {
            throw DiskError(
                .invalidArgument,
                "a disk of \(request.virtualSize) bytes cannot be: it must be a multiple of 512, below 2^63")
        }
        sectorCount = request.virtualSize / 512
        var variant = try request.variant.map { (name) throws(DiskError) in try VMDKVariant(named: name) } ?? .dynamic
        var options = try VMDKCreateOptions(request, variant)
        if request.variant == nil,
            !VMDKSparseLayout.fits(sectorCount, options, try Self.grainSectors(request, .dynamic))
        {
            variant = .split
            options.splitSectors = options.splitSectors ?? Self.largeSplitSectors
        }
        self.variant = variant
        self.options = options
        guard request.parent == nil || variant.canBeChild else {
            let possible = VMDKVariant.allCases.filter(\.canBeChild).map(\.rawValue).joined(separator: ", ")
            throw DiskError(
                .invalidArgument,
                "the variant '\(variant.rawValue)' cannot have a parent; those that can are \(possible)")
        }
        guard sectorCount > 0 || options.device != nil else {
            throw DiskError(.invalidArgument, "a disk needs a size: at least 512 bytes")
        }
    }

    /// A path's last component.
    static func fileName(of path: String) -> String {
        path.utf8.lastIndex(of: UInt8(ascii: "/")).map { String(path[path.utf8.index(after: $0)...]) } ?? path
    }

    /// What the names of an image's other files begin with: its file's name without `.vmdk`.
    static func baseName(of path: String) -> String {
        let name = fileName(of: path)
        return hasSameLetters(name.suffix(5), ".vmdk") ? String(name.dropLast(5)) : name
    }

    func create() throws(DiskError) {
        switch variant {
        case .dynamic: try createMonolithicSparse()
        case .fixed: try createFlat(.monolithicFlat)
        case .split: try createSplitSparse()
        case .splitFixed: try createFlat(.twoGbMaxExtentFlat)
        case .stream: try createStream()
        case .esx: try createFlat(.vmfs)
        case .esxSparse: try createESXSparse()
        case .fullDevice: try createFullDevice()
        case .partitionedDevice: try createPartitionedDevice()
        }
    }

    /// The grain size that was asked for, in sectors; 64 KiB if none was.
    static func grainSectors(_ request: CreateRequest, _ variant: VMDKVariant) throws(DiskError) -> UInt64 {
        let size = request.blockSize ?? 64 << 10
        let limits: ClosedRange<UInt64> = variant == .esxSparse ? 512...1 << 20 : 4 << 10...2 << 20
        guard size.isPowerOfTwo, limits.contains(size) else {
            throw DiskError(
                .invalidArgument,
                "a grain of \(size) bytes cannot be: a power of two from \(limits.lowerBound) to \(limits.upperBound)")
        }
        return size / 512
    }

    /// The descriptor of the new image, with all that does not depend on the kind of image.
    func descriptor(
        _ createType: VMDKCreateType, _ extents: [VMDKExtentDescription]
    ) throws(DiskError) -> VMDKDescriptor {
        var text = VMDKDescriptor(createType: createType, extents: extents)
        if let parent = request.parent {
            text.parentContentID = try VMDKDescriptor.parentContentID(of: parent)
            text.parentFileNameHint = parent.path
        }
        text.adapterType = options.adapterType
        text.geometry = .vmdk(sectorCount: text.sectorCount, adapterType: options.adapterType)
        text.uuid = request.uuid ?? .random()
        text.modificationUUID = .random()
        text.parentUUID = request.parent?.identity.uuid
        text.parentModificationUUID = request.parent?.identity.modificationUUID
        text.setDiskDatabase("virtualHWVersion", String(options.hardwareVersion))
        if let comment = request.comment, !comment.isEmpty { text.comment = comment }
        return text
    }

    /// Creates one of the image's files.
    func createFile(_ name: String) throws(DiskError) -> any Storage {
        try companions.createCompanion(name, of: request.path).storage
    }

    /// Creates the file that is the descriptor alone, makes the extents in between, and writes it.
    func createDescriptorFile(
        _ makeExtents: () throws(DiskError) -> VMDKDescriptor
    ) throws(DiskError) {
        let file = try createFile(fileName)
        let text = try makeExtents().encoded()
        try file.write(text, at: 0, for: .descriptor)
        try file.flush()
    }
}

extension DiskGeometry {
    /// The geometry that VMware's products give a disk of that size on that controller.
    ///
    /// IDE: 16 heads and 63 sectors, up to ATA's limit of 16,383 cylinders. SCSI (BusLogic and LSI Logic BIOSes): 64
    /// heads and 32 sectors below 1 GiB, 128 and 32 up to 2 GiB, 255 and 63 above.
    static func vmdk(sectorCount: UInt64, adapterType: String) -> DiskGeometry {
        if adapterType == "ide" {
            return DiskGeometry(cylinders: min(max(sectorCount / (16 * 63), 1), 16_383), heads: 16, sectors: 63)
        }
        let (heads, sectors): (UInt64, UInt64) =
            switch sectorCount {
            case ..<(1 << 21): (64, 32)
            case ...(2 << 21): (128, 32)
            default: (255, 63)
            }
        return DiskGeometry(cylinders: max(sectorCount / (heads * sectors), 1), heads: heads, sectors: sectors)
    }
}
