import DiskStorage
import FuseHost
import Logging
import VirtualDisk

/// Passes on what the user should know of a block cache: to whoever starts the mount, and later to the log.
final class CacheNotices: Sendable {
    private let logger: Logger
    private let serving = Locked(false)

    init(_ logger: Logger) { self.logger = logger }

    /// Whether the disk is open, and nobody waits at a terminal any more.
    var isServing: Bool {
        get { serving.withLock { $0 } }
        set { serving.withLock { $0 = newValue } }
    }

    func take(_ notice: CacheNotice) {
        if !isServing, notice.isWarning || logger.logLevel <= .notice { return Daemon.say("vdmount: \(notice.text)") }
        if notice.isWarning { logger.warning("\(notice.text)") } else { logger.notice("\(notice.text)") }
    }
}
