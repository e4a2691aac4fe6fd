import DiskImage
import DiskStorage
import DiskTesting
import Glibc

@testable import DiskFormats

/// Makes the files of an image in its own folder, as the programs do.
struct FolderCompanions: CompanionOpener {
    func openCompanion(
        _ name: String, of imagePath: String, isWritable: Bool, what: String
    ) throws(DiskError) -> (storage: any Storage, path: String) {
        let path = name.hasPrefix("/") ? name : folder(of: imagePath) + name
        return (try FileStorage(path: path, isWritable: isWritable), path)
    }

    func createCompanion(_ name: String, of imagePath: String) throws(DiskError) -> (storage: any Storage, path: String)
    {
        let path = folder(of: imagePath) + name
        return (try FileStorage(creating: path), path)
    }

    func removeCompanion(_ name: String, of imagePath: String) throws(DiskError) {
        unsafe unlink(folder(of: imagePath) + name)
    }

    private func folder(of path: String) -> String {
        guard let slash = path.lastIndex(of: "/") else { return "" }
        return String(path[...slash])
    }
}

/// What a peer says, or why it failed, on one line.
@discardableResult
func qemuImage(_ arguments: String...) throws -> String {
    let result = try Subprocess.run(["qemu-img"] + arguments)
    guard result.status == 0 else {
        throw DiskError(
            .system, "qemu-img \(arguments.joined(separator: " ")): \(result.errorText)\(result.outputText)")
    }
    return result.outputText
}

/// Values that are at the edges of what fields can hold.
let edgeValues: [UInt64] = [
    0, 1, 2, 3, 7, 8, 127, 128, 129, 511, 512, 513, 4095, 4096, 0x7fff, 0x8000, 0xffff, 0x1_0000, 0x7fff_ffff,
    0x8000_0000, 0xffff_fffe, 0xffff_ffff, 0x1_0000_0000, 0x003f_ffff_ffff_ffff, 0x0040_0000_0000_0000,
    0x7fff_ffff_ffff_ffff, 0x8000_0000_0000_0000, 0xffff_ffff_ffff_fffe, 0xffff_ffff_ffff_ffff,
]

extension [UInt8] {
    /// A copy in which an integer of `size` bytes at `offset` is another, least significant byte first.
    func setting(_ value: UInt64, at offset: Int, size: Int) -> [UInt8] {
        var copy = self
        for index in 0..<size { copy[offset + index] = UInt8(truncatingIfNeeded: value >> UInt64(8 * index)) }
        return copy
    }
}
