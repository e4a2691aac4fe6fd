internal import FuseShim
import Glibc
import Synchronization

/// What the mountpoint becomes.
public enum MountShape: Sendable {
    /// A folder that holds the files. Its permission bits and owner are those of the folder.
    case folder(mode: UInt32, owner: UInt32, group: UInt32)
    /// A regular file: the first and only file stands in its place.
    case file
}

/// The files of a mount and their inode numbers: the root is 1, in a folder every file gets the next number from 2 on.
///
/// Files come and go, but a number is not used again, and a file that was once here lives as long as the tree: whoever
/// opened it may go on.
// Sendable: what changes is behind the lock; the C strings are owned and freed here.
@safe final class FileTree: @unchecked Sendable {
    let shape: MountShape
    private let contents: Mutex<Contents>
    private let mounted: Int64

    @safe private struct Contents {
        /// All files there ever were; number n is at n - 2.
        var all: [ExposedFile] = []
        var names: [UnsafeMutablePointer<CChar>] = unsafe []
        /// The numbers of those that are there now, in the order of the listing; the first is the disk's.
        var listed: [UInt64] = []
    }

    /// The most files that a tree takes in all its life; from then on it stays as it is.
    private static let limit = 65_536

    init(files: [ExposedFile], shape: MountShape) {
        self.shape = shape
        contents = Mutex(Contents())
        mounted = files.first?.modified ?? 0
        list(files)
    }

    deinit {
        contents.withLock { contents in
            for index in unsafe contents.names.indices { unsafe free(contents.names[index]) }
        }
    }

    /// Makes these the files that are there; those that were there before keep their numbers.
    func list(_ files: [ExposedFile]) {
        contents.withLock { contents in
            guard contents.all.count + files.count <= Self.limit else { return }
            contents.listed = files.map { file in
                if let index = contents.all.firstIndex(where: { $0 === file }) { return UInt64(index) + 2 }
                contents.all.append(file)
                unsafe contents.names.append(strdup(file.name))
                return UInt64(contents.all.count) + 1
            }
        }
    }

    /// The disk.
    var first: ExposedFile? { file(inode: 2) }
    /// How many files are listed.
    var count: Int { contents.withLock { $0.listed.count } }

    /// The file with an inode number, nil for the root folder and for what does not exist.
    func file(inode: UInt64) -> ExposedFile? {
        var number = inode
        if case .file = shape, inode == UInt64(FUSESHIM_ROOT) { number = 2 }
        return contents.withLock { contents in
            guard number >= 2, number - 2 < UInt64(contents.all.count) else { return nil }
            return contents.all[Int(number - 2)]
        }
    }

    func inode(named name: UnsafePointer<CChar>) -> UInt64? {
        guard case .folder = shape else { return nil }
        let wanted = unsafe String(cString: name)
        return contents.withLock { contents in
            contents.listed.first { contents.all[Int($0 - 2)].name == wanted }
        }
    }

    /// Name and inode number of the file at a position of the folder. The name stays valid.
    func entry(at position: UInt64) -> (name: UnsafePointer<CChar>, inode: UInt64)? {
        guard case .folder = shape else { return nil }
        let found = contents.withLock { contents -> (name: UInt, inode: UInt64)? in
            guard position < UInt64(contents.listed.count) else { return nil }
            let inode = contents.listed[Int(position)]
            return unsafe (UInt(bitPattern: contents.names[Int(inode - 2)]), inode)
        }
        guard let found, let name = unsafe UnsafePointer<CChar>(bitPattern: found.name) else { return nil }
        return unsafe (name, found.inode)
    }

    /// Fills in what stat(2) shows; false if there is no such inode.
    func describe(inode: UInt64, into answer: inout fuseshim_attributes) -> Bool {
        answer.inode = inode
        answer.links = 1
        answer.valid_seconds = 1
        let modified: Int64
        if let file = file(inode: inode) {
            answer.mode = UInt32(S_IFREG) | file.mode
            if !file.isStable { answer.valid_seconds = 0 }
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
