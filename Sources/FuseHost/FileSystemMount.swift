internal import FuseShim
import Glibc

/// A file system of a disk, mounted for the user: `vdmount --fs`.
///
/// The disk is exposed in a private folder `/run/vdmount/fs/ID/disk`, a loop device lies over one of its files, and the
/// file system of that is mounted at the user's folder, whose path is in `/run/vdmount/fs/ID/at`. What is there is
/// found by the mount table and these files; nothing else is kept.
public struct FileSystemMount: Sendable {
    /// Holds the private folders; root's alone.
    public static let root = "/run/vdmount/fs"

    private let folder: String

    /// Where the disk is, or shall be, exposed.
    public var disk: String { folder + "/disk" }

    private init(folder: String) { self.folder = folder }

    // MARK: - Making

    /// Makes the private folders for a mount at `target`, an absolute path without links.
    public static func prepare(for target: String) throws(HostError) -> FileSystemMount {
        if let other = at(target: target) {
            if let entry = MountTable.current().top(at: target), other.isOver(entry) {
                throw HostError(
                    subject: target,
                    reason: "a file system is mounted here already: unmount it with 'vdumount \(target)'")
            }
            // Its file system was unmounted by other means, or never came about.
            try other.unmount { _ in }
        }
        for path in ["/run/vdmount", root] where unsafe mkdir(path, 0o755) != 0 && errno != EEXIST {
            throw HostError(subject: path, action: "cannot make the folder", errno: errno)
        }
        for number in 1... {
            let mount = FileSystemMount(folder: "\(root)/\(number)")
            if unsafe mkdir(mount.folder, 0o700) != 0 {
                if errno == EEXIST && number < 100_000 { continue }
                throw HostError(subject: mount.folder, action: "cannot make the folder", errno: errno)
            }
            guard unsafe mkdir(mount.disk, 0o700) == 0 else {
                throw HostError(subject: mount.disk, action: "cannot make the folder", errno: errno)
            }
            let descriptor = SystemFiles.openFile(mount.folder + "/at", O_WRONLY | O_CREAT | O_CLOEXEC, mode: 0o600)
            defer { close(descriptor) }
            guard descriptor >= 0, SystemFiles.writeAll(target, to: descriptor) else {
                throw HostError(subject: mount.folder + "/at", action: "cannot write the file", errno: errno)
            }
            return mount
        }
        preconditionFailure("the loop above ends")
    }

    /// Attaches one of the disk's files to a loop device and mounts its file system at the target.
    ///
    /// - Parameter types: the types for mount(8), to be tried in turn if the kernel does not know one.
    public func mount(
        file: String, sectorSize: Int, types: [String], options: [String], isReadOnly: Bool
    ) throws(HostError) {
        let target = try self.target()
        var name = [CChar](repeating: 0, count: 64)
        let path = "\(disk)/\(file)"
        let device = unsafe fuseshim_loop_attach(path, isReadOnly, UInt32(sectorSize), &name, name.count)
        guard device >= 0 else {
            throw HostError(
                subject: path, reason: "cannot attach a loop device: \(errorText(-device))\(Self.advice(-device))")
        }
        defer { close(device) }
        var reason = ""
        for type in types {
            // So that umount(8), and systemd with it, runs our helper, which takes back all of it. Programs that mount
            // a type of their own do not know the option.
            let hasProgram = SystemFiles.reach("/sbin/mount.\(type)") == 0
            let list = (options + (hasProgram ? [] : ["helper=fuse.vdmount"])).joined(separator: ",")
            let words = ["mount", "-t", type, "-o", list, text(from: name), target]
            let (status, said) = Program.run(words)
            if status == 0 { return }
            let prefix = "mount: \(target): "
            reason = said.hasPrefix(prefix) ? "mount: " + said.dropFirst(prefix.count) : said
            if reason.isEmpty { reason = "mount failed with status \(status)" }
            // Its module would have been loaded by now.
            if Self.kernelKnows(type) { break }
        }
        throw HostError(subject: target, reason: reason)
    }

    private static func kernelKnows(_ type: String) -> Bool {
        (SystemFiles.text("/proc/filesystems") ?? "").split(separator: "\n").contains { line in
            line.split(separator: "\t").last.map(String.init) == type
        }
    }

