internal import CISCSI
internal import DiskStorage
internal import Glibc

/// A session with an iSCSI target (RFC 7143), by libiscsi.
@safe
final class ISCSIEngine: DiskEngine {
    /// What the target said of the logical unit (SBC-4: READ CAPACITY, pages B0h and B2h of INQUIRY).
    struct Unit: ServedDiskProperties {
        var blockSize: UInt64
        var blockCount: UInt64
        var isReadOnly: Bool
        /// The most blocks of a READ or WRITE.
        var longestTransfer: UInt64
        /// The most blocks of an UNMAP; 0: there is none.
        var longestUnmap: UInt64
        /// Whether WRITE SAME may unmap, and leaves zeros.
        var unmapsZeros: Bool

        var length: UInt64 { blockCount * blockSize }
        var sectorSize: UInt64 { blockSize }
        var longestRequest: UInt64 { longestTransfer * blockSize }
        /// READ(16) and WRITE(16) instead of the forms that every target has.
        var isWide: Bool { blockCount > UInt64(UInt32.max) }
    }

    static let words = (server: "target", disk: "unit")
    private var context: OpaquePointer?
    private let unitNumber: Int32

    /// Logs in; ``properties()`` can be asked for afterwards.
    init(_ address: StorageAddress, _ settings: StorageSettings) throws(DiskError) {
        let name = settings.initiatorName ?? Self.usualName()
        guard let context = unsafe iscsi_create_context(name) else {
            throw DiskError(.system, "libiscsi cannot be used")
        }
        unsafe self.context = unsafe context
        let query = address.query.map { "?\($0)" } ?? ""
        guard let parts = unsafe iscsi_parse_full_url(context, "iscsi://\(address.authority)\(address.path)\(query)")
        else {
            unitNumber = 0
            close(isClean: false)
            throw DiskError(.invalidArgument, "is no address of an iSCSI disk: iscsi://HOST[:PORT]/TARGET/LUN")
        }
        defer { unsafe iscsi_destroy_url(parts) }
        unitNumber = unsafe parts.pointee.lun
        do throws(DiskError) {
            unsafe try logIn(parts, address, settings)
        } catch {
            close(isClean: false)
            throw error
        }
    }

    deinit { close(isClean: false) }

