internal import DiskImage
internal import DiskStorage

/// The two-level mapping of a QED image: an L1 table of L2 tables of clusters, all entries byte offsets of 64 bits
/// ("QED Image File Format Specification", Tables). A plain value, so that translation touches no reference count.
@safe
struct QEDTables {
    /// The entry of a cluster that is zeros, whatever the backing file holds.
    static let zeroCluster: UInt64 = 1

    /// The file with the tables.
    let table: Table
    let l1TableOffset: UInt64
    /// log2 of a cluster's bytes.
    let clusterShift: UInt64
    /// log2 of the entries of a table.
    let tableShift: UInt64
    /// Where the first cluster for tables and data may begin.
    let firstClusterOffset: UInt64
    /// Where the file ends, or will end after the next flush: no entry points beyond.
    let end: FileEnd
    /// Whether an entry that leads nowhere is one that was never finished, and means "unallocated": in an image that
    /// needs a check and may not be written to. Else it is an error.
    let forgivesOutside: Bool

    init(_ header: QEDHeader, _ table: Table, end: FileEnd, forgivesOutside: Bool) {
        self.table = table
        self.end = end
        self.forgivesOutside = forgivesOutside
        l1TableOffset = header.l1TableOffset
        clusterShift = header.clusterShift
        tableShift = header.tableShift
        firstClusterOffset = header.firstClusterOffset
    }

    var clusterSize: UInt64 { 1 << clusterShift }
    var tableBytes: UInt64 { 8 << tableShift }
    /// Bytes of the disk that an L2 table covers.
    var tableCoverage: UInt64 { 1 << (clusterShift &+ tableShift) }

    /// Where the L1 entry for a byte of the disk stands.
    func l1Place(_ position: UInt64) -> UInt64 { l1TableOffset &+ (position >> (clusterShift &+ tableShift)) &* 8 }

    /// Whether a whole table may begin at `offset`.
    @inline(__always)
    func isTable(_ offset: UInt64) -> Bool {
        let limit = min(end.value, TableSet.offsetLimit)
        return offset & (clusterSize &- 1) == 0 && offset >= firstClusterOffset && limit >= tableBytes
            && offset <= limit &- tableBytes
    }

    /// Whether a cluster may begin at `offset`.
    @inline(__always)
    func isCluster(_ offset: UInt64) -> Bool {
        offset & (clusterSize &- 1) == 0 && offset >= firstClusterOffset && offset < end.value
    }

    /// Appends the extents of a range; see ``ImageBackend/map(offset:length:into:)``.
    @inline(__always)
    func map(offset: UInt64, length: UInt64, into batch: inout ExtentBatch) throws(DiskError) {
        var done: UInt64 = 0
        while done < length {
            let position = offset &+ done
            let left = length &- done
            let l2 = try table.entry64(at: l1Place(position))
            if l2 == 0 || !isTable(l2) {
                if l2 != 0, !forgivesOutside { throw outside("L2 table", l2, at: l1Place(position)) }
                let run = min(left, tableCoverage &- position & (tableCoverage &- 1))
                guard batch.append(Extent(.absent, length: run)) else { return }
                done &+= run
                continue
            }
            let part = min(left, tableCoverage &- position & (tableCoverage &- 1))
            let covered = try map(position, part, l2, into: &batch)
            done &+= covered
            if covered < part { return }
        }
    }

    /// The part of a range that one L2 table covers; answers how many bytes it got through before the batch was full.
    @inline(__always)
    private func map(
        _ offset: UInt64, _ length: UInt64, _ l2: UInt64, into batch: inout ExtentBatch
    ) throws(DiskError) -> UInt64 {
        var done: UInt64 = 0
        while done < length {
            let position = offset &+ done
            let inCluster = position & (clusterSize &- 1)
            var run = min(length &- done, clusterSize &- inCluster)
            let place = l2 &+ (position & (tableCoverage &- 1)) >> clusterShift &* 8
            let entry = try table.entry64(at: place)
            let extent: Extent
            switch entry {
            case 0:
                if length &- done > 64 << clusterShift { run = try absentRun(place, inCluster, length &- done) }
                extent = Extent(.absent, length: run)
            case Self.zeroCluster: extent = Extent(.zero, length: run)
            case _ where isCluster(entry): extent = Extent(.data, length: run, fileOffset: entry &+ inCluster)
            default:
                if !forgivesOutside { throw outside("cluster", entry, at: place) }
                extent = Extent(.absent, length: run)
            }
            guard batch.append(extent) else { return done }
            done &+= run
        }
        return done
    }

    /// How many bytes are unallocated from the cluster on whose entry stands at `place`, in its table.
    private func absentRun(_ place: UInt64, _ inCluster: UInt64, _ length: UInt64) throws(DiskError) -> UInt64 {
        let count = (inCluster + length).dividedRoundingUp(by: clusterSize)
        let stop = try table.endOfRun(of: 0, in: place..<place + count * 8)
        return min(length, max(1, (stop - place) / 8) << clusterShift - inCluster)
    }

    @inline(never)
    private func outside(_ what: StaticString, _ offset: UInt64, at place: UInt64) -> DiskError {
        DiskError(
            .invalidImage,
            "an entry puts its \(what) at byte \(offset), which begins none between \(firstClusterOffset) and "
                + "\(end.value), the file's end; 'vdimg check' tells how much is affected", offset: place)
    }
}
