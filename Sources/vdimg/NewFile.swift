import DiskStorage
import Glibc

/// Writes a file as a whole or not at all: it is made under another name beside `path`, and gets its name in the end.
/// Something that is there already is replaced only if `replacing` says so.
func writeNewFile(_ path: String, _ bytes: [UInt8], replacing: Bool) throws(DiskError) {
    let folder = path.lastIndex(of: "/").map { String(path[...$0]) } ?? ""
    let interim = folder + ".vdimg-\(getpid())-\(UInt32.random(in: 0...UInt32.max)).tmp"
    let file: FileStorage
    do throws(DiskError) { file = try FileStorage(creating: interim) } catch {
        throw error.errno == 0 ? error : .system(error.errno, "create the file", image: path)
    }
    defer { unsafe unlink(interim) }
    try file.write(bytes, at: 0, for: .guestData)
    try file.flush()
    if replacing {
        guard unsafe rename(interim, path) == 0 else { throw .system(errno, "replace the file", image: path) }
    } else {
        guard unsafe link(interim, path) == 0 else {
            let number = errno
            guard number == EEXIST else { throw .system(number, "create the file", image: path) }
            throw DiskError(.system, "is there already; --force replaces it", image: path, errno: number)
        }
    }
}
