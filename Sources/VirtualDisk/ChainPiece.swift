internal import DiskImage
internal import DiskStorage

/// A run of bytes of a disk, as images that lie one above the other have it: which of them answers, and what.
struct ChainPiece: JoinableRun {
    enum Content: Equatable {
        /// They lie, as they are, in one of the image's storages.
        case stored(storage: UInt16, fileOffset: UInt64)
        /// They must be read through the image. Of joined pieces this says where the first begins.
        case encoded(storage: UInt16, fileOffset: UInt64, skip: UInt32)
        /// The image says that they are zeros.
        case zero
        /// The image ends before them: they are zeros, since what lies below does not show.
        case ended
        /// None of the images says anything: what lies below them shows.
        case absent
    }

    /// The first byte in the disk.
    var offset: UInt64
    var length: UInt64
    /// The index of the image that answers.
    var layer: Int
    var content: Content

    var end: UInt64 { offset + length }
    var range: Range<UInt64> { offset..<end }

    /// What the images say of the bytes.
    enum Holding: Sendable {
        /// One of them holds them.
        case data
        /// They are zeros, whatever lies below.
        case zero
        /// Nothing.
        case nothing
    }

    var holding: Holding {
        switch content {
        case .stored, .encoded: .data
        case .zero, .ended: .zero
        case .absent: .nothing
        }
    }

    func isContinued(by next: ChainPiece) -> Bool {
        switch (content, next.content) {
        case (.stored(let storage, let place), .stored(let nextStorage, let nextPlace)):
            layer == next.layer && storage == nextStorage && place + length == nextPlace
        case (.encoded(let storage, _, _), .encoded(let nextStorage, _, _)):
            layer == next.layer && storage == nextStorage
        case (.zero, .zero), (.ended, .ended): layer == next.layer
        case (.absent, .absent): true
        default: false
        }
    }
}

extension Chain {
    /// All its images.
    var run: LayerRun { LayerRun(layers[...]) }

    /// What is at `offset`, and how many bytes, `limit` at most, are of the same kind and origin.
    func piece(at offset: UInt64, atMost limit: UInt64) throws(DiskError) -> ChainPiece {
        var found: ChainPiece?
        _ = try run.walk(offset..<offset + min(limit, size - offset)) { piece in
            found = piece
            return false
        }
        return found ?? ChainPiece(offset: offset, length: 0, layer: depth, content: .absent)
    }

    /// All files of all layers, as far as they are such.
    var fileIdentities: Set<FileIdentity> {
        var identities: Set<FileIdentity> = []
        for layer in layers {
            for handle in layer.backend.storages {
                if let identity = handle.storage.fileIdentity { identities.insert(identity) }
            }
        }
        return identities
    }
}
