internal import DiskImage
internal import DiskStorage

/// The kinds of VMDK that can be created, by the names they have in commands; the usual one first.
let vmdkVariants = VMDKVariant.allCases.map { FormatVariant($0.rawValue, $0.summary) }

enum VMDKVariant: String, CaseIterable, Sendable {
    case dynamic
    case fixed
    case split
    case splitFixed = "split-fixed"
    case stream
    case esx
    case esxSparse = "esx-sparse"
    case fullDevice = "full-device"
    case partitionedDevice = "partitioned-device"

    var summary: String {
        switch self {
        case .dynamic: "one file that grows (monolithicSparse)"
        case .fixed: "a file of the disk's size and a descriptor (monolithicFlat)"
        case .split: "files of 2 GiB at most that grow (twoGbMaxExtentSparse)"
        case .splitFixed: "files of 2 GiB at most, and a descriptor (twoGbMaxExtentFlat)"
        case .stream: "compressed, to be written once (streamOptimized)"
        case .esx: "a file of the disk's size and a descriptor, for ESX (vmfs)"
        case .esxSparse: "an ESX redo log: a file that grows, and a descriptor (vmfsSparse)"
        case .fullDevice: "a descriptor for a device (fullDevice); option device=PATH"
        case .partitionedDevice:
            "a descriptor for some partitions of a device (partitionedDevice); options device=PATH, partitions=1,3r"
        }
    }

    /// Whether an image of this kind can be the child of another.
    var canBeChild: Bool { [.dynamic, .split, .esxSparse].contains(self) }

    /// The variant of that name.
    init(named name: String) throws(DiskError) {
        guard let variant = VMDKVariant(rawValue: name.lowercased()) else {
            let known = Self.allCases.map(\.rawValue).joined(separator: ", ")
            throw DiskError(.invalidArgument, "VMDK has no variant '\(name)'; there are \(known)")
        }
        self = variant
    }
}

/// What a creation was asked for beside size and place, checked.
struct VMDKCreateOptions: Sendable {
    /// The controller: `ide`, `buslogic`, `lsilogic` or `legacyESX`.
    var adapterType = "ide"
    /// The version of VMware's virtual hardware.
    var hardwareVersion = 4
    /// Whether tables may mark grains as zeros.
    var zeroedGrain = false
    /// Sectors of a split image's extents at most; nil: 2 GiB.
    var splitSectors: UInt64?
    /// Whether flat extents take their space at once.
    var preallocates = true
    /// The device that the disk is or is a part of.
    var device: String?
    /// The partitions that the disk has.
    var partitions: [ChosenPartition] = []
    /// Whether the partitions' own devices are named, not places on the whole one.
    var usesPartitionDevices = false
    /// A file with the boot loader's code that the image gets instead of the device's.
    var bootSector: String?

    /// A partition of a device.
    struct ChosenPartition: Sendable, Equatable {
        let number: Int
        let isReadOnly: Bool

        /// `3`, or `3r` for one that is only read.
        init?(_ text: some StringProtocol) {
            isReadOnly = text.hasSuffix("r")
            guard let number = Int(isReadOnly ? text.dropLast() : text[...]), number > 0 else { return nil }
            self.number = number
        }
    }

    static let names = [
        "adapter-type", "boot-sector", "device", "hardware-version", "partitions", "preallocation", "relative",
        "split-size", "zeroed-grain",
    ]
    private static let adapterTypes = ["ide", "buslogic", "lsilogic", "legacyESX"]

    init(_ request: CreateRequest, _ variant: VMDKVariant) throws(DiskError) {
        if [.esx, .esxSparse].contains(variant) { adapterType = "lsilogic" }
        for (name, value) in request.options.sorted(by: { $0.key < $1.key }) { try set(name, value) }
        let isForDevice = [.fullDevice, .partitionedDevice].contains(variant)
        guard isForDevice == (device != nil) else {
            throw DiskError(
                .invalidArgument,
                isForDevice
                    ? "the variant '\(variant.rawValue)' needs the option device=PATH"
                    : "the option 'device' belongs to the variants full-device and partitioned-device")
        }
        guard (variant == .partitionedDevice) == !partitions.isEmpty else {
            throw DiskError(
                .invalidArgument, "the variant partitioned-device, and no other, needs the option partitions=1,3,…")
        }
        guard variant == .partitionedDevice || !usesPartitionDevices && bootSector == nil else {
            throw DiskError(
                .invalidArgument, "the options 'relative' and 'boot-sector' belong to the variant partitioned-device")
        }
    }

    private mutating func set(_ name: String, _ value: String) throws(DiskError) {
        let wrong = { (expected: String) in
            DiskError(.invalidArgument, "the option \(name)=\(value) cannot be: \(expected)")
        }
        switch name {
        case "adapter-type":
            guard let type = Self.adapterTypes.first(where: { hasSameLetters($0, value) }) else {
                throw wrong("it is one of \(Self.adapterTypes.joined(separator: ", "))")
            }
            adapterType = type
        case "hardware-version":
            guard let number = Int(value), (1...99).contains(number) else { throw wrong("it is a number from 1 to 99") }
            hardwareVersion = number
        case "zeroed-grain":
            guard let isOn = Self.flag(value) else { throw wrong("it is on or off") }
            zeroedGrain = isOn
        case "preallocation":
            guard ["full", "off"].contains(value) else { throw wrong("it is full or off") }
            preallocates = value == "full"
        case "split-size":
            guard let bytes = Self.byteCount(value), bytes % (64 << 10) == 0, bytes > 0 else {
                throw wrong("it is a number of bytes, a multiple of 64 KiB")
            }
            splitSectors = bytes / 512
        case "device": device = value
        case "partitions":
            let words = value.split(separator: ",", omittingEmptySubsequences: false)
            partitions = words.compactMap { ChosenPartition($0) }
            guard partitions.count == words.count, Set(partitions.map(\.number)).count == words.count else {
                throw wrong("it is a list of different numbers, such as 1,3r (r: read-only)")
            }
        case "relative":
            guard let isOn = Self.flag(value) else { throw wrong("it is on or off") }
            usesPartitionDevices = isOn
        case "boot-sector": bootSector = value
        default:
            throw DiskError(
                .invalidArgument,
                "VMDK has no option '\(name)'; there are \(Self.names.joined(separator: ", "))")
        }
    }

    private static func flag(_ text: String) -> Bool? {
        switch text.lowercased() {
        case "on", "yes", "true", "1": true
        case "off", "no", "false", "0": false
        default: nil
        }
    }

    /// A number of bytes, with K, M, G or T (of 1024) after it perhaps.
    private static func byteCount(_ text: String) -> UInt64? {
        let shift: UInt64? =
            switch text.utf8.last.map({ $0 & 0xdf }) {
            case UInt8(ascii: "K"): 10
            case UInt8(ascii: "M"): 20
            case UInt8(ascii: "G"): 30
            case UInt8(ascii: "T"): 40
            default: nil
            }
        guard let number = UInt64(shift == nil ? text[...] : text.dropLast()) else { return nil }
        let (bytes, overflow) = number.multipliedReportingOverflow(by: 1 << (shift ?? 0))
        return overflow ? nil : bytes
    }
}