    /// By its host's name, as other initiators do that were given none.
    private static func usualName() -> String {
        var bytes = [CChar](repeating: 0, count: 65)
        unsafe _ = gethostname(&bytes, 64)
        let host = bytes.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }
        let text = String(decoding: host, as: UTF8.self).lowercased()
        let plain = text.filter { $0.isASCII && ($0.isLetter || $0.isNumber || $0 == "-" || $0 == ".") }
        return "iqn.2010-11.net.vdmount:" + (plain.isEmpty ? "host" : plain)
    }

    private func reason() -> String {
        guard let context = unsafe context, let text = unsafe iscsi_get_error(context) else { return "unknown" }
        let reason = unsafe String(cString: text).printable(limit: 300)
        return reason.isEmpty ? "the connection is lost" : reason
    }

    private func check(_ result: Int32, _ doing: String) throws(DiskError) {
        guard result != 0 else { return }
        let text = reason()
        let isRefused = text.lowercased().contains("authentication") || text.lowercased().contains("authorization")
        throw DiskError(isRefused ? .refused : .system, "cannot \(doing): \(text)", errno: isRefused ? 0 : EIO)
    }

    private func logIn(
        _ parts: UnsafeMutablePointer<iscsi_url>, _ address: StorageAddress, _ settings: StorageSettings
    ) throws(DiskError) {
        guard let context = unsafe context else { return }
        var user = settings.user
        var password = settings.password
        if let information = address.userInformation {
            let name = information.prefix { $0 != "%" && $0 != ":" }
            user = String(name)
            if name.count < information.count { password = String(information.dropFirst(name.count + 1)) }
        }
        if let user, let password {
            try check(unsafe iscsi_set_initiator_username_pwd(context, user, password), "use that user and password")
        }
        try check(unsafe iscsi_set_session_type(context, ISCSI_SESSION_NORMAL), "log in")
        try check(unsafe iscsi_set_header_digest(context, ISCSI_HEADER_DIGEST_NONE_CRC32C), "log in")
        unsafe iscsi_set_noautoreconnect(context, 1)
        unsafe _ = iscsi_set_timeout(context, Int32(settings.timeout))
        // So that the system gives up connecting after about half a minute.
        unsafe iscsi_set_tcp_syncnt(context, 4)
        try check(unsafe iscsi_set_targetname(context, ciscsi_target(parts)), "use that target's name")
        try check(
            unsafe iscsi_full_connect_sync(context, ciscsi_portal(parts), unitNumber), "log in to the target")
    }

    // MARK: - Questions

    /// What the target says of the logical unit.
    func properties() throws(DiskError) -> Unit {
        var unit = Unit(
            blockSize: 0, blockCount: 0, isReadOnly: false, longestTransfer: 0, longestUnmap: 0, unmapsZeros: false)
        let isProvisioned = try readCapacity(&unit)
        guard unit.blockSize >= 512, unit.blockSize <= 64 << 10, unit.blockSize & (unit.blockSize - 1) == 0,
            unit.blockCount > 0, unit.blockCount <= UInt64(Int64.max) / unit.blockSize
        else {
            throw DiskError(
                .unsupported, "the target's unit has \(unit.blockCount) blocks of \(unit.blockSize) bytes")
        }
        unit.longestTransfer = (1 << 20) / unit.blockSize
        unit.isReadOnly = try isWriteProtected()
        readLimits(&unit, isProvisioned: isProvisioned)
        // From now on the connection minds the time, and a flush has more of it.
        if let context = unsafe context { unsafe _ = iscsi_set_timeout(context, 0) }
        return unit
    }

    /// Whether it says that its blocks are provisioned as they are used.
    private func readCapacity(_ unit: inout Unit) throws(DiskError) -> Bool {
        // The first command after a login is answered by what happened before, a reset or another's changes.
        for _ in 0..<4 {
            guard let context = unsafe context else { break }
            guard let task = unsafe iscsi_readcapacity16_sync(context, unitNumber) else { break }
            defer { unsafe scsi_free_scsi_task(task) }
            if unsafe task.pointee.status == Int32(SCSI_STATUS_GOOD.rawValue),
                let data = unsafe scsi_datain_unmarshall(task)
            {
                let answer = unsafe data.assumingMemoryBound(to: scsi_readcapacity16.self)
                unit.blockSize = unsafe UInt64(answer.pointee.block_length)
                unit.blockCount = unsafe answer.pointee.returned_lba == .max ? 0 : answer.pointee.returned_lba + 1
                return unsafe answer.pointee.lbpme != 0
            }
            guard unsafe task.pointee.sense.key == SCSI_SENSE_UNIT_ATTENTION else { break }
        }
        guard let context = unsafe context, let task = unsafe iscsi_readcapacity10_sync(context, unitNumber, 0, 0)
        else {
            throw DiskError(.system, "cannot ask for the unit's size: \(reason())", errno: EIO)
        }
        defer { unsafe scsi_free_scsi_task(task) }
        guard unsafe task.pointee.status == Int32(SCSI_STATUS_GOOD.rawValue),
            let data = unsafe scsi_datain_unmarshall(task)
        else { throw DiskError(.system, "cannot ask for the unit's size: \(reason())", errno: EIO) }
        let answer = unsafe data.assumingMemoryBound(to: scsi_readcapacity10.self)
        unit.blockSize = unsafe UInt64(answer.pointee.block_size)
        unit.blockCount = unsafe UInt64(answer.pointee.lba) + 1
        return false
    }

    /// MODE SENSE(6): bit 7 of the device-specific parameter is WP (SBC-4, section 6.4.1).
    private func isWriteProtected() throws(DiskError) -> Bool {
        guard let context = unsafe context,
            let task = unsafe iscsi_modesense6_sync(
                context, unitNumber, 1, Int32(SCSI_MODESENSE_PC_CURRENT.rawValue),
                Int32(SCSI_MODEPAGE_RETURN_ALL_PAGES.rawValue), 0, 255)
        else { return false }
        defer { unsafe scsi_free_scsi_task(task) }
        guard unsafe task.pointee.status == Int32(SCSI_STATUS_GOOD.rawValue), unsafe task.pointee.datain.size >= 4,
            let data = unsafe task.pointee.datain.data
        else { return false }
        return unsafe data[2] & 0x80 != 0
    }

    private func readLimits(_ unit: inout Unit, isProvisioned: Bool) {
        var largestUnmap: UInt64 = 0
        unsafe page(SCSI_INQUIRY_PAGECODE_BLOCK_LIMITS) { data in
            let limits = unsafe data.assumingMemoryBound(to: scsi_inquiry_block_limits.self)
            let most = unsafe UInt64(limits.pointee.max_xfer_len)
            if most > 0 { unit.longestTransfer = min(unit.longestTransfer, most) }
            largestUnmap = unsafe limits.pointee.max_unmap_bdc > 0 ? UInt64(limits.pointee.max_unmap) : 0
        }
        guard isProvisioned else { return }
        unsafe page(SCSI_INQUIRY_PAGECODE_LOGICAL_BLOCK_PROVISIONING) { data in
            let provisioning = unsafe data.assumingMemoryBound(to: scsi_inquiry_logical_block_provisioning.self)
            if unsafe provisioning.pointee.lbpu != 0 { unit.longestUnmap = min(largestUnmap, 1 << 21) }
            unit.unmapsZeros = unsafe provisioning.pointee.lbpws != 0 && provisioning.pointee.lbprz != 0
        }
    }

    private func page(_ code: scsi_inquiry_pagecode, _ body: (UnsafeMutableRawPointer) -> Void) {
        guard let context = unsafe context,
            let task = unsafe iscsi_inquiry_sync(context, unitNumber, 1, Int32(code.rawValue), 255)
        else { return }
        defer { unsafe scsi_free_scsi_task(task) }
        // What is shorter than the fields that are wanted of it is not looked at.
        guard unsafe task.pointee.status == Int32(SCSI_STATUS_GOOD.rawValue), unsafe task.pointee.datain.size >= 8,
            let data = unsafe scsi_datain_unmarshall(task)
        else { return }
        unsafe body(data)
    }

    // MARK: - ConnectionEngine

    var descriptor: Int32 {
        guard let context = unsafe context else { return -1 }
        return unsafe iscsi_get_fd(context)
    }

    var events: Int16 {
        guard let context = unsafe context else { return 0 }
        return Int16(truncatingIfNeeded: unsafe iscsi_which_events(context))
    }

    var isDead: Bool { unsafe context == nil }

    func service(_ happened: Int16) -> String? {
        guard let context = unsafe context else { return "the connection is closed" }
        return unsafe iscsi_service(context, Int32(happened)) == 0 ? nil : reason()
    }

    func close(isClean: Bool) {
        guard let context = unsafe context else { return }
        if isClean {
            // Five seconds for a good-bye.
            unsafe _ = iscsi_set_timeout(context, 5)
            unsafe _ = iscsi_logout_sync(context)
        }
        // Requests on their way are called back: cancelled.
        unsafe _ = iscsi_destroy_context(context)
        unsafe self.context = nil
    }

    // MARK: - Requests

    /// What the library calls when a command is done.
    private static let completion: iscsi_command_cb = { _, status, data, context in
        // The operation lasts: who issued it waits for this, or for the connection's end.
        guard let context = unsafe context else { return }
        let operation = unsafe Unmanaged<PendingOperation>.fromOpaque(context).takeUnretainedValue()
        let task = unsafe data?.assumingMemoryBound(to: scsi_task.self)
        if status == Int32(SCSI_STATUS_GOOD.rawValue) {
            let isRead = unsafe task?.pointee.xfer_dir == Int32(SCSI_XFER_READ.rawValue)
            let isShort = unsafe isRead && task?.pointee.residual_status == SCSI_RESIDUAL_UNDERFLOW
            operation.finish(isShort ? EIO : 0, isShort ? "the target sent too little" : "")
        } else if status == Int32(SCSI_STATUS_CHECK_CONDITION.rawValue), let task = unsafe task {
            let sense = unsafe task.pointee.sense
            let key = unsafe scsi_sense_key_str(Int32(sense.key.rawValue)).map { unsafe String(cString: $0) } ?? "?"
            let more = unsafe scsi_sense_ascq_str(Int32(sense.ascq)).map { unsafe String(cString: $0) } ?? "?"
            let code = sense.key == SCSI_SENSE_ILLEGAL_REQUEST ? EOPNOTSUPP : EIO
            operation.finish(code, "\(key), \(more)", isPassing: sense.key == SCSI_SENSE_UNIT_ATTENTION)
        } else {
            // Cancelled, timed out: what the library adds to the statuses of SCSI.
            let isOurs = UInt32(bitPattern: status) >= SCSI_STATUS_CANCELLED.rawValue
            let isBusy = [SCSI_STATUS_BUSY.rawValue, SCSI_STATUS_TASK_SET_FULL.rawValue].contains(
                UInt32(bitPattern: status))
            operation.finish(EIO, "the target answers with status \(status)", isPassing: isBusy || isOurs)
        }
        if let task = unsafe task { unsafe scsi_free_scsi_task(task) }
    }

    private static func pointer(_ operation: PendingOperation) -> UnsafeMutableRawPointer {
        unsafe Unmanaged.passUnretained(operation).toOpaque()
    }

    func read(_ buffer: IOBuffer, _ offset: UInt64, _ unit: Unit, _ operation: PendingOperation) -> String? {
        guard let context = unsafe context else { return "the connection is closed" }
        let block = offset / unit.blockSize
        let size = Int32(unit.blockSize)
        let count = UInt32(buffer.count)
        let task =
            unsafe unit.isWide
            ? iscsi_read16_task(
                context, unitNumber, block, count, size, 0, 0, 0, 0, 0, Self.completion, Self.pointer(operation))
            : iscsi_read10_task(
                context, unitNumber, UInt32(block), count, size, 0, 0, 0, 0, 0, Self.completion,
                Self.pointer(operation))
        guard let task = unsafe task else { return reason() }
        // No answer is looked at before this thread gives the connection back.
        let start = unsafe buffer.pointer.assumingMemoryBound(to: UInt8.self)
        unsafe _ = scsi_task_add_data_in_buffer(task, Int32(buffer.count), start)
        return nil
    }

    func write(_ bytes: IOBytes, _ offset: UInt64, _ unit: Unit, _ operation: PendingOperation) -> String? {
        guard let context = unsafe context else { return "the connection is closed" }
        let block = offset / unit.blockSize
        let size = Int32(unit.blockSize)
        let count = UInt32(bytes.count)
        // The library only reads there.
        let start = unsafe UnsafeMutablePointer(mutating: bytes.pointer.assumingMemoryBound(to: UInt8.self))
        let task =
            unsafe unit.isWide
            ? iscsi_write16_task(
                context, unitNumber, block, start, count, size, 0, 0, 0, 0, 0, Self.completion,
                Self.pointer(operation))
            : iscsi_write10_task(
                context, unitNumber, UInt32(block), start, count, size, 0, 0, 0, 0, 0, Self.completion,
                Self.pointer(operation))
        return unsafe task == nil ? reason() : nil
    }

    func flush(_ operation: PendingOperation) -> String? {
        guard let context = unsafe context else { return "the connection is closed" }
        let task = unsafe iscsi_synchronizecache10_task(
            context, unitNumber, 0, 0, 0, 0, Self.completion, Self.pointer(operation))
        return unsafe task == nil ? reason() : nil
    }

    func unmap(_ range: Range<UInt64>, _ unit: Unit, _ operation: PendingOperation) -> String? {
        guard let context = unsafe context else { return "the connection is closed" }
        var list = unmap_list(
            lba: range.lowerBound / unit.blockSize,
            num: UInt32((range.upperBound - range.lowerBound) / unit.blockSize))
        // The list is copied into the command.
        let task = unsafe iscsi_unmap_task(
            context, unitNumber, 0, 0, &list, 1, Self.completion, Self.pointer(operation))
        return unsafe task == nil ? reason() : nil
    }

    /// Writes a block again and again; it lasts until the operation is done.
    func writeSame(
        _ block: IOBytes, _ range: Range<UInt64>, _ unit: Unit, _ operation: PendingOperation
    ) -> String? {
        guard let context = unsafe context else { return "the connection is closed" }
        let start = unsafe UnsafeMutablePointer(mutating: block.pointer.assumingMemoryBound(to: UInt8.self))
        let task = unsafe iscsi_writesame16_task(
            context, unitNumber, range.lowerBound / unit.blockSize, start, UInt32(block.count),
            UInt32((range.upperBound - range.lowerBound) / unit.blockSize), 0, unit.unmapsZeros ? 1 : 0, 0, 0,
            Self.completion, Self.pointer(operation))
        return unsafe task == nil ? reason() : nil
    }
}
