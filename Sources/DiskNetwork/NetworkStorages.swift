public import DiskStorage

/// Opens storages behind a network by their addresses: files on web servers (`http`, `https`), NBD exports (`nbd`,
/// `nbds`, `nbd+unix`, `nbds+unix`) and iSCSI disks (`iscsi`).
///
///     var options = DiskOptions()
///     options.storageProvider = try NetworkStorages(options: ["timeout=10"])
///     let disk = try Disk.open("https://server/disk.vmdk", options: options)
public final class NetworkStorages: StorageProvider {
    private let settings: StorageSettings
    private let rules: AddressRules
    /// The server of the first address that was opened, which a person named: the only one that gets the user's name,
    /// password and headers.
    private let trustedOrigin = Locked<String?>(nil)

    /// - Parameter options: `NAME=VALUE`, as ``StorageSettings/keys`` lists them.
    /// - Parameter allowedAddresses: What images may name: these addresses, and what lies below them.
    public init(options: [String] = [], allowedAddresses: [String] = []) throws(DiskError) {
        settings = try StorageSettings(options)
        rules = try AddressRules(allowedAddresses)
    }

    public func recognizes(_ name: String) -> Bool { AddressRules.recognizes(name) }
    public func shownName(_ address: String) -> String { AddressRules.shownName(address) }

    public func address(of name: String, namedBy base: String) -> String? {
        AddressRules.address(of: name, namedBy: base)
    }

    public func permits(_ address: String) -> Bool { rules.permits(address) }

    public func open(_ address: String, isWritable: Bool) throws(DiskError) -> ProvidedStorage {
        guard let parsed = StorageAddress(address) else {
            throw DiskError(.invalidArgument, "is no address that can be opened", image: shownName(address))
        }
        let isTrusted = trustedOrigin.withLock { origin in
            origin = origin ?? parsed.origin
            return origin == parsed.origin
        }
        var settings = settings
        if !isTrusted {
            settings.user = nil
            settings.password = nil
            settings.headers = []
        }
        switch parsed.kind {
        case .http:
            guard !isWritable else {
                throw DiskError(
                    .readOnly, "a file on a web server cannot be written; with an overlay its disk can",
                    image: parsed.shown)
            }
            let storage = try HTTPStorage(address, settings: settings)
            return ProvidedStorage(storage, version: storage.version)
        case .nbd: return ProvidedStorage(try NBDStorage(address, isWritable: isWritable, settings: settings))
        case .iscsi: return ProvidedStorage(try ISCSIStorage(address, isWritable: isWritable, settings: settings))
        }
    }
}

/// What addresses are, and which of them an image may name.
struct AddressRules: Sendable {
    private let allowed: [StorageAddress]

    init(_ addresses: [String]) throws(DiskError) {
        var allowed: [StorageAddress] = []
        for address in addresses {
            guard let parsed = StorageAddress(address) else {
                throw DiskError(
                    .invalidArgument,
                    "'\(Self.shownName(address).printable(limit: 200))' is no address to allow: give "
                        + "its scheme and server too, as in http://server/images/")
            }
            allowed.append(parsed)
        }
        self.allowed = allowed
    }

    private static let schemes = ["http", "https", "nbd", "nbds", "nbd+unix", "nbds+unix", "iscsi"]

    static func recognizes(_ name: String) -> Bool {
        schemes.contains { name.count > $0.count + 3 && name.prefix($0.count + 3).lowercased() == $0 + "://" }
    }

    static func shownName(_ address: String) -> String {
        if let parsed = StorageAddress(address) { return parsed.shown.printable() }
        guard recognizes(address) else { return address }
        // What cannot be taken apart may hold a password anywhere.
        return String(address.prefix { $0 != ":" }) + "://..."
    }

    static func address(of name: String, namedBy base: String) -> String? {
        recognizes(name) ? name : StorageAddress(base)?.resolve(name)
    }

    func permits(_ address: String) -> Bool {
        guard let parsed = StorageAddress(address) else { return false }
        return allowed.contains { parsed.lies(below: $0) }
    }
}
