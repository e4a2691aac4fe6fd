internal import DiskImage
internal import DiskStorage
internal import Glibc

/// Which images in which state a cache is of: whatever changes them, with any tool, changes it.
struct CacheIdentity: Equatable {
    /// The topmost cached image's UUID; of a format that has none, one made of path, size and time.
    let uuid: DiskUUID
    /// Made of everything that is known of all cached images and their files.
    let modificationUUID: DiskUUID
    /// Whether a change would show. Those of a device do not.
    let isReliable: Bool

    /// - Parameter layers: The cached images, the topmost first.
    /// - Parameter files: All their files, with what was known of each when it was opened.
    init(_ layers: ArraySlice<Layer>, _ files: ArraySlice<OpenedFile>, _ options: DiskOptions) {
        var all = CacheHash()
        all.add(UInt64(layers.count))
        for layer in layers {
            let identity = layer.backend.identity
            all.add(layer.backend.format)
            all.add(layer.backend.virtualSize)
            all.add(identity.uuid?.bytes ?? [])
            all.add(identity.modificationUUID?.bytes ?? [])
            all.add(UInt64(identity.contentID ?? 0))
        }
        // The same file shows another disk then.
        all.add(options.snapshot ?? "")
        for (name, value) in options.formatOptions.sorted(by: { $0.key < $1.key }) {
            all.add(name)
            all.add(value)
        }
        for file in files {
            all.add(file.path)
            all.add(file.stamp.length)
            all.add(file.stamp.inode)
            all.add(UInt64(bitPattern: file.stamp.modified))
        }
        modificationUUID = all.uuid
        isReliable = Self.waitUntilReliable(files)
        if let uuid = layers.first?.backend.identity.uuid, !uuid.isNull {
            self.uuid = uuid
            return
        }
        var top = CacheHash()
        if let file = files.first {
            top.add(file.path)
            top.add(file.stamp.length)
            top.add(UInt64(bitPattern: file.stamp.modified))
        }
        uuid = top.uuid
    }

    /// Times of change have the kernel's ticks, or on some file systems seconds, for their unit: what changed right
    /// before a file was opened may change once more without another time. So that long is waited, after which every
    /// change shows. Answers false where it does not, or if there was one since the file was opened.
    private static func waitUntilReliable(_ files: ArraySlice<OpenedFile>) -> Bool {
        if files.contains(where: { $0.stamp.isDevice }) { return false }
        let second = 1_000_000_000 as Int64
        for file in files {
            let modified = file.stamp.modified
            let unit = modified % second == 0 ? 2 * second : 20_000_000
            var now = timespec()
            unsafe clock_gettime(CLOCK_REALTIME, &now)
            let age = Int64(now.tv_sec) &* second &+ Int64(now.tv_nsec) &- modified
            if (0..<unit).contains(age) { usleep(UInt32((unit - age) / 1000 + 1)) }
        }
        return files.allSatisfy { file in file.file.map { FileStamp($0) == file.stamp } ?? true }
    }
}

/// A file that was opened for an image.
struct OpenedFile: Sendable {
    /// Its path, with all links resolved.
    let path: String
    /// Nil if it is another storage, whose stamp stays what it is.
    let file: FileStorage?
    /// What was known of it before a byte of it was read.
    let stamp: FileStamp
}

/// What shows that a file was changed.
struct FileStamp: Equatable, Sendable {
    var length: UInt64 = 0
    var inode: UInt64 = 0
    /// In nanoseconds since 1970.
    var modified: Int64 = 0
    /// Whether writing changes none of that, or nothing can be known.
    var isDevice = true

    /// Of a storage that is no file. `version` changes with the content; nil where nothing tells.
    init(length: UInt64, version: UInt64?) {
        self.length = length
        inode = version ?? 0
        isDevice = version == nil
    }

    init(_ file: FileStorage) {
        guard let length = try? file.length(), let modified = try? file.modificationTime() else { return }
        self.length = length
        self.modified = modified
        inode = file.identity.inode
        isDevice = file.traits.hasFixedLength
    }
}

/// FNV-1a with 128 bits: no defence against who wants two alike, who could as well write into the cache.
private struct CacheHash {
    private var state: UInt128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d
    private static let prime: UInt128 = 1 << 88 | 0x13b

    mutating func add(_ bytes: some Sequence<UInt8>) {
        var count: UInt64 = 0
        for byte in bytes {
            state = (state ^ UInt128(byte)) &* Self.prime
            count += 1
        }
        // So that two fields are not one.
        add(count)
    }

    mutating func add(_ text: String) { add(text.utf8) }

    mutating func add(_ number: UInt64) {
        for shift in stride(from: 0 as UInt64, to: 64, by: 8) {
            state = (state ^ UInt128(UInt8(truncatingIfNeeded: number >> shift))) &* Self.prime
        }
    }

    /// As a UUID of version 8, RFC 9562: of a making of one's own.
    var uuid: DiskUUID {
        var bytes = (0..<16).map { UInt8(truncatingIfNeeded: state >> UInt128(120 - 8 * $0)) }
        bytes[6] = bytes[6] & 0x0f | 0x80
        bytes[8] = bytes[8] & 0x3f | 0x80
        return (try? DiskUUID(bigEndian: bytes)) ?? .null
    }
}
