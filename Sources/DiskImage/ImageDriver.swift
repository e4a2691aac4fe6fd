public import DiskStorage

/// What can be done with a format's images.
public struct FormatCapabilities: OptionSet, Sendable {
    public let rawValue: UInt32
    public init(rawValue: UInt32) { self.rawValue = rawValue }

    public static let read = FormatCapabilities(rawValue: 1 << 0)
    public static let write = FormatCapabilities(rawValue: 1 << 1)
    public static let createFixed = FormatCapabilities(rawValue: 1 << 2)
    public static let createDynamic = FormatCapabilities(rawValue: 1 << 3)
    public static let createSplit = FormatCapabilities(rawValue: 1 << 4)
    public static let differencing = FormatCapabilities(rawValue: 1 << 5)
    public static let discard = FormatCapabilities(rawValue: 1 << 6)
    public static let check = FormatCapabilities(rawValue: 1 << 7)
    public static let compressed = FormatCapabilities(rawValue: 1 << 8)
    public static let stream = FormatCapabilities(rawValue: 1 << 9)
    public static let snapshots = FormatCapabilities(rawValue: 1 << 10)
    /// Disks can be made larger or smaller.
    public static let resize = FormatCapabilities(rawValue: 1 << 11)
    /// Images can be made smaller where they lie.
    public static let compact = FormatCapabilities(rawValue: 1 << 12)
    /// Images have UUIDs.
    public static let uuids = FormatCapabilities(rawValue: 1 << 13)

    /// The names for people and machines, in order.
    public var names: [String] {
        let all: [(FormatCapabilities, String)] = [
            (.read, "read"), (.write, "write"), (.createFixed, "create-fixed"), (.createDynamic, "create-dynamic"),
            (.createSplit, "create-split"), (.differencing, "differencing"), (.discard, "discard"),
            (.check, "check"), (.compressed, "compressed"), (.stream, "stream"), (.snapshots, "snapshots"),
            (.resize, "resize"), (.compact, "compact"), (.uuids, "uuids"),
        ]
        return all.filter { contains($0.0) }.map(\.1)
    }
}

/// How an image is opened.
public enum OpenMode: Sendable {
    /// To read the disk; changes no byte of the file.
    case readOnly
    /// To read and write the disk.
    case readWrite
    /// To ask for properties; extents that are missing are no error.
    case information
}

/// What a driver needs to open an image.
public struct OpenRequest: Sendable {
    /// The file that was named.
    public let storage: any Storage
    /// Its path, for messages and for what lies beside it.
    public let path: String
    public let mode: OpenMode
    /// Where the image's tables are cached.
    public let cache: TableCache
    /// The way to the other files of the image.
    public let companions: any CompanionOpener
    /// Whether the image may be taken over as it is although it was not closed cleanly (its checker opens it).
    public let skipsConsistencyChecks: Bool
    /// What one format alone understands, by name (`vhd-size`); the others do not look at it.
    public let formatOptions: [String: String]
    /// The name or ID of the internal snapshot that is wanted instead of the image's present state; only drivers with
    /// ``FormatCapabilities/snapshots`` are asked for one, and only for reading.
    public let snapshot: String?
    /// Whether ``ImageBackend/beginWriting()`` leaves alone what children compare (VMDK's CID, modification UUIDs,
    /// VHDX's DataWriteGuid): for who writes to an image what its children show there anyway, so that the chain belongs
    /// together also in between.
    public let keepsIdentity: Bool

    public init(
        storage: any Storage, path: String, mode: OpenMode, cache: TableCache, companions: any CompanionOpener,
        skipsConsistencyChecks: Bool = false, formatOptions: [String: String] = [:], snapshot: String? = nil,
        keepsIdentity: Bool = false
    ) {
        self.storage = storage
        self.path = path
        self.mode = mode
        self.cache = cache
        self.companions = companions
        self.skipsConsistencyChecks = skipsConsistencyChecks
        self.formatOptions = formatOptions
        self.snapshot = snapshot
        self.keepsIdentity = keepsIdentity
    }

    /// The same request by a checker, to which nothing is refused that it is to look at.
    public var withoutConsistencyChecks: OpenRequest {
        OpenRequest(
            storage: storage, path: path, mode: mode, cache: cache, companions: companions,
            skipsConsistencyChecks: true, formatOptions: formatOptions, snapshot: snapshot,
            keepsIdentity: keepsIdentity)
    }

    /// Whether files are opened for writing.
    public var isWritable: Bool { mode == .readWrite }
}

/// Opens the files that an image names beside itself (extents), after checking that it may.
public protocol CompanionOpener: Sendable {
    /// Opens what the image at `imagePath` calls `name`, and answers its path too. `what` says what it is, for
    /// messages.
    func openCompanion(
        _ name: String, of imagePath: String, isWritable: Bool, what: String
    ) throws(DiskError) -> (storage: any Storage, path: String)
    /// Creates a new file of an image that is being made at `imagePath`, and answers its full path too; `name` has no
    /// folder part.
    func createCompanion(_ name: String, of imagePath: String) throws(DiskError) -> (storage: any Storage, path: String)
    /// Removes a file that the image at `imagePath` no longer names; one that is not there is no error.
    func removeCompanion(_ name: String, of imagePath: String) throws(DiskError)
    /// Whether a name is the address of a storage that is no file, and which may be opened if the user permits it.
    func isAddress(_ name: String) -> Bool
}

