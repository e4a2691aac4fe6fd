internal import CNBD
internal import DiskStorage
internal import Glibc

/// A connection to an NBD server, by libnbd.
@safe
final class NBDEngine: DiskEngine {
    /// What the server said of the export.
    struct Export: ServedDiskProperties {
        var length: UInt64
        var isReadOnly: Bool
        var sectorSize: UInt64
        var longestRequest: UInt64
        var canFlush: Bool
        var canTrim: Bool
        var canZero: Bool
        var tellsHoles: Bool
    }

    static let words = (server: "server", disk: "export")
    private var handle: OpaquePointer?

    /// Connects; ``properties()`` can be asked for afterwards.
    init(_ address: StorageAddress, _ settings: StorageSettings) throws(DiskError) {
        guard let handle = unsafe nbd_create() else { throw DiskError(.system, "libnbd cannot be used") }
        unsafe self.handle = unsafe handle
        do throws(DiskError) {
            try configure(address, settings)
            try connect(address, settings)
        } catch {
            unsafe nbd_close(handle)
            unsafe self.handle = nil
            throw error
        }
    }

    deinit { close(isClean: false) }

    private static func reason() -> String {
        unsafe nbd_get_error().map { unsafe String(cString: $0) }?.printable(limit: 300) ?? "libnbd does not say why"
    }

    private func check(_ result: Int32) throws(DiskError) {
        guard result == -1 else { return }
        let code = nbd_get_errno()
        let kind: DiskError.Kind =
            switch code {
            case ENOENT: .notFound
            case EACCES, EPERM: .refused
            case EINVAL, ENOTSUP: .invalidArgument
            default: .system
            }
        throw DiskError(kind, Self.reason(), errno: kind == .system ? EIO : 0)
    }

    private func configure(_ address: StorageAddress, _ settings: StorageSettings) throws(DiskError) {
        guard let handle = unsafe handle else { return }
        // An address may not name files of this machine; options may.
        try check(unsafe nbd_set_uri_allow_local_file(handle, false))
        try check(unsafe nbd_add_meta_context(handle, LIBNBD_CONTEXT_BASE_ALLOCATION))
        if address.scheme.hasPrefix("nbds") {
            try Self.requireTrust(address, settings)
            try check(unsafe nbd_set_tls(handle, LIBNBD_TLS_REQUIRE))
            if let folder = settings.certificateFolder { try check(unsafe nbd_set_tls_certificates(handle, folder)) }
            if let file = settings.sharedKeyFile { try check(unsafe nbd_set_tls_psk_file(handle, file)) }
            if let user = settings.user { try check(unsafe nbd_set_tls_username(handle, user)) }
            try check(unsafe nbd_set_tls_verify_peer(handle, !settings.isInsecure))
        }
    }

    /// libnbd 1.14 (`lib/crypto.c`) checks the server's certificate only if it finds certificates to check it by, and
    /// knows the server's name; else it goes on without a word. So there must be some.
    private static func requireTrust(_ address: StorageAddress, _ settings: StorageSettings) throws(DiskError) {
        guard !settings.isInsecure, settings.sharedKeyFile == nil else { return }
        guard address.scheme == "nbds" else {
            throw DiskError(
                .refused,
                "a server at a socket of this machine has no name to check its certificate by: give the storage option "
                    + "tls-psk-file, or insecure=yes")
        }
        guard let folder = settings.certificateFolder else {
            throw DiskError(
                .refused,
                "nothing is known to check the server's certificate by: give the storage option tls-certificates (a "
                    + "folder with ca-cert.pem) or tls-psk-file, or insecure=yes")
        }
        _ = try FileStorage(path: folder + "/ca-cert.pem", isWritable: false)
    }

