internal import CLinux
internal import Glibc

/// What an opener does with an image file, and what it suffers others to do meanwhile: QEMU's model, so that its tools
/// and ours see each other.
///
/// QEMU (`block/file-posix.c`, "image locking") locks single bytes of the image file with open-file-description locks:
/// byte 100 + n is held by who uses permission n, byte 200 + n by who does not share permission n with others. All are
/// shared locks; a conflict is found by asking for the opposite byte.
public struct ImagePermissions: OptionSet, Sendable {
    public let rawValue: UInt8
    public init(rawValue: UInt8) { self.rawValue = rawValue }

    /// Reads that rely on nobody changing the content.
    public static let consistentRead = ImagePermissions(rawValue: 1 << 0)
    public static let write = ImagePermissions(rawValue: 1 << 1)
    public static let writeUnchanged = ImagePermissions(rawValue: 1 << 2)
    public static let resize = ImagePermissions(rawValue: 1 << 3)

    /// What a writer of an image uses.
    public static let writer: ImagePermissions = [.consistentRead, .write, .resize]
    /// What a reader uses.
    public static let reader: ImagePermissions = [.consistentRead]
    /// What neither suffers beside itself.
    public static let exclusive: ImagePermissions = [.write, .resize]

    static let usedBase: Int64 = 100
    static let unsharedBase: Int64 = 200
    static let bits: Range<Int64> = 0..<4
    /// Held by a writer of ours while it takes the others; not QEMU's.
    static let turn: Int64 = 299
    /// From the first byte that may be locked to the last.
    static let lockLength: Int64 = unsharedBase + bits.upperBound - usedBase

    func contains(bit: Int64) -> Bool { rawValue & 1 << UInt8(bit) != 0 }
}

/// Which image locks a descriptor has.
struct HeldImageLock: Sendable {
    var used: ImagePermissions = []
    var unshared: ImagePermissions = []
    /// What it had when another descriptor took over.
    var passedOn: (used: ImagePermissions, unshared: ImagePermissions)?

    var isHeld: Bool { !used.isEmpty || !unshared.isEmpty }
}

extension FileStorage {
    /// Takes the image lock of a reader or a writer, for as long as the file is open.
    ///
    /// Throws ``DiskError/Kind/locked`` with the name of the process in the way. File systems without such locks are
    /// left unlocked, as QEMU does.
    ///
    /// QEMU's order (take, then look who else has taken) can refuse everybody who comes at the same moment. So writers
    /// of ours come one after the other, by a byte that QEMU does not use, and who is refused looks once more.
    ///
    /// - Parameter isShared: Suffers other writers beside itself.
    /// - Parameter predecessor: Another descriptor of this process for the same file, whose locks this one takes over:
    ///   all are shared locks, so that both have them for a moment, and nobody else comes in between. Where this
    ///   throws, the predecessor has them again.
    public func lockImage(isShared: Bool = false, takingOverFrom predecessor: FileStorage? = nil) throws(DiskError) {
        for attempt in 0... {
            guard let refusal = try lockOnce(isShared ? [] : .exclusive, predecessor) else { return }
            predecessor?.resumeImageLock()
            unlockImage()
            if attempt == 2 { throw refusal }
            usleep(UInt32.random(in: 2_000...20_000))
        }
    }

    /// One attempt: nil, or who is in the way.
    private func lockOnce(
        _ unshared: ImagePermissions, _ predecessor: FileStorage?
    ) throws(DiskError) -> DiskError? {
        if traits.isWritable {
            // Whoever has it gives it back at once; on a file system without locks there is no waiting.
            var waited = 0
            while clinux_ofd_lock(descriptor, ImagePermissions.turn, 1, true) == -EAGAIN, waited < 200 {
                usleep(5_000)
                waited += 1
            }
        }
        defer { if traits.isWritable { _ = clinux_ofd_unlock(descriptor, ImagePermissions.turn, 1) } }
        let used: ImagePermissions = traits.isWritable ? .writer : .reader
        try take(used, unshared)
        // From here on this one's locks keep others out; the predecessor's would look like another process's.
        predecessor?.passImageLockOn()
        for bit in ImagePermissions.bits {
            let isRefused = used.contains(bit: bit) && isLockedByOther(ImagePermissions.unsharedBase + bit)
            let isDisturbed =
                unshared.contains(bit: bit) && isLockedByOther(ImagePermissions.usedBase + bit)
            guard isRefused || isDisturbed else { continue }
            let holder = LockHolder.find(identity).map { "process \($0)" } ?? "another process"
            return DiskError(
                .locked,
                traits.isWritable
                    ? "is in use by \(holder), so it cannot be opened for writing"
                    : "is being written by \(holder)", image: name)
        }
        return nil
    }

    /// Gives the image lock back, if it was taken. Closing alone may not do it: a process that is just being started
    /// has the descriptor too, until it runs its own program.
    public func unlockImage() {
        imageLock.withLock { lock in
            if lock.isHeld { _ = clinux_ofd_unlock(descriptor, ImagePermissions.usedBase, ImagePermissions.lockLength) }
            lock = HeldImageLock()
        }
    }

    private func passImageLockOn() {
        let lock = imageLock.withLock { $0 }
        guard lock.isHeld else { return }
        unlockImage()
        imageLock.withLock { $0.passedOn = (lock.used, lock.unshared) }
    }

    /// Takes back the locks that were passed on to another descriptor, before that gives up its own; without a look at
    /// others, who could not come in between.
    public func resumeImageLock() {
        guard let passedOn = imageLock.withLock({ $0.passedOn }) else { return }
        try? take(passedOn.used, passedOn.unshared)  // they are shared locks, and were to be had
    }

    /// Gives back what a writer has locked and a reader has not, for a file that is only read from now on.
    public func keepReaderLocks() {
        imageLock.withLock { lock in
            for bit in ImagePermissions.bits
            where lock.used.contains(bit: bit) && !ImagePermissions.reader.contains(bit: bit) {
                _ = clinux_ofd_unlock(descriptor, ImagePermissions.usedBase + bit, 1)
            }
            lock.used.formIntersection(.reader)
        }
    }

    private func take(_ used: ImagePermissions, _ unshared: ImagePermissions) throws(DiskError) {
        imageLock.withLock { $0 = HeldImageLock(used: used, unshared: unshared) }
        for bit in ImagePermissions.bits {
            if used.contains(bit: bit) { try take(ImagePermissions.usedBase + bit) }
            if unshared.contains(bit: bit) { try take(ImagePermissions.unsharedBase + bit) }
        }
    }

    private func take(_ byte: Int64) throws(DiskError) {
        let result = lockByte(byte)
        // EINVAL, EOPNOTSUPP, ENOLCK: no such locks here. EAGAIN cannot be: all locks are shared.
        if -result == 11 || -result == 13 {
            let holder = LockHolder.find(identity).map { "process \($0)" } ?? "another process"
            throw DiskError(.locked, "is locked by \(holder)", image: name)
        }
    }
}
