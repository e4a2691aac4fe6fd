import Glibc

/// How a session is mounted and served.
public struct MountOptions: Sendable {
    /// What mount(8) shows as the source: the image.
    public var source: String
    /// The kernel then refuses all writes before they come here.
    public var isReadOnly: Bool
    /// Lets other users in (first of all root, for loop devices) where the system allows it. The files' owner and mode
    /// still decide who may do what.
    public var allowsOthers = true
    /// More options for the kernel, such as "noatime" or "nodev".
    public var extra: [String] = []
    /// The most requests served at once; slow storage needs many, a warm cache two to four. Each takes at most 1 MiB.
    public var maximumLanes = 16
    /// Waiting lanes worth keeping.
    public var keptLanes = 4

    public init(source: String, isReadOnly: Bool) {
        self.source = source
        self.isReadOnly = isReadOnly
    }

    func list(allowsOthers: Bool) -> [String] {
        var list = ["fsname=\(source)", "subtype=vdmount", "default_permissions"]
        if isReadOnly { list.append("ro") }
        if allowsOthers { list.append("allow_other") }
        return list + extra
    }

    /// Whether fusermount3 lets this user use allow_other: /etc/fuse.conf has a line `user_allow_other`.
    static var systemAllowsOthers: Bool {
        if geteuid() == 0 { return true }
        let lines = (SystemFiles.contents("/etc/fuse.conf") ?? []).split(separator: 0x0A)
        return lines.contains { line in
            line.split(separator: 0x20).first.map { $0.elementsEqual("user_allow_other".utf8) } ?? false
        }
    }
}
