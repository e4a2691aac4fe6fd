internal import DiskImage
internal import DiskStorage

/// The images of a disk, from the top down, as one translation: which image answers for which byte.
///
/// Does not change; a disk whose layers change gets a new chain. What belongs to the images and not to the disk is
/// kept here: whether changes were announced to the top one, what is known of holes, which layers can be passed over.
@safe
final class Chain: @unchecked Sendable {  // all fields are constant after init, but for what `users` guards
    /// The images, the top one first.
    let layers: [Layer]
    private let references: UnsafeMutablePointer<LayerReference>
    private let count: Int
    /// The size of the disk in bytes: the top image's.
    let size: UInt64
    /// The way past layers that hold nothing; nil where there are too few to be worth it, or a cache has its own.
    private let skipMap: SkipMap?
    /// What searches for data have gone through.
    let holes = HoleMemory()
    /// What answers for the layers from ``firstCached`` down, if there is a cache.
    let cache: BlockCache?
    private let firstCached: Int
    /// The allocation unit of the top image in bytes; 0 if everything is always allocated.
    let blockSize: UInt64
    /// Whether the top image has been told that changes are coming, and whether there were any since the last flush.
    let writing: WritingState
    /// The top image, if it is written and its blocks can be moved.
    let relocating: (any RelocatingBackend)?
    let earlyWriteback: EarlyWriteback?
    /// What is done with writes that change nothing.
    let policy: WritePolicy
    /// Notes what is written, for a merge of the top image that copies it meanwhile.
    let dirty: DirtyRegions?
    /// Buffers for what is completed and zeroed.
    let scratch = ScratchPool()

    /// - Parameter cache: Of the layers from `firstCached` down.
    /// - Parameter isWritable: Whether the top image is written.
    /// - Parameter writing: Of the chain before, if that had the same top image.
    init(
        topFirst layers: [Layer], cache: BlockCache? = nil, firstCached: Int = 0, isWritable: Bool = false,
        dirty: DirtyRegions? = nil, writing: WritingState? = nil, policy: WritePolicy = WritePolicy()
    ) {
        precondition(!layers.isEmpty)
        self.layers = layers
        self.dirty = dirty
        self.policy = policy
        self.writing = writing ?? WritingState()
        blockSize = layers[0].backend.blockSize
        relocating = isWritable ? layers[0].backend as? any RelocatingBackend : nil
        earlyWriteback = isWritable ? EarlyWriteback() : nil
        self.cache = cache
        self.firstCached = cache == nil ? .max : firstCached
        count = layers.count
        unsafe references = .allocate(capacity: count)
        for (index, layer) in layers.enumerated() { unsafe (references + index).initialize(to: layer.reference) }
        size = layers[0].backend.virtualSize
        skipMap = layers.count > 2 && size > 0 && cache == nil ? SkipMap(size: size) : nil
    }

    deinit { unsafe references.deallocate() }

    /// Tells the top image, once, that changes are coming; called before every change.
    @inline(__always)
    func beginWriting() throws(DiskError) {
        if writing.isChanged { return }
        try writing.begin { () throws(DiskError) in try layers[0].backend.beginWriting() }
    }

    /// The top image.
    @inline(__always) var top: LayerReference { unsafe references[0] }
    /// How many images there are.
    var depth: Int { count }

    @inline(__always)
    func reference(_ index: Int) -> LayerReference {
        precondition(index < count)
        return unsafe references[index]
    }

    /// Fills `buffer` with what the disk holds from `offset` on, asking layers from `first` down. The range lies inside
    /// the disk.
    func read(into buffer: IOBuffer, at offset: UInt64, from first: Int = 0) throws(DiskError) {
        var index = first
        var buffer = buffer
        var offset = offset
        var batch = ExtentBatch()
        while buffer.count > 0 {
            if index >= firstCached { return try readCached(into: buffer, at: offset) }
            guard index < count, unsafe offset < references[index].size else { return buffer.zero() }
            let layer = unsafe references[index]
            let length = min(UInt64(buffer.count), layer.size &- offset)
            batch.removeAll()
            try layer.map(offset, length, into: &batch)
            if batch.count == 1, batch[0].kind == .absent, length == UInt64(buffer.count), batch.coveredLength >= length
            {
                index = next(after: index, offset, length)  // nothing here at all: the same question further down
                continue
            }
            let done = try read(batch, of: layer, index, into: buffer, at: offset)
            buffer = buffer.slice(done, buffer.count - done)
            offset += UInt64(done)
        }
    }

    @inline(never)
    private func readCached(into buffer: IOBuffer, at offset: UInt64) throws(DiskError) {
        guard let cache else { preconditionFailure("no layer is cached without a cache") }
        try cache.read(into: buffer, at: offset)
    }

    /// Reads the extents of one answer and answers how many bytes they were.
    private func read(
        _ batch: borrowing ExtentBatch, of layer: LayerReference, _ index: Int, into buffer: IOBuffer, at offset: UInt64
    ) throws(DiskError) -> Int {
        var done = 0
        for number in 0..<batch.count where done < buffer.count {
            let extent = batch[number]
            let part = buffer.slice(done, Int(min(extent.length, UInt64(buffer.count - done))))
            switch extent.kind {
            case .data, .frozen: try layer.read(extent.storage, into: part, at: extent.fileOffset, for: .guestData)
            case .zero: part.zero()
            case .absent:
                let position = offset + UInt64(done)
                try read(into: part, at: position, from: next(after: index, position, UInt64(part.count)))
            case .encoded: try layer.object.backend.readEncoded(extent, into: part)
            }
            done += part.count
        }
        return done
    }

    /// The layer to ask when layer `index` holds nothing of a range.
    @inline(__always)
    private func next(after index: Int, _ offset: UInt64, _ length: UInt64) -> Int {
        guard index == 0, let skipMap else { return index &+ 1 }
        return skipMap.start(offset, length, depth: count) { layer, start, length in
            isVacant(layer, start, length)
        }
    }

    /// Whether a layer holds nothing in a range. A layer that ends inside it, or cannot answer, counts as holding
    /// something: it is asked in its turn.
    private func isVacant(_ index: Int, _ offset: UInt64, _ length: UInt64) -> Bool {
        guard unsafe offset + length <= references[index].size else { return false }
        var batch = ExtentBatch()
        do throws(DiskError) {
            unsafe try references[index].map(offset, length, into: &batch)
        } catch {
            return false
        }
        return batch.count == 1 && batch[0].kind == .absent && batch.coveredLength >= length
    }

    /// Whether a range is known, from the tables alone, to read as zeros, asking layers from `first` down.
    func isKnownZero(_ offset: UInt64, _ length: UInt64, from first: Int) throws(DiskError) -> Bool {
        var position = offset
        var end = offset + length
        var batch = ExtentBatch()
        guard first < count else { return true }
        end = unsafe min(end, references[first].size)
        while position < end {
            batch.removeAll()
            unsafe try references[first].map(position, end - position, into: &batch)
            for number in 0..<batch.count {
                let extent = batch[number]
                switch extent.kind {
                case .data, .encoded, .frozen: return false
                case .zero: break
                case .absent: if try !isKnownZero(position, extent.length, from: first + 1) { return false }
                }
                position += extent.length
            }
        }
        return true
    }
}
