import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// What the tests that go over all formats need to know of one: how its images are made, by us and by others, and who
/// can judge them. Every format of the library has a row; ``FormatMatrixTests`` says so if one has none.
struct FormatRow: Sendable, CustomTestStringConvertible {
    /// One way in which we make an image.
    struct Making: Sendable {
        var variant: String?
        var blockSize: UInt64?
        var options: [String: String] = [:]
    }

    /// The name in the library, which is the extension of its files too.
    let format: String
    /// What QEMU calls it; nil: it does not know it.
    var peer: String?
    /// Whether `qemu-img check` knows it.
    var isCheckedByPeer = true
    /// The ways in which we make it; the first is the one that chains are made with.
    var ours: [Making] = []
    /// How it has the most tables for its size.
    var dense = Making(blockSize: 4096)
    /// The ways in which `qemu-img create` makes it, as it wants to be told with `-o`.
    var theirs: [String] = []
    /// How we make a child; nil: the format names no parents.
    var child: Making?
    /// Other ways to make one, whose changes of size are not alike.
    var otherChildren: [Making] = []
    /// Whether a child knows its parent by UUID alone, so that it can only be made over one that has a UUID.
    var linksByUUIDAlone = false
    /// The formats (ours) of parents with which QEMU reads our children as we do.
    var peerParents: Set<String> = []
    /// What QEMU's writes to our children begin and end at multiples of.
    var peerUnitInChildren = 512
    /// A second reader, written for these tests: the script in `Tests/Readers` that is called as
    /// `SCRIPT flatten IMAGE RAW` for images over images of the same format.
    var reader: String?
    /// A program of libyal that shows an image, or with `mountsChains` a chain, as a file.
    var mounter: (program: String, prefix: String)?
    var mountsChains = false
    /// Whether that program understands an image; nil: all of the format.
    var mounterReads: (@Sendable (String) throws -> Bool)?
    /// Whether an image is only opened when its format is named.
    var mustBeNamed = false
    /// Whether we write it.
    var isWritable = true

    var testDescription: String { format }

    /// The name of the image of that name.
    func file(_ name: String) -> String { "\(name).\(format)" }

    /// How its images are opened.
    func options(isWritable: Bool) -> DiskOptions {
        var options = DiskOptions(isWritable: isWritable, format: mustBeNamed ? format : nil)
        options.lazyFlushInterval = 0
        return options
    }
}

extension FormatRow {
    /// The rows of the formats that this build of the library has.
    static let all = rows.filter { row in ImageFormats.all.contains { $0.name == row.format } }

    /// All rows that were written.
    static let rows = [vmdk, vdi, vhd, vhdx, qed, qcow2, qcow, overlay, raw]

    private static let vmdk = FormatRow(
        format: "vmdk", peer: "vmdk",
        ours: [
            Making(), Making(blockSize: 4096), Making(blockSize: 8192, options: ["zeroed-grain": "on"]),
            Making(variant: "split", options: ["split-size": "1048576"]), Making(variant: "fixed"),
            Making(variant: "split-fixed", options: ["split-size": "1048576"]), Making(variant: "esx"),
            Making(variant: "esx-sparse", blockSize: 4096),
        ],
        theirs: [
            "subformat=monolithicSparse", "subformat=monolithicFlat", "subformat=twoGbMaxExtentSparse",
            "subformat=twoGbMaxExtentFlat", "subformat=monolithicSparse,zeroed_grain=on",
        ],
        child: Making(),
        otherChildren: [
            Making(blockSize: 8192, options: ["zeroed-grain": "on"]),
            Making(variant: "split", options: ["split-size": "1048576"]),
            Making(variant: "esx-sparse", blockSize: 4096),
        ],
        peerParents: ["vmdk"])

    private static let vdi = FormatRow(
        format: "vdi", peer: "vdi",
        ours: [Making(), Making(variant: "fixed")],
        theirs: ["static=off", "static=on"],
        child: Making(), linksByUUIDAlone: true, reader: "vdi.py")

    private static let vhd = FormatRow(
        format: "vhd", peer: "vpc", isCheckedByPeer: false,
        ours: [Making(), Making(variant: "fixed")],
        theirs: ["subformat=dynamic,force_size=on", "subformat=dynamic", "subformat=fixed,force_size=on"],
        // (vhdimount lets what a child holds end at multiples of eight sectors alone: see VHDReaderTests.)
        child: Making(), reader: "vhd.py", mounter: ("vhdimount", "vhdi"))

    private static let vhdx = FormatRow(
        format: "vhdx", peer: "vhdx",
        ours: [
            Making(blockSize: 1 << 20), Making(), Making(variant: "fixed", blockSize: 2 << 20),
        ],
        dense: Making(blockSize: 1 << 20),
        theirs: [
            "subformat=dynamic", "subformat=dynamic,block_size=1048576,block_state_zero=off",
            "subformat=fixed,block_size=2097152,log_size=2097152",
        ],
        child: Making(), reader: "vhdx.py", mounter: ("vhdimount", "vhdi"))

