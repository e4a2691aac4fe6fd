import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// The images that other tools made, beside this project in `../shared/images` (its README.md says what they are), are
/// read as their makers meant them, and those made to do harm are refused.
struct RealImageTests {
    /// A line of the manifest.
    struct Image: Sendable, CustomTestStringConvertible {
        let format: String
        /// The path below the folder of the images; a file that is not there is kept as `PATH.xz`.
        let path: String
        let role: String
        let virtualSize: UInt64?
        /// The SHA-256 of the whole disk.
        let diskHash: String
        var testDescription: String { "\(path) (\(role))" }
        var folder: Substring { path[..<(path.lastIndex(of: "/") ?? path.startIndex)] }
    }

    static let folder = String(#filePath.prefix(upTo: #filePath.range(ofLast: "/Tests/"))) + "/../shared/images"
    static let isThere = unsafe access(folder + "/manifest.tsv", R_OK) == 0

    /// All images of formats that are known here.
    static let images: [Image] = manifest.filter {
        ["vmdk", "vdi", "vhd", "vhdx", "qcow2", "raw"].contains($0.format)
            && ["image", "truth", "hostile"].contains($0.role)
            && $0.path != emptyVHD
    }

    /// Nothing in it: 127 GiB of zeros take minutes to be hashed.
    private static let emptyVHD = "vhd/qemu/virtualpc-dynamic.vhd"

    private static let manifest: [Image] = {
        guard isThere, let file = try? FileStorage(path: folder + "/manifest.tsv", isWritable: false),
            let bytes = try? file.availableBytes(at: 0, count: 1 << 20, for: .guestData)
        else { return [] }
        return String(decoding: bytes, as: UTF8.self).split(separator: "\n").dropFirst().map { line in
            let fields = line.split(separator: "\t", omittingEmptySubsequences: false).map { String($0) }
            return Image(
                format: fields[0], path: fields[1], role: fields[2], virtualSize: UInt64(fields[5]),
                diskHash: fields[7])
        }
    }()

    @Test(
        .enabled(if: isThere, "the folder ../shared/images with images of other tools is not beside this project"),
        arguments: images)
    func imageOfAnotherToolIsReadOrRefused(_ image: Image) throws {
        let files = try TemporaryFolder()
        let path = try Self.unpack(image, into: files)
        let options = DiskOptions(format: image.format == "raw" ? "raw" : nil)
        if image.role == "hostile" {
            let start = ContinuousClock.now
            #expect(throws: DiskError.self) { try Disk.open(path, options: options) }
            #expect(ContinuousClock.now - start < .seconds(20))
            return
        }
        let disk = try Disk.open(path, options: options)
        #expect(image.virtualSize == nil || disk.size == image.virtualSize)
        #expect(try Self.hash(of: disk, using: files) == image.diskHash)
        try disk.close()
    }

    /// Virtual PC means its geometry, as QEMU reads it; by the footer's current size the disk is what other peers read.
    @Test(.enabled(if: isThere, "the folder ../shared/images with images of other tools is not beside this project"))
    func emptyImageOfVirtualPC() throws {
        let image = try #require(Self.manifest.first { $0.path == Self.emptyVHD })
        let files = try TemporaryFolder()
        let path = try Self.unpack(image, into: files)
        for (rule, size) in [nil: 136_363_130_880, "chs": 136_363_130_880, "current": 136_365_211_648] {
            var options = DiskOptions()
            if let rule { options.formatOptions["vhd-size"] = rule }
            let disk = try Disk.open(path, options: options)
            #expect(disk.size == size)
            #expect(try disk.nextData(from: 0) == nil)
            try disk.close()
        }
        #expect(image.virtualSize == 136_365_211_648)
    }

    /// Puts an image and the extents of its folder, or the images of its chain, into `files`, and answers its path
    /// there.
    private static func unpack(_ image: Image, into files: TemporaryFolder) throws -> String {
        let companions = manifest.filter {
            $0.folder == image.folder && $0.path != image.path
                && (["extent", "synthetic"].contains($0.role) || image.folder.hasSuffix("-chain"))
        }
        for file in [image] + companions {
            let name = file.path.dropFirst(image.folder.count + 1)
            let source = "\(folder)/\(file.path)"
            let isPacked = unsafe access(source, R_OK) != 0
            let command = isPacked ? "xz -dc '\(source).xz'" : "cat '\(source)'"
            let result = try Subprocess.run(["sh", "-c", "\(command) > '\(files.file(String(name)))'"])
            guard result.status == 0 else { throw DiskError(.system, "unpack \(source): \(result.errorText)") }
        }
        return files.file(String(image.path.dropFirst(image.folder.count + 1)))
    }

    /// The SHA-256 of all bytes of a disk, by the program sha256sum.
    private static func hash(of disk: Disk, using files: TemporaryFolder) throws -> String {
        let copy = try FileStorage(creating: files.file("disk.raw"))
        try copy.setLength(disk.size)
        let step: UInt64 = 1 << 20
        let zeros = [UInt8](repeating: 0, count: Int(step))
        for start in stride(from: 0, to: disk.size, by: Int(step)) {
            let bytes = try disk.read(at: start, count: Int(min(step, disk.size - start)))
            // What is zeros stays a hole: one of the disks has a gigabyte of them.
            if unsafe memcmp(bytes, zeros, bytes.count) != 0 { try copy.write(bytes, at: start, for: .guestData) }
        }
        let result = try Subprocess.run(["sha256sum", files.file("disk.raw")])
        guard result.status == 0 else { throw DiskError(.system, "sha256sum: \(result.errorText)") }
        return String(result.outputText.prefix(64))
    }
}

extension String {
    /// Where the last occurrence of `part` begins; the end if there is none.
    fileprivate func range(ofLast part: String) -> Index {
        var found = endIndex
        for index in indices where self[index...].hasPrefix(part) { found = index }
        return found
    }
}