    /// What keeps loop devices away most often.
    private static func advice(_ code: Int32) -> String {
        switch code {
        case ENOENT, ENXIO, ENODEV:
            "; a container must be given /dev/loop-control and the next free /dev/loopN ('losetup --find' names it)"
        case EPERM, EACCES: "; a container must be allowed the devices"
        default: ""
        }
    }

    /// Whether this process is root of a user namespace, where the kernel has no loop devices, and not of the machine.
    public static var isInUserNamespace: Bool {
        guard let map = SystemFiles.text("/proc/self/uid_map") else { return false }
        return map.split(whereSeparator: { $0 == " " || $0 == "\n" }) != ["0", "0", "4294967295"]
    }

    // MARK: - Finding

    /// All there are.
    static func all() -> [FileSystemMount] {
        SystemFiles.names(in: root).compactMap { name in
            Int(name).map { FileSystemMount(folder: "\(root)/\($0)") }
        }
    }

    /// The one whose disk is exposed at that place.
    public static func at(disk path: String) -> FileSystemMount? {
        guard path.hasPrefix(root + "/"), path.hasSuffix("/disk") else { return nil }
        return FileSystemMount(folder: String(path.dropLast("/disk".count)))
    }

    /// The one that is, or was, mounted at a folder of the user's.
    static func at(target path: String) -> FileSystemMount? {
        let names = [path, SystemFiles.pathWithRealFolder(path), SystemFiles.realPath(path)]
        return all().first { mount in
            guard let target = try? mount.target() else { return false }
            return names.contains(target)
        }
    }

    /// Where the user has it.
    public func target() throws(HostError) -> String {
        guard let bytes = SystemFiles.contents(folder + "/at", limit: Int(PATH_MAX)), !bytes.isEmpty else {
            throw HostError(subject: folder, action: "cannot read where its file system is mounted", errno: errno)
        }
        return String(decoding: bytes, as: UTF8.self)
    }

    // MARK: - Unwinding

    /// Unmounts the file system, waits until the disk is closed, and removes the private folders; the first failure
    /// ends it, with what is under it left as it is.
    func unmount(note: (String) -> Void) throws(HostError) {
        let target = try self.target()
        let table = MountTable.current()
        if let entry = table.top(at: target), isOver(entry) {
            // Without helpers, as one of them may have called this; it also forgets the mount's entry in utab.
            let isDone = Program.run(["umount", "-i", "--", target]).status == 0
            if !isDone, let failure = Unmount.attempt(target, lazy: false) {
                let reason = failure.isBusy ? MountUsers.busyReason(of: entry, in: table) : failure.text
                throw HostError(subject: target, reason: failure.isBusy ? reason : "cannot unmount: \(reason)")
            }
            if entry.fileSystem.hasPrefix("fuse") { waitForLoopDevices() }
        }
        if MountTable.current().top(at: disk) != nil { try Unmounter.unmountDisk(disk, note: note) }
        remove()
    }

    /// Whether a mount is of a loop device over this disk.
    private func isOver(_ entry: MountEntry) -> Bool {
        entry.source.hasPrefix("/dev/loop") && isLoopDevice(String(entry.source.dropFirst("/dev/".count)))
    }

    private func isLoopDevice(_ name: String) -> Bool {
        SystemFiles.line("/sys/block/\(name)/loop/backing_file").map { isPath($0, below: disk) } ?? false
    }

    /// A file system that a process serves, such as ntfs-3g, is unmounted before that process has written everything
    /// and let go of its device. If it takes longer than this, the disk is in use, and that is said.
    private func waitForLoopDevices() {
        for _ in 0..<600 {
            let names = SystemFiles.names(in: "/sys/block")
            guard names.contains(where: { $0.hasPrefix("loop") && isLoopDevice($0) }) else { return }
            SystemFiles.sleep(milliseconds: 50)
        }
    }

    /// Takes everything back after a failure, as far as it came about.
    public func abandon() {
        if MountTable.current().top(at: disk) != nil { try? Unmounter.unmountDisk(disk) { _ in } }
        remove()
    }

    private func remove() {
        unsafe rmdir(disk)
        unsafe unlink(folder + "/at")
        unsafe rmdir(folder)
    }
}
