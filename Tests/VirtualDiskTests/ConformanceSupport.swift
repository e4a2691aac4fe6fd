import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// One way to make a disk: the images of a chain, the lowest first.
struct DiskKind: Sendable, CustomTestStringConvertible {
    /// One image.
    struct Image: Sendable {
        var file: String
        var variant: String?
        var size: Int
        var blockSize: UInt64?
        var options: [String: String] = [:]
        /// Made by qemu-img, as a compressed stream, from what the images below it hold.
        var isStream = false

        var isRaw: Bool { file.hasSuffix(".raw") }
    }

    let name: String
    let images: [Image]
    /// Whether qemu-img can read the chain too (it knows no VMDK over a raw image).
    var isReadByPeer = true
    var testDescription: String { name }

    var top: Image { images[images.count - 1] }
    /// What qemu-img calls the format of the top image.
    var peerFormat: String {
        let suffix = String(top.file.split(separator: ".").last ?? "")
        return ["vhd": "vpc"][suffix] ?? suffix
    }
    /// The unit at whose edges things go wrong.
    var blockSize: Int { Int(top.blockSize ?? (top.isRaw ? 4096 : 64 << 10)) }

    init(_ name: String, _ images: Image..., isReadByPeer: Bool = true) {
        self.name = name
        self.images = images
        self.isReadByPeer = isReadByPeer
    }

    /// How the top image is opened.
    func options(isWritable: Bool) -> DiskOptions {
        var options = DiskOptions(isWritable: isWritable, format: top.isRaw ? "raw" : nil)
        options.lazyFlushInterval = 0
        return options
    }

    /// Makes all images, with random content in all but the top one; answers the top one's path and what it shows.
    func make(
        in folder: TemporaryFolder, pool: RandomPool, using generator: inout SeededGenerator
    ) throws -> (path: String, model: DiskModel) {
        var model = DiskModel(size: 0)
        for (index, image) in images.enumerated() {
            let path = folder.file(image.file)
            let parent = index > 0 ? images[index - 1] : nil
            if image.isStream {
                model = randomContent(of: image.size, pool, &generator)
                try makeStream(image, path, model, folder)
                continue
            }
            var new = NewImage(path: path)
            new.size = UInt64(image.size)
            new.variant = image.variant
            new.blockSize = image.blockSize
            new.options = image.options
            new.parent = parent.map { folder.file($0.file) }
            new.parentFormat = parent?.isRaw == true ? "raw" : nil
            try new.create()
            model = model.resized(to: image.size)
            if index < images.count - 1 { try fill(image, path, &model, pool, &generator) }
        }
        return (folder.file(top.file), model)
    }

    private func randomContent(
        of size: Int, _ pool: RandomPool, _ generator: inout SeededGenerator
    ) -> DiskModel {
        var model = DiskModel(size: size)
        for _ in 0..<6 {
            let start = Int.random(in: 0..<size, using: &generator)
            model.write(pool.bytes(min(size - start, 100_000), using: &generator), at: start)
        }
        return model
    }

    private func makeStream(
        _ image: Image, _ path: String, _ model: DiskModel, _ folder: TemporaryFolder
    ) throws {
        let source = try folder.write(model.bytes, to: "stream-source.raw")
        if image.file.hasSuffix(".qcow2") {
            let type = image.options["compression_type"] ?? "zlib"
            try Peer.run(
                "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "compression_type=\(type)", source, path)
            return
        }
        try Peer.run(
            "qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", source, path)
    }

    private func fill(
        _ image: Image, _ path: String, _ model: inout DiskModel, _ pool: RandomPool,
        _ generator: inout SeededGenerator
    ) throws {
        var options = DiskOptions(isWritable: true, format: image.isRaw ? "raw" : nil)
        options.lazyFlushInterval = 0
        let disk = try Disk.open(path, options: options)
        for _ in 0..<12 {
            let start = Int.random(in: 0..<image.size, using: &generator)
            let count = min(image.size - start, Int.random(in: 1...60_000, using: &generator))
            let data = pool.bytes(count, using: &generator)
            try disk.write(data, at: UInt64(start))
            model.write(data, at: start)
        }
        try disk.close()
    }
}

/// Programs of others.
enum Peer {
    /// Runs one, and answers what it printed; one that fails is an error with its words.
    @discardableResult
    static func run(_ command: String...) throws -> String {
        let result = try Subprocess.run(command)
        guard result.status == 0 else {
            throw DiskError(
                .system,
                "\(command.joined(separator: " ")): status \(result.status), \(result.errorText)\(result.outputText)")
        }
        return result.outputText
    }

    /// qemu-img finds nothing wrong with an image and reads in it, with its parents, what `model` holds.
    static func expectAgreement(_ kind: DiskKind, _ path: String, _ model: DiskModel, _ context: String) throws {
        if path.hasSuffix(".vdi") { try VDIReader.expectAgreement(kind, path, model, context) }
        guard kind.isReadByPeer else { return }
        let copy = path + ".model"
        let storage = try FileStorage(creating: copy)
        try storage.write(model.bytes, at: 0, for: .guestData)
        let format = kind.peerFormat
        // qemu-img has no check of raw images and of VHD.
        if !["raw", "vpc"].contains(format) { try run("qemu-img", "check", "-q", "-f", format, path) }
        let result = try Subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", format, copy, path])
        #expect(result.status == 0, "\(context): \(result.outputText)\(result.errorText)")
    }
}

extension DiskKind {
    /// All kinds of disks.
    static let all = vmdk + vdi + vhd + vhdx + qed + qcow2

