internal import DiskPartitions
public import DiskStorage

/// A picture of a chain: a row for each image, the top one first, that shows which part of the disk it holds, with the
/// partitions above.
public struct ChainPicture: Sendable {
    /// An image.
    struct Row: Sendable {
        let path: String
        let format: String
        let size: UInt64
        /// What the image has, from the disk's beginning to its end: neighbours of one shade are one run.
        let runs: [Run]
        let data: UInt64
        let encoded: UInt64
        let zero: UInt64
    }

    /// Cells side by side that look alike.
    struct Run: Sendable {
        /// Where they begin, in cells.
        let start: Int
        var count: Int
        let shade: Shade
    }

    /// The shares of what a cell has, in steps: not so many that neighbours which look alike are told apart.
    struct Shade: Sendable, Hashable {
        static let steps: UInt64 = 16
        let data: UInt8
        let encoded: UInt8
        let zero: UInt8

        static let absent = Shade(data: 0, encoded: 0, zero: 0)

        init(data: UInt8, encoded: UInt8, zero: UInt8) {
            self.data = data
            self.encoded = encoded
            self.zero = zero
        }

        /// What there is at all is seen.
        init(_ cell: LayerCells.Cell, of length: UInt64) {
            func share(_ count: UInt64) -> UInt8 {
                guard count > 0, length > 0 else { return 0 }
                let (high, low) = min(count, length).multipliedFullWidth(by: Self.steps)
                return UInt8(max(1, length.dividingFullWidth((high, low)).quotient))
            }
            self.init(data: share(cell.data), encoded: share(cell.encoded), zero: share(cell.zero))
        }
    }

    /// A partition, or the file system of a disk without any.
    struct Part: Sendable {
        let range: Range<UInt64>
        let title: String
        let detail: String
    }

    /// How many cells there are across the disk.
    let columns: Int
    let size: UInt64
    let rows: [Row]
    let parts: [Part]
    let tableKind: String

    /// Rectangles of all rows together at most.
    private static let rectangleLimit = 6000
    private static let mostColumns = 900

    /// Looks at all images of a disk through their tables, and at its partitions. Nothing else of the disk is read.
    public init(_ disk: Disk) throws(DiskError) {
        size = disk.size
        columns = max(16, min(Self.mostColumns, Self.rectangleLimit / disk.layerCount))
        var rows: [Row] = []
        for (number, layer) in disk.layers.enumerated() {
            let cells = try LayerCells(disk, layer: number, count: columns)
            rows.append(
                Row(
                    path: layer.path, format: layer.format, size: disk.size(ofLayer: number),
                    runs: Self.runs(cells, size: disk.size), data: cells.sum.data, encoded: cells.sum.encoded,
                    zero: cells.sum.zero))
        }
        self.rows = rows
        // What cannot be read of them is no reason to show nothing.
        let table = (try? PartitionTable.read(from: disk)) ?? nil
        tableKind = table?.kind.rawValue.uppercased() ?? ""
        parts = Self.parts(table, disk)
    }

    private static func runs(_ cells: LayerCells, size: UInt64) -> [Run] {
        var runs: [Run] = []
        for (index, cell) in cells.cells.enumerated() {
            let end = index + 1 < cells.cells.count ? cells.start(index + 1) : size
            let shade = Shade(cell, of: end - cells.start(index))
            if let last = runs.last, last.shade == shade {
                runs[runs.count - 1].count += 1
            } else {
                runs.append(Run(start: index, count: 1, shade: shade))
            }
        }
        return runs
    }

    private static func parts(_ table: PartitionTable?, _ disk: Disk) -> [Part] {
        func describe(_ range: Range<UInt64>) -> (kind: String?, label: String?) {
            let found = try? FileSystem.detect(
                in: disk, offset: range.lowerBound, length: range.upperBound - range.lowerBound)
            return (found?.kind.rawValue, found?.label)
        }
        guard let table, !table.partitions.isEmpty else {
            let found = describe(0..<disk.size)
            guard let kind = found.kind, disk.size > 0 else { return [] }
            return [
                Part(
                    range: 0..<disk.size, title: [kind, found.label].compactMap { $0 }.joined(separator: " "),
                    detail: "\(kind), \(Text.size(disk.size)), no partition table")
            ]
        }
        return table.partitions.map { partition in
            let found = describe(partition.range)
            let names = [found.label ?? partition.name, found.kind ?? partition.typeName ?? partition.type]
            let detail = [
                "partition \(partition.number)", partition.name, partition.typeName ?? partition.type, found.kind,
                found.label, Text.size(partition.length),
            ]
            return Part(
                range: partition.range,
                title: "\(partition.number) " + names.compactMap { $0 }.joined(separator: " · "),
                detail: detail.compactMap { $0 }.joined(separator: ", "))
        }
    }

    /// Text of a picture.
    enum Text {
        /// A size as people read it.
        static func size(_ bytes: UInt64) -> String {
            let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
            var unit = 0
            while unit < units.count - 1, bytes >> UInt64(unit * 10) >= 1024 { unit += 1 }
            let scale = UInt64(1) << UInt64(unit * 10)
            let tenths = bytes / scale * 10 + bytes % scale / max(1, scale / 10)
            let (whole, rest) = (min(tenths, .max) / 10, min(tenths % 10, 9))
            return rest == 0 || unit == 0 ? "\(whole) \(units[unit])" : "\(whole).\(rest) \(units[unit])"
        }
    }
}
