/// A storage that was opened by its address.
public struct ProvidedStorage: Sendable {
    public let storage: any Storage
    /// What changes whenever the content does (a web server's entity tag); nil where nothing tells.
    public let version: String?

    public init(_ storage: any Storage, version: String? = nil) {
        self.storage = storage
        self.version = version
    }
}

/// Opens storages that are not files, by addresses (URLs), for whoever opens images by name.
///
/// Addresses may hold secrets. They are shown as ``shownName(_:)`` says, and in no other way.
public protocol StorageProvider: Sendable {
    /// Whether a name is an address of one of its storages, and no path.
    func recognizes(_ name: String) -> Bool
    /// The address for messages and lists: without secrets.
    func shownName(_ address: String) -> String
    /// The address that `name` means in the image at `base`, an address or a path; nil if it means none.
    func address(of name: String, namedBy base: String) -> String?
    /// Whether the user allowed that an image names this address. Without that nothing is connected to.
    func permits(_ address: String) -> Bool
    /// Opens the storage at an address. ``DiskError/Kind/notFound`` where the server says that there is none.
    func open(_ address: String, isWritable: Bool) throws(DiskError) -> ProvidedStorage
}
