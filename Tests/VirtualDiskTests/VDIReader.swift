import DiskImage
import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// A second reader of VDI, in Python, which shares nothing with the code that is tested: no other program here reads
/// differencing VDIs, or ones with small blocks.
enum VDIReader {
    private static let script: String = {
        let marker = "/Tests/"
        var path = String(#filePath)
        while !path.hasSuffix(marker), !path.isEmpty { path.removeLast() }
        return path + "Readers/vdi.py"
    }()

    /// Runs it; one that fails is an error with its words.
    @discardableResult
    static func run(_ arguments: [String]) throws -> String {
        let result = try Subprocess.run(["/usr/bin/python3", script] + arguments)
        guard result.status == 0 else {
            throw DiskError(.system, "vdi.py \(arguments.joined(separator: " ")): \(result.errorText)")
        }
        return result.outputText
    }

    /// An image's blocks are where they may be; of one that was closed, without gaps and counted right.
    static func check(_ path: String, isOpen: Bool = false) throws {
        try run(["check", path] + (isOpen ? ["--open"] : []))
    }

    /// What the disk of a chain holds. `raws`: files that hold what images of other formats show, by their UUIDs.
    static func flatten(
        _ path: String, folders: [String] = [], raws: [String: String] = [:], in folder: TemporaryFolder
    ) throws -> [UInt8] {
        let out = folder.file("flat-\(UInt64.random(in: 0 ... .max)).raw")
        try run(
            ["flatten", path, out] + folders.flatMap { ["--folder", $0] }
                + raws.flatMap { ["--raw", "\($0.key)=\($0.value)"] })
        let file = try FileStorage(path: out, isWritable: false)
        unsafe unlink(out)
        return try file.availableBytes(at: 0, count: Int(file.length()), for: .guestData)
    }

    /// The header's fields by their names.
    static func fields(_ path: String) throws -> [String: String] {
        let pairs = try run(["info", path]).split(separator: "\n").map { line in
            let parts = line.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
            return (String(parts[0]), String(parts[1]))
        }
        return Dictionary(pairs) { first, _ in first }
    }

    /// The image is as the format says, and the reader sees in it, with its parents, what `model` holds.
    static func expectAgreement(_ kind: DiskKind, _ path: String, _ model: DiskModel, _ context: String) throws {
        do {
            try check(path)
            let folder = try TemporaryFolder()
            // What lies below and is no VDI is read by its own reader.
            var raws: [String: String] = [:]
            if let other = kind.images.last(where: { !$0.file.hasSuffix(".vdi") }) {
                guard let uuid = try ImageIdentities.uuid(besides: path, other.file) else { return }
                raws[uuid] = folder.file("other.raw")
                try Peer.run(
                    "qemu-img", "convert", "-O", "raw", besides(path, other.file), folder.file("other.raw"))
            }
            let found = try flatten(path, raws: raws, in: folder)
            #expect(found.count == model.size, "\(context): the reader sees \(found.count) bytes")
            guard found.count == model.size else { return }
            if let mistake = model.mistake(in: found, at: 0) {
                Issue.record("\(context): the reader in Python: \(mistake)")
            }
        } catch {
            Issue.record("\(context): \(error)")
        }
    }

    static func besides(_ path: String, _ name: String) -> String {
        path.split(separator: "/", omittingEmptySubsequences: false).dropLast().joined(separator: "/") + "/" + name
    }
}

/// What images say of themselves.
enum ImageIdentities {
    /// The UUID of an image beside another.
    static func uuid(besides path: String, _ name: String) throws -> String? {
        try ImageInformation.read(VDIReader.besides(path, name)).first?.identity.uuid?.description
    }
}
