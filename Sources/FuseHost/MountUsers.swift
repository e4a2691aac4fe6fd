import Glibc

/// Who keeps a mount busy.
enum MountUsers {
    /// One phrase a user, such as "/dev/loop0 (mounted at /mnt/fs) over disk.raw".
    static func find(of entry: MountEntry, in table: MountTable) -> [String] {
        let mounts = table.below(entry).map { "\($0.source) mounted at \($0.mountpoint)" }
        let loops = loopDevices(entry, table)
        if !mounts.isEmpty || !loops.isEmpty { return mounts + loops }
        return processes(entry)
    }

    /// The reason for an error message.
    static func busyReason(of entry: MountEntry, in table: MountTable) -> String {
        let users = find(of: entry, in: table)
        let shown = users.prefix(5).joined(separator: ", ") + (users.count > 5 ? ", and \(users.count - 5) more" : "")
        return users.isEmpty
            ? "in use, by a process this user may not look at; 'fuser -vm \(entry.mountpoint)' as root names it"
            : "in use by \(shown)"
    }

    private static func isUse(_ path: String, of entry: MountEntry) -> Bool {
        path == entry.mountpoint || isPath(path, below: entry.mountpoint)
    }

    private static func loopDevices(_ entry: MountEntry, _ table: MountTable) -> [String] {
        var found: [String] = []
        for name in SystemFiles.names(in: "/sys/block").sorted() where name.hasPrefix("loop") {
            guard let file = SystemFiles.line("/sys/block/\(name)/loop/backing_file"), isUse(file, of: entry) else {
                continue
            }
            let points = table.entries.filter { $0.source == "/dev/\(name)" || $0.source.hasPrefix("/dev/\(name)p") }
                .map(\.mountpoint)
            found.append(
                points.isEmpty
                    ? "/dev/\(name) (free it with 'losetup --detach /dev/\(name)')"
                    : "/dev/\(name), mounted at \(points.joined(separator: ", ")) (unmount that first)")
        }
        return found
    }

    private static func processes(_ entry: MountEntry) -> [String] {
        let own = getpid()
        var found: [String] = []
        for name in SystemFiles.names(in: "/proc") {
            guard let pid = Int32(name), pid != own, uses("/proc/\(name)", entry) else { continue }
            let command = SystemFiles.line("/proc/\(name)/comm") ?? "?"
            found.append("process \(pid) (\(command))")
        }
        // Started there, with nobody behind it who stands there too.
        if found.isEmpty, let path = SystemFiles.link("/proc/self/cwd"), isUse(path, of: entry) {
            found.append("this program, which was started there: cd elsewhere")
        }
        return found
    }

    private static func uses(_ process: String, _ entry: MountEntry) -> Bool {
        for link in ["cwd", "root"] {
            if let path = SystemFiles.link("\(process)/\(link)"), isUse(path, of: entry) { return true }
        }
        for descriptor in SystemFiles.names(in: "\(process)/fd") {
            if let path = SystemFiles.link("\(process)/fd/\(descriptor)"), isUse(path, of: entry) { return true }
        }
        return false
    }
}
