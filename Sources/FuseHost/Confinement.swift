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
