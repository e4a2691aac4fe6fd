internal import DiskImage
internal import DiskStorage

/// What a request needs to know of an extent: a plain value, so that translation touches no reference count.
@safe
struct VMDKExtentMap {
    /// How the extent's bytes are found.
    enum Kind: UInt8 {
        /// One after the other in a file (FLAT, VMFS).
        case flat
        /// Nowhere: they are zeros (ZERO).
        case zero
        /// May not be accessed (NOACCESS), or its file is missing and only information was asked for.
        case inaccessible
        /// By grain directory and grain tables of 32-bit sectors (KDMV, COWD).
        case sparse
        /// As sparse, with each grain compressed (streamOptimized).
        case compressed
        /// By the 64-bit tables of seSparse.
        case seSparse
    }

    let kind: Kind
    /// The first byte of the disk that it covers, and how many.
    let start: UInt64
    let length: UInt64
    /// The index of its file among the image's storages.
    let storage: UInt16
    /// Flat: where it begins in its file, in bytes.
    var fileOffset: UInt64 = 0
    /// Sparse: the tables.
    var grains: VMDKGrainTables?

    /// Appends the extents of a part (offsets within this extent); answers how many bytes it got through before the
    /// batch was full.
    @inline(__always)
    func map(_ offset: UInt64, _ length: UInt64, into batch: inout ExtentBatch) throws(DiskError) -> UInt64 {
        switch kind {
        case .flat:
            return batch.append(Extent(.data, length: length, storage: storage, fileOffset: fileOffset &+ offset))
                ? length : 0
        case .zero:
            return batch.append(Extent(.zero, length: length)) ? length : 0
        case .inaccessible:
            throw DiskError(.refused, "the descriptor forbids access to this part of the disk", offset: start + offset)
        case .sparse, .compressed:
            guard let grains else { preconditionFailure("a sparse extent without tables") }
            guard length < VMDKGrainTables.longRange else {
                return try grains.mapLongRange(offset, length, storage, isEncoded: kind == .compressed, into: &batch)
            }
            return try grains.map(offset, length, storage, isEncoded: kind == .compressed, into: &batch)
        case .seSparse:
            guard let grains else { preconditionFailure("a sparse extent without tables") }
            return try grains.mapSESparse(offset, length, storage, into: &batch)
        }
    }
}

/// The two-level mapping of a sparse extent: a grain directory of grain tables of grains.
///
/// VMware Virtual Disk Format 5.0, "Hosted Sparse Extent Metadata" and "ESX Server Sparse Extents"; all sector numbers
/// in the tables are 32 bits wide.
@safe
struct VMDKGrainTables {
    /// The file with the tables.
    let table: Table
    /// Where the grain directory lies, in bytes.
    let directoryOffset: UInt64
    /// Where its redundant copy lies, in bytes; 0 if there is none.
    var redundantDirectoryOffset: UInt64 = 0
    /// log2 of a grain's bytes.
    let grainShift: UInt64
    /// log2 of the entries of a grain table.
    let tableShift: UInt64
    /// Entry 1 means a grain of zeros.
    var hasZeroGrains = false
    /// The first byte that may hold a grain: what lies before is metadata.
    var firstDataOffset: UInt64 = 512
    /// Where the file ends, so far: no entry points beyond.
    let end: FileEnd
    /// seSparse: where the grain tables and the grains begin, in bytes.
    var seTablesOffset: UInt64 = 0
    var seGrainsOffset: UInt64 = 0

    var grainSize: UInt64 { 1 << grainShift }
    /// The bytes that one grain table covers.
    var tableCoverage: UInt64 { 1 << (grainShift &+ tableShift) }

