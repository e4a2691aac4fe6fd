internal import FuseShim
import Glibc

/// What a daemon gives up once its images are open and its mount is made, so that whatever an image makes of it can do
/// no harm outside: from then on it can use the files that are open, and open, connect, execute or mount nothing.
///
/// What it must still have done elsewhere its ``Keeper`` does, which was started before.
public enum Confinement {
    /// Confines this process, which must not have started a thread yet: what the kernel lacks for it, for the user.
    public static func begin() throws(HostError) -> [String] {
        var missing: Int32 = 0
        var step: UnsafePointer<CChar>?
        let result = unsafe fuseshim_confine(&missing, &step)
        guard result == 0 else {
            let step = unsafe step.map { unsafe String(cString: $0) } ?? ""
            throw HostError(
                subject: "the daemon cannot be confined",
                reason: "\(step): \(errorText(-result)); '--no-sandbox' goes without")
        }
        var warnings: [String] = []
        if missing & FUSESHIM_NO_LANDLOCK != 0 {
            warnings.append("this kernel has no Landlock: the daemon is confined by its filter of system calls alone")
        }
        if missing & FUSESHIM_NO_SECCOMP != 0 {
            warnings.append("this kernel has no seccomp: what the daemon may ask of the kernel is not limited")
        }
        return warnings
    }
}

extension Confinement {
    /// Confines the process that reaches servers for a daemon, before it has threads: it reads `files`, and what
    /// resolving names and certificates take, but writes to nothing, executes nothing and changes nothing of the
    /// system. As much of that as the kernel has; there is nobody here to be told.
    public static func beginForServers(_ files: [String]) {
        let copies = unsafe files.map { unsafe strdup($0) }
        defer { for index in unsafe copies.indices { unsafe free(copies[index]) } }
        var paths = unsafe copies.map { unsafe $0.map { unsafe UnsafePointer($0) } } + [nil]
        unsafe fuseshim_confine_client(&paths)
    }
}