    /// Of sizes that are no multiple of their blocks where the kind permits it.
    private static let vmdk: [DiskKind] = {
        let odd = (1 << 20) + 5 * 512
        let whole = 1 << 20
        let small = (300 << 10) + 512
        return [
            DiskKind("raw", Image(file: "top.raw", size: odd)),
            DiskKind("dynamic, 64 KiB grains", Image(file: "top.vmdk", variant: "dynamic", size: odd)),
            DiskKind("dynamic, 4 KiB grains", Image(file: "top.vmdk", variant: "dynamic", size: odd, blockSize: 4096)),
            DiskKind(
                "dynamic, 4 KiB grains, zero grains",
                Image(
                    file: "top.vmdk", variant: "dynamic", size: odd, blockSize: 4096,
                    options: ["zeroed-grain": "on"])),
            DiskKind(
                "dynamic, 1 MiB grains", Image(file: "top.vmdk", variant: "dynamic", size: odd, blockSize: 1 << 20)),
            DiskKind("fixed", Image(file: "top.vmdk", variant: "fixed", size: odd)),
            DiskKind("ESX flat", Image(file: "top.vmdk", variant: "esx", size: odd)),
            DiskKind(
                "split",
                Image(
                    file: "top.vmdk", variant: "split", size: odd, blockSize: 8192,
                    options: ["split-size": "262144"])),
            DiskKind(
                "split fixed",
                Image(file: "top.vmdk", variant: "split-fixed", size: odd, options: ["split-size": "262144"])),
            DiskKind(
                "ESX sparse, 512-byte grains",
                Image(file: "top.vmdk", variant: "esx-sparse", size: small, blockSize: 512)),
            DiskKind(
                "ESX sparse child over ESX sparse",
                Image(file: "base.vmdk", variant: "esx-sparse", size: whole, blockSize: 8192),
                Image(file: "top.vmdk", variant: "esx-sparse", size: whole, blockSize: 4096)),
            DiskKind(
                "small grains over large ones",
                Image(file: "base.vmdk", variant: "dynamic", size: odd),
                Image(file: "top.vmdk", variant: "dynamic", size: odd, blockSize: 4096)),
            DiskKind(
                "large grains over small ones",
                Image(file: "base.vmdk", variant: "dynamic", size: odd, blockSize: 4096),
                Image(file: "top.vmdk", variant: "dynamic", size: odd)),
            DiskKind(
                "zero grains over a split base",
                Image(
                    file: "base.vmdk", variant: "split", size: whole, blockSize: 8192,
                    options: ["split-size": "262144"]),
                Image(
                    file: "top.vmdk", variant: "dynamic", size: whole, blockSize: 16 << 10,
                    options: ["zeroed-grain": "on"])),
            DiskKind(
                "over a smaller base",
                Image(file: "base.vmdk", variant: "dynamic", size: small, blockSize: 4096),
                Image(file: "top.vmdk", variant: "dynamic", size: odd)),
            DiskKind(
                "over a larger base",
                Image(file: "base.vmdk", variant: "dynamic", size: odd),
                Image(file: "top.vmdk", variant: "split", size: small, blockSize: 4096)),
            DiskKind(
                "over a fixed base",
                Image(file: "base.vmdk", variant: "fixed", size: odd),
                Image(file: "top.vmdk", variant: "dynamic", size: odd)),
            DiskKind(
                "over a compressed stream",
                Image(file: "base.vmdk", size: odd, isStream: true),
                Image(file: "top.vmdk", variant: "dynamic", size: odd, blockSize: 4096)),
            DiskKind(
                "VMDK over a raw base",
                Image(file: "base.raw", size: small),
                Image(file: "top.vmdk", variant: "dynamic", size: odd), isReadByPeer: false),
            DiskKind(
                "overlay over grains",
                Image(file: "base.vmdk", variant: "dynamic", size: odd, blockSize: 4096),
                Image(file: "top.overlay", size: odd), isReadByPeer: false),
            DiskKind(
                "overlay of 4 KiB blocks over a smaller raw base",
                Image(file: "base.raw", size: small),
                Image(file: "top.overlay", size: odd, blockSize: 4096), isReadByPeer: false),
            DiskKind(
                "four images of four kinds",
                Image(file: "base.vmdk", variant: "fixed", size: whole),
                Image(file: "second.vmdk", variant: "split", size: small, blockSize: 4096),
                Image(file: "third.vmdk", variant: "esx-sparse", size: odd, blockSize: 1024),
                Image(file: "top.vmdk", variant: "dynamic", size: odd, blockSize: 32 << 10)),
        ]
    }()
}
