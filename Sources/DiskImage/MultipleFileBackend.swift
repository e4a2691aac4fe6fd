public import DiskStorage

/// A file of an image beside the one that is named, and what it shall be called.
public struct CompanionFile: Sendable, Equatable {
    /// As the image names it now, relative to its folder; without a folder part.
    public let name: String
    /// As it shall name it.
    public let newName: String

    public init(name: String, newName: String) {
        self.name = name
        self.newName = newName
    }
}

/// A back end whose image may have further files, named after the first one or not, that go where it goes.
public protocol MultipleFileBackend: ImageBackend {
    /// The files beside the first one that belong to the image (a device does not, nor what lies in another folder),
    /// and what creation would call them for an image whose first file has that name.
    /// ``DiskError/Kind/unsupported`` where they cannot be called otherwise.
    func companions(whenNamed name: String) throws(DiskError) -> [CompanionFile]

    /// What the first file must hold when it is called `name` and the others have their new names; nil: what it holds
    /// now. With a `parent` it names that one as its own.
    func firstFile(
        whenNamed name: String, _ companions: [CompanionFile], parent: CreateRequest.ParentDescription?
    ) throws(DiskError) -> [UInt8]?

    /// Notes that the first file, which is open for writing, is called `name`, where it says how it is called.
    func noteName(_ name: String) throws(DiskError)
}

extension MultipleFileBackend {
    public func noteName(_ name: String) throws(DiskError) {}
}
