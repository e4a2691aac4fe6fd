import Glibc

/// What `vdumount` does: unmount, and wait until the daemon behind the mount has closed the disk.
public enum Unmounter {
    /// Unmounts what is at a path and returns when its disk is closed.
    ///
    /// - A dead mount, whose daemon was killed, is cleared.
    /// - If the mount is gone already but its daemon still closes (after `umount`), that is waited for.
    /// - A file system that `vdmount --fs` mounted is unmounted, and then its disk.
    /// - Parameter note: shows the user a line that is no error.
    public static func unmount(_ path: String, note: (String) -> Void) throws(HostError) {
        if let mount = FileSystemMount.at(target: path) ?? FileSystemMount.at(disk: path) {
            return try mount.unmount(note: note)
        }
        try unmountDisk(path, note: note)
    }

    /// The same for what is no file system.
    static func unmountDisk(_ path: String, note: (String) -> Void) throws(HostError) {
        let table = MountTable.current()
        guard let entry = find(path, in: table) else {
            try waitForClosing(path, note: note)
            return
        }
        guard entry.isOurs else {
            throw HostError(
                subject: path, reason: "a mount of type \(entry.fileSystem), not of vdmount: unmount it with umount")
        }
        let owners = entry.owner.map { [$0] } ?? [geteuid()]
        let daemon = MountWatch.find(device: entry.device, mountpoint: entry.mountpoint, owners: owners)
        if daemon == nil && entry.isStale {
            try entry.detach()
            note("\(path): its daemon had ended without closing \(entry.source); the dead mount is cleared")
            return
        }
        try unmount(entry)
        let left = MountTable.current()
        if let other = left.entry(device: entry.device) {
            note("\(path): the disk stays open, it is mounted at \(other.mountpoint) too")
        } else if let daemon {
            try wait(for: daemon, path: path, note: note)
        }
    }

    /// Clears a dead mount at a path; whether there was one.
    static func clearStale(at path: String) throws(HostError) -> Bool {
        guard let entry = find(path, in: .current()), entry.isOurs, entry.isStale else { return false }
        try entry.detach()
        return true
    }

    /// The mount at a path as the user wrote it, without touching a dead one.
    static func find(_ path: String, in table: MountTable) -> MountEntry? {
        if let entry = table.top(at: path) { return entry }
        if let absolute = SystemFiles.pathWithRealFolder(path), let entry = table.top(at: absolute) { return entry }
        return SystemFiles.realPath(path).flatMap { table.top(at: $0) }
    }

    /// A device that was just released is often held for a moment by udev, so busy is asked again for a second.
    private static func unmount(_ entry: MountEntry) throws(HostError) {
        for attempt in 0... {
            guard let failure = Unmount.attempt(entry.mountpoint, lazy: false) else { return }
            guard failure.isBusy else {
                throw HostError(subject: entry.mountpoint, reason: "cannot unmount: \(failure.text)")
            }
            if attempt == 20 {
                let reason = MountUsers.busyReason(of: entry, in: .current())
                throw HostError(subject: entry.mountpoint, reason: reason)
            }
            SystemFiles.sleep(milliseconds: 50)
        }
    }

    private static func waitForClosing(_ path: String, note: (String) -> Void) throws(HostError) {
        let absolute = SystemFiles.pathWithRealFolder(path) ?? path
        let owners = geteuid() == 0 ? [0] : [geteuid(), 0]
        guard let daemon = MountWatch.find(device: nil, mountpoint: absolute, owners: owners) else {
            let failure = SystemFiles.status(path).failure
            let reason = failure == 0 ? "not mounted" : errorText(failure)
            throw HostError(subject: path, reason: "\(reason); 'vdmount --list' shows what is mounted")
        }
        try wait(for: daemon, path: path, note: note)
    }

    private static func wait(
        for daemon: borrowing MountWatch, path: String, note: (String) -> Void
    ) throws(HostError) {
        let (pid, image) = (daemon.pid, daemon.image)
        switch daemon.wait(patience: { note("\(path): waiting for process \(pid) to close \(image)") }) {
        case .clean: return
        case .failed(let text): throw HostError(subject: path, reason: "unmounted, but not closed cleanly: \(text)")
        case .killed:
            throw HostError(
                subject: path,
                reason: "unmounted, but process \(pid) ended without closing \(image); check it with 'vdimg check'")
        }
    }
}