    private func connect(_ address: StorageAddress, _ settings: StorageSettings) throws(DiskError) {
        guard let handle = unsafe handle else { return }
        try check(unsafe nbd_aio_connect_uri(handle, address.text))
        let deadline = SuspendingClock.now + .seconds(settings.timeout)
        while unsafe nbd_aio_is_connecting(handle) == 1 {
            var place = pollfd(fd: descriptor, events: events, revents: 0)
            let ready = unsafe poll(&place, 1, 1000)
            if ready > 0, let reason = service(place.revents) {
                try check(-1)
                throw DiskError(.system, reason, errno: EIO)
            }
            guard SuspendingClock.now < deadline else {
                throw DiskError(
                    .system, "the server has not answered for \(settings.timeout) seconds", errno: ETIMEDOUT)
            }
        }
        guard unsafe nbd_aio_is_ready(handle) == 1 else {
            try check(-1)
            return
        }
    }

    /// What the server said.
    func properties() throws(DiskError) -> Export {
        guard let handle = unsafe handle else { throw DiskError(.system, "the connection is closed", errno: EIO) }
        let length = unsafe nbd_get_size(handle)
        guard length >= 0 else { throw DiskError(.system, Self.reason(), errno: EIO) }
        let least = unsafe nbd_get_block_size(handle, LIBNBD_SIZE_MINIMUM)
        let most = unsafe nbd_get_block_size(handle, LIBNBD_SIZE_MAXIMUM)
        let minimum = UInt64(max(1, least))
        guard minimum <= 64 << 10, minimum & (minimum - 1) == 0, UInt64(length) % minimum == 0 else {
            throw DiskError(
                .unsupported, "the server's blocks have \(minimum) bytes and its export \(length), which do not agree")
        }
        return Export(
            length: UInt64(length), isReadOnly: unsafe nbd_is_read_only(handle) != 0, sectorSize: minimum,
            longestRequest: most > 0 ? max(minimum, UInt64(most)) : 32 << 20,
            canFlush: unsafe nbd_can_flush(handle) == 1,
            canTrim: unsafe nbd_can_trim(handle) == 1, canZero: unsafe nbd_can_zero(handle) == 1,
            tellsHoles: unsafe nbd_can_meta_context(handle, LIBNBD_CONTEXT_BASE_ALLOCATION) == 1)
    }

    // MARK: - ConnectionEngine

    var descriptor: Int32 {
        guard let handle = unsafe handle else { return -1 }
        return unsafe nbd_aio_get_fd(handle)
    }

    var events: Int16 {
        guard let handle = unsafe handle else { return 0 }
        let direction = unsafe UInt32(nbd_aio_get_direction(handle))
        var events: Int32 = 0
        if direction & UInt32(LIBNBD_AIO_DIRECTION_READ) != 0 { events |= Int32(POLLIN) }
        if direction & UInt32(LIBNBD_AIO_DIRECTION_WRITE) != 0 { events |= Int32(POLLOUT) }
        return Int16(truncatingIfNeeded: events)
    }

    var isDead: Bool {
        guard let handle = unsafe handle else { return true }
        return unsafe nbd_aio_is_dead(handle) == 1 || nbd_aio_is_closed(handle) == 1
    }

    func service(_ happened: Int16) -> String? {
        guard let handle = unsafe handle else { return "the connection is closed" }
        // Another thread may have issued a request meanwhile, after which other events are waited for.
        let wanted = events
        let ended = Int32(happened) & (POLLERR | POLLHUP | POLLNVAL) != 0
        var result: Int32 = 0
        if wanted & Int16(POLLIN) != 0, ended || happened & Int16(POLLIN) != 0 {
            result = unsafe nbd_aio_notify_read(handle)
        } else if wanted & Int16(POLLOUT) != 0, ended || happened & Int16(POLLOUT) != 0 {
            result = unsafe nbd_aio_notify_write(handle)
        }
        if unsafe result == -1 || nbd_aio_is_dead(handle) == 1 { return Self.reason() }
        return unsafe nbd_aio_is_closed(handle) == 1 ? "the server closed the connection" : nil
    }