    @inline(__always)
    func map(
        _ offset: UInt64, _ length: UInt64, _ storage: UInt16, isEncoded: Bool, into batch: inout ExtentBatch
    ) throws(DiskError) -> UInt64 {
        var done: UInt64 = 0
        let end = end.value
        while done < length {
            let position = offset &+ done
            let inTable = position & (tableCoverage &- 1)
            let tableLength = min(length &- done, tableCoverage &- inTable)
            let tableSector = try table.entry32(at: directoryOffset &+ (position >> (grainShift &+ tableShift)) &* 4)
            if tableSector == 0 {
                guard batch.append(Extent(.absent, length: tableLength)) else { return done }
                done &+= tableLength
                continue
            }
            let tableOffset = UInt64(tableSector) &* 512
            if tableOffset &+ 4 << tableShift > end { throw outside("grain table", tableOffset) }
            var inThis: UInt64 = 0
            while inThis < tableLength {
                let place = inTable &+ inThis
                let inGrain = place & (grainSize &- 1)
                let run = min(tableLength &- inThis, grainSize &- inGrain)
                let sector = try table.entry32(at: tableOffset &+ (place >> grainShift) &* 4)
                let extent: Extent
                if sector == 0 {
                    extent = Extent(.absent, length: run)
                } else if sector == 1 && hasZeroGrains {
                    extent = Extent(.zero, length: run)
                } else {
                    let grainOffset = UInt64(sector) &* 512
                    if grainOffset >= end || grainOffset < firstDataOffset { throw outside("grain", grainOffset) }
                    extent =
                        isEncoded
                        ? Extent(
                            .encoded, length: run, storage: storage, fileOffset: grainOffset,
                            skip: UInt32(truncatingIfNeeded: inGrain))
                        : Extent(.data, length: run, storage: storage, fileOffset: grainOffset &+ inGrain)
                }
                guard batch.append(extent) else { return done &+ inThis }
                inThis &+= run
            }
            done &+= tableLength
        }
        return done
    }

    /// seSparse keeps 64-bit entries whose top nibble is their type; undocumented by VMware, read as QEMU's
    /// `block/vmdk.c` reads it.
    func mapSESparse(
        _ offset: UInt64, _ length: UInt64, _ storage: UInt16, into batch: inout ExtentBatch
    ) throws(DiskError) -> UInt64 {
        var done: UInt64 = 0
        while done < length {
            let position = offset &+ done
            let inTable = position & (tableCoverage &- 1)
            let directoryEntry = try table.entry64(
                at: directoryOffset &+ (position >> (grainShift &+ tableShift)) &* 8)
            if directoryEntry == 0 {
                let run = min(length &- done, tableCoverage &- inTable)
                guard batch.append(Extent(.absent, length: run)) else { return done }
                done &+= run
                continue
            }
            guard directoryEntry >> 32 == 0x1000_0000 else {
                throw DiskError(.invalidImage, "a grain directory entry is 0x\(String(directoryEntry, radix: 16))")
            }
            let tableOffset = seTablesOffset &+ (directoryEntry & 0xffff_ffff) &* (8 << tableShift)
            guard tableOffset &+ 8 << tableShift <= min(end.value, TableSet.offsetLimit) else {
                throw outside("grain table", tableOffset)
            }
            let inGrain = position & (grainSize &- 1)
            let run = min(length &- done, grainSize &- inGrain)
            let entry = try table.entry64(at: tableOffset &+ (inTable >> grainShift) &* 8)
            let extent: Extent
            switch entry >> 60 {
            case 0:
                guard entry == 0 else { throw DiskError(.invalidImage, "a grain table entry without type is not 0") }
                let absent = try absentLength(in: tableOffset, from: inTable, upTo: length &- done)
                extent = Extent(.absent, length: absent)
            case 1, 2: extent = Extent(.zero, length: run)
            case 3:
                let number = (entry & 0x0fff_0000_0000_0000) >> 48 | (entry & 0x0000_ffff_ffff_ffff) << 12
                let (relative, overflow) = number.multipliedReportingOverflow(by: grainSize)
                let (grainOffset, overflow2) = seGrainsOffset.addingReportingOverflow(relative)
                guard !overflow, !overflow2, grainOffset < end.value else { throw outside("grain", grainOffset) }
                extent = Extent(.data, length: run, storage: storage, fileOffset: grainOffset &+ inGrain)
            default:
                throw DiskError(.invalidImage, "a grain table entry has the unknown type \(entry >> 60)")
            }
            guard batch.append(extent) else { return done }
            done &+= extent.length
        }
        return done
    }

    @inline(never)
    private func outside(_ what: StaticString, _ offset: UInt64) -> DiskError {
        DiskError(
            .invalidImage,
            "a table entry puts a \(what) at byte \(offset), outside \(firstDataOffset) to \(end.value), "
                + "where the file keeps its data; 'vdimg check' tells how much is affected")
    }
}
