internal import DiskImage
internal import DiskStorage

/// Calls a back end without counting references and without an existential: one virtual call to the subclass that
/// knows the back end's type.
class LayerDispatch: @unchecked Sendable {  // holds one constant reference to a Sendable back end
    func map(_ offset: UInt64, _ length: UInt64, into batch: inout ExtentBatch) throws(DiskError) {
        preconditionFailure("abstract")
    }

    static func make(_ backend: some ImageBackend) -> LayerDispatch { LayerDispatchOf(backend) }
}

// Sendable: as its superclass.
private final class LayerDispatchOf<Backend: ImageBackend>: LayerDispatch, @unchecked Sendable {
    private let backend: Backend
    init(_ backend: Backend) { self.backend = backend }

    override func map(_ offset: UInt64, _ length: UInt64, into batch: inout ExtentBatch) throws(DiskError) {
        try backend.map(offset: offset, length: length, into: &batch)
    }
}

/// One image of a chain with what a request needs of it, reachable without reference counting.
@safe
final class Layer: @unchecked Sendable {  // all fields are constant after init
    /// The image.
    let backend: any ImageBackend
    /// The path by which it was opened.
    let path: String
    /// The files of it that are locked against other processes.
    let lockedFiles: [FileStorage]
    private let handles: [StorageHandle]
    private let dispatchObject: LayerDispatch
    fileprivate let storageReferences: UnsafeMutablePointer<Unmanaged<StorageHandle>>

    init(_ backend: any ImageBackend, path: String, lockedFiles: [FileStorage] = []) {
        self.backend = backend
        self.path = path
        self.lockedFiles = lockedFiles
        handles = backend.storages
        dispatchObject = LayerDispatch.make(backend)
        unsafe storageReferences = .allocate(capacity: max(1, handles.count))
        for (index, handle) in handles.enumerated() {
            unsafe (storageReferences + index).initialize(to: .passUnretained(handle))
        }
    }

    deinit { unsafe storageReferences.deallocate() }

    /// Gives the locks of its files back.
    func unlock() { for file in lockedFiles { file.unlockImage() } }

    /// The form in which requests use it; valid as long as this object lives.
    var reference: LayerReference {
        unsafe LayerReference(
            dispatch: .passUnretained(dispatchObject), storages: storageReferences, storageCount: handles.count,
            size: backend.virtualSize, layer: .passUnretained(self))
    }
}

/// A layer as requests see it: plain pointers, no references to count.
@safe
struct LayerReference {
    fileprivate let dispatch: Unmanaged<LayerDispatch>
    fileprivate let storages: UnsafeMutablePointer<Unmanaged<StorageHandle>>
    fileprivate let storageCount: Int
    /// The size of the image's disk in bytes.
    let size: UInt64
    fileprivate let layer: Unmanaged<Layer>

    /// The layer, retained; not for the hot path.
    var object: Layer { unsafe layer.takeUnretainedValue() }

    /// ``ImageBackend/map(offset:length:into:)``.
    @inline(__always)
    func map(_ offset: UInt64, _ length: UInt64, into batch: inout ExtentBatch) throws(DiskError) {
        let failure: DiskError? = unsafe dispatch._withUnsafeGuaranteedRef { dispatch in
            do throws(DiskError) {
                try dispatch.map(offset, length, into: &batch)
                return nil
            } catch {
                return error
            }
        }
        if let failure { throw failure }
    }

    /// Reads from one of the image's storages.
    @inline(__always)
    func read(
        _ storage: UInt16, into buffer: IOBuffer, at offset: UInt64, for purpose: StoragePurpose
    ) throws(DiskError) {
        precondition(Int(storage) < storageCount)
        let failure: DiskError? = unsafe storages[Int(storage)]._withUnsafeGuaranteedRef { handle in
            do throws(DiskError) {
                try handle.read(into: buffer, at: offset, for: purpose)
                return nil
            } catch {
                return error.about(handle.storage.name)
            }
        }
        if let failure { throw failure }
    }

    /// Writes to one of the image's storages.
    @inline(__always)
    func write(
        _ storage: UInt16, _ bytes: IOBytes, at offset: UInt64, for purpose: StoragePurpose
    ) throws(DiskError) {
        precondition(Int(storage) < storageCount)
        let failure: DiskError? = unsafe storages[Int(storage)]._withUnsafeGuaranteedRef { handle in
            guard handle.isWritable else {
                return DiskError(.readOnly, "this part of the disk is read-only", image: handle.storage.name)
            }
            do throws(DiskError) {
                try handle.write(bytes, at: offset, for: purpose)
                return nil
            } catch {
                return error.about(handle.storage.name)
            }
        }
        if let failure { throw failure }
    }

    /// One of the image's storages, retained.
    func storage(_ index: UInt16) -> StorageHandle {
        precondition(Int(index) < storageCount)
        return unsafe storages[Int(index)].takeUnretainedValue()
    }
}
