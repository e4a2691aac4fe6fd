import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// What each layer of a chain has, as extents and as a picture.
struct ChainPictureTests {
    private static let size = 6 << 20

    /// A chain of three images in three formats, with names that XML does not like.
    private func makeChain(in folder: TemporaryFolder) throws -> String {
        var base = NewImage(path: folder.file("a <b> & \"c\".vhd"))
        base.size = UInt64(Self.size)
        try base.create()
        try write(base.path, [(0, 700_000), (3 << 20, 100_000)])
        var middle = NewImage(path: folder.file("middle\u{202E}\u{1}.qcow2"))
        middle.parent = base.path
        try middle.create()
        try write(middle.path, [(1 << 20, 5000), (5 << 20, 512)])
        var top = NewImage(path: folder.file("top.qcow2"))
        top.parent = middle.path
        try top.create()
        try write(top.path, [(2 << 20, 70_000)])
        let disk = try Disk.open(top.path, options: options(isWritable: true))
        try disk.discard(offset: 0, length: 131_072)
        try disk.close()
        return top.path
    }

    private func options(isWritable: Bool) -> DiskOptions {
        var options = DiskOptions(isWritable: isWritable)
        options.lazyFlushInterval = 0
        return options
    }

    private func write(_ path: String, _ places: [(Int, Int)]) throws {
        let disk = try Disk.open(path, options: options(isWritable: true))
        for (start, count) in places { try disk.write([UInt8](repeating: 3, count: count), at: UInt64(start)) }
        try disk.close()
    }

    /// One layer over the other, they give what the disk tells as a whole.
    @Test func layersMakeTheDisk() throws {
        let folder = try TemporaryFolder()
        let disk = try Disk.open(try makeChain(in: folder), options: options(isWritable: false))
        #expect(disk.layerCount == 3)
        var kinds = [String](repeating: "unallocated", count: Self.size / 512)
        for layer in (0..<3).reversed() {
            var end: UInt64 = 0
            try disk.forEachExtent(ofLayer: layer, offset: 0, length: disk.size) { extent in
                #expect(extent.offset == end && extent.length > 0)
                end = extent.offset + extent.length
                let kind: String? =
                    switch extent.content {
                    case .absent: nil
                    case .zero: "zero \(layer)"
                    case .encoded: "encoded \(layer)"
                    case .data: "data \(layer)"
                    }
                if let kind { for sector in extent.offset / 512..<end / 512 { kinds[Int(sector)] = kind } }
                return true
            }
            #expect(end == disk.size)
        }
        try disk.forEachExtent(offset: 0, length: disk.size) { extent in
            let kind =
                switch extent.source {
                case .data(let layer, _, _): "data \(layer)"
                case .encoded(let layer, _): "encoded \(layer)"
                case .zero(let layer): "zero \(layer)"
                case .unallocated: "unallocated"
                }
            for sector in extent.offset / 512..<(extent.offset + extent.length) / 512 {
                if kinds[Int(sector)] != kind { Issue.record("sector \(sector): \(kinds[Int(sector)]), not \(kind)") }
            }
            return true
        }
        #expect(Set(kinds).isSuperset(of: ["data 0", "zero 0", "data 1", "data 2", "unallocated"]))
        // It ends when it is told to.
        var count = 0
        try disk.forEachExtent(ofLayer: 0, offset: 0, length: disk.size) { _ in
            count += 1
            return false
        }
        #expect(count == 1)
        #expect(throws: DiskError.self) { try disk.forEachExtent(ofLayer: 3, offset: 0, length: 1) { _ in true } }
        #expect(throws: DiskError.self) {
            try disk.forEachExtent(ofLayer: 0, offset: 1, length: disk.size) { _ in true }
        }
        try disk.close()
    }

    /// XML by another parser's judgement, the same each time, with a row for each image and the names as they are.
    @Test func pictureIsXML() throws {
        let folder = try TemporaryFolder()
        let path = try makeChain(in: folder)
        let disk = try Disk.open(path, options: options(isWritable: false))
        let svg = try ChainPicture(disk).svg
        #expect(try ChainPicture(disk).svg == svg)
        try folder.write(Array(svg.utf8), to: "picture.svg")
        let script = """
            import sys, xml.dom.minidom as m
            d = m.parse(sys.argv[1])
            texts = [t.firstChild.data for t in d.getElementsByTagName('text')]
            rects = d.getElementsByTagName('rect')
            assert d.documentElement.tagName == 'svg' and d.documentElement.getAttribute('version') == '1.1'
            assert 'a <b> & "c".vhd' in texts and 'top.qcow2' in texts, texts
            assert '6 MiB' in texts, texts
            for r in rects:
                x, w = float(r.getAttribute('x') or 0), float(r.getAttribute('width'))
                assert 0 <= x <= 1280 and w > 0 and x + w <= 1280.01, (x, w)
            blue = [r for r in rects if r.getAttribute('fill') == '#2563ad']
            assert len(blue) >= 4, len(blue)
            print(len(rects))
            """
        let count = try Peer.run("python3", "-c", script, folder.file("picture.svg"))
        #expect(Int(count.split(separator: "\n")[0]) ?? 0 < 200)
        try disk.close()
    }

    /// Of many images in small pieces, no more than some thousand rectangles are drawn.
    @Test func pictureIsBounded() throws {
        let folder = try TemporaryFolder()
        var path = ""
        for number in 0..<24 {
            var image = NewImage(path: folder.file("layer\(number).vmdk"))
            (image.blockSize, image.size) = (4096, 16 << 20)
            if !path.isEmpty { (image.parent, image.size) = (path, nil) }
            try image.create()
            path = image.path
            let disk = try Disk.open(path, options: options(isWritable: true))
            for block in stride(from: number, to: 4096, by: 7 + number % 5) {
                try disk.write([UInt8](repeating: 1, count: 4096), at: UInt64(block * 4096))
            }
            try disk.close()
        }
        let disk = try Disk.open(path, options: options(isWritable: false))
        let svg = try ChainPicture(disk).svg
        #expect(svg.split(separator: "<rect").count < 6200)
        try disk.close()
    }

    /// A disk of no bytes, and one whose table of partitions is damaged.
    @Test func unusualDisks() throws {
        let folder = try TemporaryFolder()
        for (number, bytes) in [
            [], [UInt8](repeating: 0xff, count: 4096), [UInt8](repeating: 0, count: 512),
        ].enumerated() {
            try folder.write(bytes, to: "disk\(number).raw")
            let disk = try Disk.open(folder.file("disk\(number).raw"), options: DiskOptions(format: "raw"))
            #expect(try ChainPicture(disk).svg.hasSuffix("</svg>\n"))
            try disk.close()
        }
    }
}