extension CompanionOpener {
    public func isAddress(_ name: String) -> Bool { false }
}

/// What a new image shall be.
public struct CreateRequest: Sendable {
    /// Where: the file does not exist yet.
    public var path: String
    /// The size of the disk in bytes.
    public var virtualSize: UInt64
    /// The format's name for the kind of image; nil: its usual one.
    public var variant: String?
    /// The unit of allocation in bytes; nil: the format's usual one.
    public var blockSize: UInt64?
    /// The parent, for a differencing image.
    public var parent: ParentDescription?
    public var comment: String?
    public var uuid: DiskUUID?
    /// What the format alone understands, by name (`adapter-type`, `split-size`, `device`, …).
    public var options: [String: String]

    /// What is recorded of a parent.
    public struct ParentDescription: Sendable {
        /// The path as the child shall name it.
        public var path: String
        /// The path from the child's folder, with `..` where it must; ``path`` if that is not known.
        public var relativePath: String
        /// The whole path, with all links resolved; ``path`` if that is not known.
        public var absolutePath: String
        public var format: String
        public var identity: ImageIdentity
        /// The size of its disk in bytes.
        public var virtualSize: UInt64
        /// When its files were changed last, in nanoseconds since 1970, where that is known.
        public var modified: Int64?
        /// The bytes of a sector of its disk.
        public var sectorSize: UInt32 = 512

        public init(
            path: String, relativePath: String? = nil, absolutePath: String? = nil, format: String,
            identity: ImageIdentity, virtualSize: UInt64 = 0, modified: Int64? = nil
        ) {
            self.path = path
            self.relativePath = relativePath ?? path
            self.absolutePath = absolutePath ?? path
            self.format = format
            self.identity = identity
            self.virtualSize = virtualSize
            self.modified = modified
        }
    }

    public init(
        path: String, virtualSize: UInt64, variant: String? = nil, blockSize: UInt64? = nil,
        parent: ParentDescription? = nil, comment: String? = nil, uuid: DiskUUID? = nil, options: [String: String] = [:]
    ) {
        self.path = path
        self.virtualSize = virtualSize
        self.variant = variant
        self.blockSize = blockSize
        self.parent = parent
        self.comment = comment
        self.uuid = uuid
        self.options = options
    }
}

/// A kind of image that a format can create.
public struct FormatVariant: Sendable {
    public let name: String
    public let summary: String

    public init(_ name: String, _ summary: String) {
        self.name = name
        self.summary = summary
    }
}

/// A format: recognises, opens and creates its images.
public protocol ImageDriver: Sendable {
    /// The name in commands and messages: lower case.
    var name: String { get }
    /// The name for people.
    var title: String { get }
    /// File name extensions, without dot, in lower case.
    var fileExtensions: [String] { get }
    var capabilities: FormatCapabilities { get }
    /// What ``create(_:companions:)`` knows as variants, the usual one first.
    var variants: [FormatVariant] { get }
    /// The options that it knows, of one variant or another: ``CreateRequest/options``.
    var optionNames: [String] { get }
    /// Whether what ``open(_:)`` answers is a ``RelocatingBackend``.
    var isRelocating: Bool { get }

    /// How sure the driver is that the file is its own, by content alone.
    func probe(_ file: ProbedFile) throws(DiskError) -> ProbeResult
    /// Opens an image.
    func open(_ request: OpenRequest) throws(DiskError) -> any ImageBackend
    /// Creates an image and closes it; on failure nothing is left behind.
    func create(_ request: CreateRequest, companions: any CompanionOpener) throws(DiskError)
    /// Checks the structure of an image, and repairs it if the request says so.
    func check(_ request: OpenRequest, repair: Bool) throws(DiskError) -> CheckReport
}

extension ImageDriver {
    public var optionNames: [String] { [] }

    public var isRelocating: Bool { false }
}

/// A driver's answer to "is this yours?".
public enum ProbeResult: Int, Comparable, Sendable {
    case no
    /// Nothing speaks against it (raw).
    case possible
    /// A magic number is there.
    case certain

    public static func < (a: ProbeResult, b: ProbeResult) -> Bool { a.rawValue < b.rawValue }
}

/// The beginning and the end of a file, for probing.
public struct ProbedFile: Sendable {
    /// The first bytes, at most 4096.
    public let head: [UInt8]
    /// The last bytes, at most 1536.
    public let tail: [UInt8]
    /// The length in bytes.
    public let length: UInt64

    public init(_ storage: any Storage) throws(DiskError) {
        length = try storage.length()
        head = try storage.availableBytes(at: 0, count: 4096, for: .header)
        tail = try storage.availableBytes(at: length - min(length, 1536), count: 1536, for: .footer)
    }
}
