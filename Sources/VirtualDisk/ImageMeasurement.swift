internal import DiskFormats
internal import DiskImage
public import DiskStorage

/// How large a new image would be, without making it.
public struct ImageMeasurement: Sendable, Equatable {
    /// The format that the image would have.
    public let format: String
    /// The size of its disk in bytes.
    public let virtualSize: UInt64
    /// The bytes of all its files together once it holds what was asked for, as long as the files are, holes included.
    public let required: UInt64
    /// The same once every byte of the disk was written.
    public let fullyAllocated: UInt64
    /// Whether both are the most that it can be: compressed images are smaller, by as much as can be compressed.
    public let isUpperBound: Bool

    /// Measures an image that ``NewImage/create()`` would make of `image`, and that would then be written, in the order
    /// of the disk, with what `contents` shows: nothing if that is nil.
    ///
    /// What `contents` is known, by its tables and by holes of its files, to have as zeros takes no block. With
    /// `readsData` the rest is read, and blocks of zeros in it take none either; that takes as long as a copy. The
    /// image's size is that of `contents` if it has none of its own. Stops with `DiskError.Kind.cancelled` if asked.
    public static func run(
        _ image: NewImage, contents: Disk? = nil, readsData: Bool = false,
        control: OperationControl = OperationControl()
    ) throws(DiskError) -> ImageMeasurement {
        var image = image
        if let contents, image.size == nil { image.size = contents.size }
        let (driver, request) = try image.plan()
        guard let measurable = driver as? any MeasurableDriver else {
            throw DiskError(.unsupported, "images of the format \(driver.name) cannot be measured")
        }
        let files = UnmadeFiles()
        let growth: ImageGrowth
        do throws(DiskError) {
            growth = try measurable.growth(of: request, companions: files)
            try driver.create(request, companions: files)
        } catch {
            throw error.about(image.path)
        }
        let empty = try files.length()
        let size = request.virtualSize
        var count = BlockCount(growth)
        if let contents, growth.blockSize > 0 {
            try count.add(contents, limit: size, readsData: readsData, control)
        }
        var all = BlockCount(growth)
        all.add(0..<size)
        return ImageMeasurement(
            format: driver.name, virtualSize: size,
            required: growth.length(empty: empty, blocks: count.blocks, tables: count.tables),
            fullyAllocated: growth.length(empty: empty, blocks: all.blocks, tables: all.tables),
            isUpperBound: growth.isUpperBound)
    }
}

/// Blocks and tables that ranges of a disk, one after the other, need.
private struct BlockCount {
    private(set) var blocks: UInt64 = 0
    private(set) var tables: UInt64 = 0
    private let growth: ImageGrowth
    /// The first block and table that are not counted yet.
    private var nextBlock: UInt64 = 0
    private var nextTable: UInt64 = 0
    private static let chunkSize: UInt64 = 1 << 20

    init(_ growth: ImageGrowth) { self.growth = growth }

    /// Adds a range that is not empty; it begins in no block before the last one that was added.
    mutating func add(_ range: Range<UInt64>) {
        guard growth.blockSize > 0, !range.isEmpty else { return }
        let size = growth.blockSize
        let first = max(nextBlock, range.lowerBound / size)
        let end = (range.upperBound - 1) / size + 1
        if end > first {
            blocks += end - first
            nextBlock = end
        }
        guard growth.tableCoverage > 0 else { return }
        let firstTable = max(nextTable, range.lowerBound / growth.tableCoverage)
        let endTable = (range.upperBound - 1) / growth.tableCoverage + 1
        if endTable > firstTable {
            tables += endTable - firstTable
            nextTable = endTable
        }
    }

    /// Adds what a disk has before `limit` that is not known, or with `readsData` not found, to be zeros.
    mutating func add(
        _ disk: Disk, limit: UInt64, readsData: Bool, _ control: OperationControl
    ) throws(DiskError) {
        let end = min(disk.size, limit)
        control.begin("measuring", total: end)
        var buffer = [UInt8](repeating: 0, count: Int(Self.chunkSize))
        var position: UInt64 = 0
        while position < end, let data = try disk.nextData(from: position), data < end {
            try control.checkCancelled()
            let hole = min(end, max(try disk.nextHole(from: data), data + 1))
            if readsData {
                position = min(hole, (data / Self.chunkSize + 1) * Self.chunkSize)
                try addData(of: disk, data..<position, &buffer)
            } else {
                add(data..<hole)
                position = hole
            }
            control.advance(to: position)
        }
        control.advance(to: end)
    }

    /// Adds the parts of a range that are not zeros, in steps of a block or of what is smaller.
    private mutating func addData(
        of disk: Disk, _ range: Range<UInt64>, _ buffer: inout [UInt8]
    ) throws(DiskError) {
        let step = min(growth.blockSize, 64 << 10)
        let count = Int(range.upperBound - range.lowerBound)
        var found: [Range<UInt64>] = []
        try buffer.withIOBuffer { (memory) throws(DiskError) in
            try disk.read(into: memory.slice(0, count), at: range.lowerBound)
            var start = range.lowerBound
            while start < range.upperBound {
                let stop = min(range.upperBound, (start / step + 1) * step)
                let part = memory.slice(Int(start - range.lowerBound), Int(stop - start))
                if !part.readOnly.isZero { found.append(start..<stop) }
                start = stop
            }
        }
        for part in found { add(part) }
    }
}

/// Files that are never made: what is written to them is forgotten, how long they would be is not.
private final class UnmadeFiles: CompanionOpener {
    private let files = Locked<[UnmadeFile]>([])

    /// The bytes of all files together.
    func length() throws(DiskError) -> UInt64 {
        files.withLock { $0.reduce(0) { $0.growing(by: 1, of: $1.length()) } }
    }

    func openCompanion(
        _ name: String, of imagePath: String, isWritable: Bool, what: String
    ) throws(DiskError) -> (storage: any Storage, path: String) {
        throw DiskError(.unsupported, "an image that is measured has no other files")
    }

    func createCompanion(
        _ name: String, of imagePath: String
    ) throws(DiskError) -> (storage: any Storage, path: String) {
        let file = UnmadeFile(name)
        files.withLock { $0.append(file) }
        return (file, FileFinder.realFolder(of: imagePath) + "/" + name)
    }

    func removeCompanion(_ name: String, of imagePath: String) {}
}

private final class UnmadeFile: Storage {
    let traits = StorageTraits(isWritable: true)
    let name: String
    private let end = Locked<UInt64>(0)

    init(_ name: String) { self.name = name }

    func length() -> UInt64 { end.withLock { $0 } }

    func read(into buffer: IOBuffer, at offset: UInt64, for purpose: StoragePurpose) -> Int {
        let count = Int(min(UInt64(buffer.count), length() - min(length(), offset)))
        buffer.slice(0, count).zero()
        return count
    }

    func write(_ bytes: IOBytes, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) {
        let stop = try offset.adding(UInt64(bytes.count))
        end.withLock { $0 = max($0, stop) }
    }

    func discard(_ range: Range<UInt64>, mustZero: Bool, for purpose: StoragePurpose) {}
    func setLength(_ length: UInt64) { end.withLock { $0 = length } }
    func flush() {}
    func allocatedBytes() -> UInt64 { 0 }
    func nextData(from offset: UInt64) -> Range<UInt64>? { nil }
}
