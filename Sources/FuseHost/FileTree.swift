internal import FuseShim
import Glibc

/// What the mountpoint becomes.
public enum MountShape: Sendable {
    /// A folder that holds the files. Its permission bits and owner are those of the folder.
    case folder(mode: UInt32, owner: UInt32, group: UInt32)
    /// A regular file: the first and only file stands in its place.
    case file
}

/// The inodes of a mount: the root is 1, in a folder the files follow from 2 on in their order.
// Sendable: nothing changes after init; the C strings are owned and freed here.
@safe final class FileTree: @unchecked Sendable {
    let files: [ExposedFile]
    let shape: MountShape
    private let names: [UnsafeMutablePointer<CChar>]
    private let mounted: Int64

    init(files: [ExposedFile], shape: MountShape) {
        self.files = files
        self.shape = shape
        unsafe names = files.map { unsafe strdup($0.name) }
        mounted = files.first?.modified ?? 0
    }

    deinit {
        for index in unsafe names.indices { unsafe free(names[index]) }
    }

    /// The file with an inode number, nil for the root folder and for what does not exist.
    func file(inode: UInt64) -> ExposedFile? {
        guard let index = index(inode: inode) else { return nil }
        return files[index]
    }

    private func index(inode: UInt64) -> Int? {
        let first: UInt64 = if case .file = shape { 1 } else { 2 }
        guard inode >= first, inode - first < UInt64(files.count) else { return nil }
        return Int(inode - first)
    }

    func inode(named name: UnsafePointer<CChar>) -> UInt64? {
        guard case .folder = shape else { return nil }
        for index in files.indices where unsafe strcmp(name, names[index]) == 0 { return UInt64(index) + 2 }
        return nil
    }

    /// Name and inode number of the file at a position of the folder.
    func entry(at position: UInt64) -> (name: UnsafePointer<CChar>, inode: UInt64)? {
        guard case .folder = shape, position < UInt64(files.count) else { return nil }
        return unsafe (UnsafePointer(names[Int(position)]), position + 2)
    }

    /// Fills in what stat(2) shows; false if there is no such inode.
    func describe(inode: UInt64, into answer: inout fuseshim_attributes) -> Bool {
        answer.inode = inode
        answer.links = 1
        answer.valid_seconds = 1
        let modified: Int64
        if let file = file(inode: inode) {
            answer.mode = UInt32(S_IFREG) | file.mode
            answer.size = file.size
            answer.allocated = file.allocatedBytes
            answer.owner = file.owner
            answer.group = file.group
            modified = file.modified
        } else if inode == UInt64(FUSESHIM_ROOT), case .folder(let mode, let owner, let group) = shape {
            answer.mode = UInt32(S_IFDIR) | mode
            answer.links = 2
            answer.owner = owner
            answer.group = group
            modified = mounted
        } else {
            return false
        }
        // Euclidean division: the nanoseconds are never negative, also before 1970.
        let billion: Int64 = 1_000_000_000
        let remainder = modified % billion
        answer.modified_seconds = modified / billion - (remainder < 0 ? 1 : 0)
        answer.modified_nanoseconds = UInt32(remainder < 0 ? remainder + billion : remainder)
        return true
    }
}
