internal import DiskImage
internal import DiskStorage

/// What a chain answers about one byte of its disk, and about how many that follow it: where they come from, in a form
/// in which two disks can be compared without being read.
struct ChainPiece {
    /// What the bytes are.
    enum Kind: Equatable {
        /// They are known to be zeros.
        case zero
        /// They lie in a storage as they are, or compressed.
        case stored
        case encoded
    }

    var kind: Kind
    var length: UInt64
    /// The layer, the storage and the place there of what is stored.
    var layer = 0
    var storage: UInt16 = 0
    var fileOffset: UInt64 = 0
    var skip: UInt32 = 0
    /// Whether an image says that it holds these bytes, be it as zeros.
    var isHeld = false
}

extension Chain {
    /// What is at `offset`, and how many bytes, `limit` at most, are of the same kind and origin.
    func piece(at offset: UInt64, atMost limit: UInt64) throws(DiskError) -> ChainPiece {
        var length = min(limit, size - offset)
        var batch = ExtentBatch()
        for index in 0..<depth {
            let layer = reference(index)
            guard offset < layer.size else { break }
            // What the layer has no bytes for is another piece.
            length = min(length, layer.size - offset)
            batch.removeAll()
            do throws(DiskError) {
                try layer.map(offset, length, into: &batch)
            } catch {
                // What comes before a bad entry may be all that is needed.
                if batch.count == 0 { throw error.about(layer.object.path) }
            }
            let extent = batch[0]
            length = min(length, extent.length)
            switch extent.kind {
            case .absent: continue
            case .zero: return ChainPiece(kind: .zero, length: length, layer: index, isHeld: true)
            case .data, .frozen, .encoded:
                return ChainPiece(
                    kind: extent.kind == .encoded ? .encoded : .stored, length: length, layer: index,
                    storage: extent.storage, fileOffset: extent.fileOffset, skip: extent.skip, isHeld: true)
            }
        }
        return ChainPiece(kind: .zero, length: length)
    }

    /// What tells the file apart in which a piece lies; nil where its storage has no such thing.
    func fileIdentity(of piece: ChainPiece) -> FileIdentity? {
        guard piece.kind != .zero else { return nil }
        return reference(piece.layer).storage(piece.storage).storage.fileIdentity
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