    func close(isClean: Bool) {
        guard let handle = unsafe handle else { return }
        // Says good-bye without waiting: a server that does not listen keeps nobody.
        if isClean { unsafe _ = nbd_aio_disconnect(handle, 0) }
        unsafe nbd_close(handle)
        unsafe self.handle = nil
    }

    // MARK: - Requests

    /// What the library calls when a request is done.
    private func completion(_ operation: PendingOperation) -> nbd_completion_callback {
        unsafe nbd_completion_callback(
            callback: { context, error in
                // The operation lasts: who issued it waits for this, or for the connection's end.
                guard let context = unsafe context, let error = unsafe error else { return 1 }
                let operation = unsafe Unmanaged<PendingOperation>.fromOpaque(context).takeUnretainedValue()
                let code = unsafe error.pointee
                // The library ends with these what was on its way when the connection broke.
                let isLost = code == ENOTCONN || code == ESHUTDOWN
                operation.finish(code, code == 0 ? "" : DiskError.describe(errno: code), isPassing: isLost)
                return 1
            }, user_data: Unmanaged.passUnretained(operation).toOpaque(), free: nil)
    }

    private func issued(_ cookie: Int64) -> String? { cookie < 0 ? Self.reason() : nil }

    func read(_ buffer: IOBuffer, _ offset: UInt64, _ disk: Export, _ operation: PendingOperation) -> String? {
        guard let handle = unsafe handle else { return "the connection is closed" }
        return issued(
            unsafe nbd_aio_pread(handle, buffer.pointer, buffer.count, offset, completion(operation), 0))
    }

    func write(_ bytes: IOBytes, _ offset: UInt64, _ disk: Export, _ operation: PendingOperation) -> String? {
        guard let handle = unsafe handle else { return "the connection is closed" }
        return issued(
            unsafe nbd_aio_pwrite(handle, bytes.pointer, bytes.count, offset, completion(operation), 0))
    }

    func flush(_ operation: PendingOperation) -> String? {
        guard let handle = unsafe handle else { return "the connection is closed" }
        return issued(unsafe nbd_aio_flush(handle, completion(operation), 0))
    }

    func trim(_ range: Range<UInt64>, _ operation: PendingOperation) -> String? {
        guard let handle = unsafe handle else { return "the connection is closed" }
        return issued(
            unsafe nbd_aio_trim(
                handle, range.upperBound - range.lowerBound, range.lowerBound, completion(operation), 0))
    }

    func zero(_ range: Range<UInt64>, _ operation: PendingOperation) -> String? {
        guard let handle = unsafe handle else { return "the connection is closed" }
        return issued(
            unsafe nbd_aio_zero(
                handle, range.upperBound - range.lowerBound, range.lowerBound, completion(operation), 0))
    }

    /// Asks what a range is; the operation's numbers are then lengths and flags by turns.
    func blockStatus(_ range: Range<UInt64>, _ operation: PendingOperation) -> String? {
        guard let handle = unsafe handle else { return "the connection is closed" }
        let callback = unsafe nbd_extent_callback(
            callback: { context, name, _, entries, count, _ in
                guard let context = unsafe context, let entries = unsafe entries, let name = unsafe name,
                    unsafe strcmp(name, LIBNBD_CONTEXT_BASE_ALLOCATION) == 0
                else { return 0 }
                let operation = unsafe Unmanaged<PendingOperation>.fromOpaque(context).takeUnretainedValue()
                for index in 0..<min(count, 2048) where operation.numbers.count < 2048 {
                    operation.numbers.append(UInt64(unsafe entries[index]))
                }
                return 0
            }, user_data: Unmanaged.passUnretained(operation).toOpaque(), free: nil)
        return issued(
            unsafe nbd_aio_block_status(
                handle, range.upperBound - range.lowerBound, range.lowerBound, callback, completion(operation), 0))
    }
}
