internal import DiskStorage

/// Storages that are not files: the user names them, or allows that an image does.
extension FileFinder {
    typealias Opened = (storage: any Storage, path: String, identity: FileIdentity)

    /// A name as it may be shown.
    func shownName(_ path: String) -> String {
        guard let provider, provider.recognizes(path) else { return path }
        return provider.shownName(path)
    }

    func isAddress(_ name: String) -> Bool { provider?.recognizes(name) ?? false }

    /// Whether an image is known by the shown name of an address.
    func isRemote(_ shownName: String) -> Bool { addresses.withLock { $0[shownName] != nil } }

    /// Opens the storage at an address.
    func openAddress(
        _ address: String, _ provider: any StorageProvider, isWritable: Bool
    ) throws(DiskError) -> Opened {
        let name = provider.shownName(address)
        let provided: ProvidedStorage
        do throws(DiskError) {
            provided = try provider.open(address, isWritable: isWritable)
        } catch {
            throw error.about(name)
        }
        addresses.withLock { $0[name] = address }
        let identity = FileIdentity(device: .max, inode: Self.hash(address))
        if let opened {
            let stamp = FileStamp(length: try provided.storage.length(), version: provided.version.map(Self.hash))
            opened.withLock { $0.append(OpenedFile(path: name, file: nil, stamp: stamp)) }
        }
        return (wrap?(provided.storage) ?? provided.storage, name, identity)
    }

    /// Opens the first of `names` that is the address of a storage, if the user allowed that; else answers the first
    /// one that is an address, and was not opened, as it may be shown.
    func openRemote(
        _ names: [String], of imagePath: String, isWritable: Bool
    ) throws(DiskError) -> (opened: Opened?, refused: String?) {
        guard let provider else { return (nil, nil) }
        let base = addresses.withLock { $0[imagePath] } ?? imagePath
        var refused: String?
        var missing: DiskError?
        for name in names.flatMap(Self.candidates) {
            guard let address = provider.address(of: name, namedBy: base) else { continue }
            guard provider.permits(address) else {
                refused = refused ?? provider.shownName(address)
                continue
            }
            do throws(DiskError) {
                return (try openAddress(address, provider, isWritable: isWritable), nil)
            } catch {
                guard error.kind == .notFound else { throw error }
                missing = missing ?? error
            }
        }
        if let missing { throw missing }
        return (nil, refused)
    }

    /// What a stored name may mean: itself, and its last component beside the image.
    private static func candidates(_ name: String) -> [String] {
        guard let last = name.split(whereSeparator: { $0 == "/" || $0 == "\\" }).last.map(String.init), last != name,
            !name.contains("://")
        else { return [name] }
        return [name, last]
    }

    /// FNV-1a with 64 bits.
    private static func hash(_ text: String) -> UInt64 {
        text.utf8.reduce(0xcbf2_9ce4_8422_2325) { ($0 ^ UInt64($1)) &* 0x100_0000_01b3 }
    }
}