    private static let qed = FormatRow(
        format: "qed", peer: "qed",
        ours: [
            Making(), Making(blockSize: 4096, options: ["table-size": "2"]),
            Making(blockSize: 1 << 20, options: ["table-size": "16"]),
        ],
        dense: Making(blockSize: 4096, options: ["table-size": "16"]),
        theirs: ["cluster_size=65536", "cluster_size=4096,table_size=2", "cluster_size=2097152,table_size=8"],
        child: Making(), peerParents: ["qed", "vmdk", "vdi", "qcow2", "raw"],
        // It completes a zero cluster from the backing file, where the specification says zeros.
        peerUnitInChildren: 64 << 10)

    private static let qcow2 = FormatRow(
        format: "qcow2", peer: "qcow2",
        ours: [
            Making(), Making(blockSize: 4096), Making(blockSize: 4096, options: ["compat": "0.10"]),
            Making(blockSize: 512, options: ["refcount-bits": "64"]),
            Making(blockSize: 2 << 20, options: ["lazy-refcounts": "on", "refcount-bits": "1"]),
            Making(blockSize: 64 << 10, options: ["extended-l2": "on", "compression-type": "zstd"]),
            Making(variant: "metadata"), Making(variant: "fixed"),
            Making(options: ["data-file": "base.data"]),
            Making(options: ["data-file": "base.data", "data-file-raw": "on"]),
        ],
        theirs: [
            "compat=1.1", "compat=0.10", "cluster_size=4096", "cluster_size=512", "cluster_size=2097152",
            "lazy_refcounts=on", "extended_l2=on", "refcount_bits=1", "refcount_bits=64",
            "preallocation=metadata",
        ],
        child: Making(), peerParents: ["qcow2", "qed", "vmdk", "vdi", "raw"], mounter: ("qcowmount", "qcow"),
        // libqcow knows no incompatible feature, and takes clusters of zeros that have a place for what is stored
        // there.
        mounterReads: { path in
            let file = try FileStorage(path: path, isWritable: false)
            let head = try file.bytes(at: 0, count: 80, for: .header, "the header")
            guard head[7] == 2 || head[72...].allSatisfy({ $0 == 0 }) else { return false }
            let map = try Peer.run("qemu-img", "map", "--output=json", path)
            return !map.contains("\"present\": true, \"zero\": true")
        })

    private static let qcow = FormatRow(
        format: "qcow", peer: "qcow", isCheckedByPeer: false, theirs: [""], mounter: ("qcowmount", "qcow"),
        isWritable: false)

    private static let overlay = FormatRow(format: "overlay", child: Making())

    private static let raw = FormatRow(
        format: "raw", peer: "raw", isCheckedByPeer: false, ours: [Making(), Making(variant: "fixed")],
        dense: Making(), theirs: ["preallocation=off"], mustBeNamed: true)
}

/// Who can say what an image holds, besides the code that is tested.
enum Judge {
    /// Compares an image, over images of the formats in `below`, with what it must hold, by all who can; answers how
    /// many did.
    static func compare(
        _ row: FormatRow, _ path: String, over below: [FormatRow], with model: DiskModel, in folder: TemporaryFolder
    ) throws -> Int {
        let raw = folder.file("judge.raw")
        let storage = try FileStorage(creating: raw)
        defer { unsafe unlink(raw) }
        try storage.write(model.bytes, at: 0, for: .guestData)
        var judges = 0
        if let peer = row.peer, canFollow(row, below) {
            if row.isCheckedByPeer { try Peer.run("qemu-img", "check", "-q", "-f", peer, path) }
            try Peer.run("qemu-img", "compare", "-q", "-f", "raw", "-F", peer, raw, path)
            judges += 1
        }
        if let reader = row.reader, below.allSatisfy({ $0.format == row.format }) {
            let flat = folder.file("judge-flat.raw")
            try Peer.run("python3", script(reader), "flatten", path, flat)
            try Peer.run("cmp", flat, raw)
            unsafe unlink(flat)
            judges += 1
        }
        if let mounter = row.mounter, below.isEmpty || row.mountsChains, canMount,
            below.allSatisfy({ $0.format == row.format }), try row.mounterReads?(path) ?? true
        {
            try compareMounted(mounter, path, count: below.count + 1, raw, folder)
            judges += 1
        }
        return judges
    }

    /// Whether QEMU follows the chain as we do.
    static func canFollow(_ row: FormatRow, _ below: [FormatRow]) -> Bool {
        var child = row
        for parent in below {
            guard parent.peer != nil, child.peerParents.contains(parent.format) else { return false }
            child = parent
        }
        return child.peer != nil
    }

    private static let canMount = unsafe getuid() == 0 && access("/dev/fuse", R_OK | W_OK) == 0

    /// libyal's programs show each image of a chain, with all below it, as a file; the last is the top.
    private static func compareMounted(
        _ mounter: (program: String, prefix: String), _ path: String, count: Int, _ raw: String,
        _ folder: TemporaryFolder
    ) throws {
        let place = folder.file("judge-mount")
        try Peer.run("mkdir", "-p", place)
        try Peer.run(mounter.program, path, place)
        defer { _ = try? Subprocess.run(["umount", place]) }
        try Peer.run("cmp", "\(place)/\(mounter.prefix)\(count)", raw)
    }

    private static func script(_ name: String) -> String {
        var path = String(#filePath)
        while !path.hasSuffix("/Tests/"), !path.isEmpty { path.removeLast() }
        return path + "Readers/" + name
    }
}
