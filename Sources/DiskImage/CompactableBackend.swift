public import DiskStorage

/// A back end whose image can be made smaller where it lies: it can give up blocks without touching their bytes, and,
/// where the format lets it, move blocks to the front and cut its files off.
///
/// Nobody else uses the image meanwhile, and nothing is reserved in it. Calls come in this order: ``beginReleasing()``,
/// ``ImageBackend/drop(offset:length:leaving:)``, flushes, ``planShrinking()``, the calls of ``RelocatingBackend``, if
/// it is one, ``stopShrinking()`` and ``finishShrinking()``; after any of them the image may be closed.
public protocol CompactableBackend: ImageBackend {
    /// The places of blocks that were dropped, for each of its files that has such.
    var released: [ReleasedPlaces] { get }
    /// Whether a block may read as zeros, and have a place in the file all the same.
    var zeroBlocksMayHavePlaces: Bool { get }

    /// Whether it gives up blocks at all; a fixed image does not.
    var givesUpBlocks: Bool { get }

    /// From now on what is dropped keeps its bytes, and may be what the layers below show; also what the format would
    /// otherwise keep in its place (QED) is dropped. The places are noted in ``released``: when a flush has made sure
    /// that no entry on the disk leads there, their space can be given back.
    func beginReleasing()
    /// Everything is flushed: finds out what can move, for ``RelocatingBackend/nextRelocation()``. Answers whether a
    /// file can become shorter, by that or by cutting it off.
    func planShrinking() throws(DiskError) -> Bool
    /// No block moves any more.
    func stopShrinking()
    /// Everything is flushed, and no block moves any more: cuts off the free space at the ends of its files, durably.
    func finishShrinking() throws(DiskError)
}

extension CompactableBackend {
    public var zeroBlocksMayHavePlaces: Bool { false }
    public var givesUpBlocks: Bool { true }
    public func beginReleasing() { for places in released { places.activate() } }
}

/// Places in a file that blocks gave up while their image is being compacted, with what they hold.
///
/// Their bytes must stay until no entry on the disk leads to them: an entry whose removal was lost in a power cut still
/// shows them.
public final class ReleasedPlaces: Sendable {
    /// A part of a file.
    public struct Run: Sendable {
        public let handle: StorageHandle
        public var range: Range<UInt64>
    }

    private struct State {
        var isActive = false
        var runs: [Run] = []
    }

    private let state = Locked(State())

    public init() {}

    /// From now on places are noted.
    func activate() { state.withLock { $0.isActive = true } }

    /// Whether places are noted.
    public var isActive: Bool { state.withLock { $0.isActive } }

    /// Notes a place; answers false, and has not, unless ``activate()`` was called: then its space is given back at
    /// once.
    public func add(_ range: Range<UInt64>, in handle: StorageHandle) -> Bool {
        state.withLock { state in
            guard state.isActive else { return false }
            if let last = state.runs.last, last.handle === handle, last.range.upperBound == range.lowerBound {
                state.runs[state.runs.count - 1].range = last.range.lowerBound..<range.upperBound
            } else {
                state.runs.append(Run(handle: handle, range: range))
            }
            return true
        }
    }

    /// How many runs wait.
    public var count: Int { state.withLock { $0.runs.count } }

    /// The runs that wait, which are forgotten.
    public func take() -> [Run] {
        state.withLock { state in
            defer { state.runs = [] }
            return state.runs
        }
    }
}
