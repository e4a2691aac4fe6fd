import DiskImage
import DiskStorage
import DiskTesting
import Testing

@testable import DiskFormats

/// New images are what was asked for, and what other programs read.
struct VDICreateTests {
    private let driver = VDIDriver()

    private func create(_ folder: TemporaryFolder, _ change: (inout CreateRequest) -> Void = { _ in }) throws -> String
    {
        var request = CreateRequest(path: folder.file("disk.vdi"), virtualSize: 5 << 20)
        change(&request)
        try driver.create(request, companions: FolderCompanions())
        return request.path
    }

    private func header(_ path: String) throws -> VDIHeader {
        try VDIHeader(
            parsing: FileStorage(path: path, isWritable: false).availableBytes(at: 0, count: 512, for: .header))
    }

    @Test(arguments: [nil, "dynamic", "fixed", "zero-expand"], [512, 1 << 20])
    func everyVariantPassesThePeer(_ variant: String?, _ alignment: UInt64) throws {
        let folder = try TemporaryFolder()
        let path = try create(folder) {
            $0.variant = variant
            $0.options = ["alignment": String(alignment)]
        }
        try qemuImage("check", "-q", "-f", "vdi", path)
        #expect(try qemuImage("info", path).contains("5 MiB (5242880 bytes)"))
        try folder.write([UInt8](repeating: 0, count: 5 << 20), to: "zeros.raw")
        try qemuImage("compare", "-f", "raw", "-F", "vdi", folder.file("zeros.raw"), path)
        let header = try header(path)
        #expect(header.blocksOffset % alignment == 0 && header.mapOffset % alignment == 0)
        let file = try FileStorage(path: path, isWritable: false)
        let isFixed = variant == "fixed"
        #expect(header.allocatedBlocks == (isFixed ? 5 : 0))
        #expect(header.flags == (variant == "zero-expand" ? 0x100 : 0))
        #expect(try file.length() == header.blocksOffset + (isFixed ? 5 << 20 : 0))
        let allocated = try file.allocatedBytes()
        #expect((allocated >= 5 << 20) == isFixed)
    }

    @Test func fixedWithoutItsSpace() throws {
        let folder = try TemporaryFolder()
        let path = try create(folder) {
            $0.variant = "fixed"
            $0.options = ["preallocation": "off"]
        }
        #expect(try FileStorage(path: path, isWritable: false).allocatedBytes() < 1 << 20)
        try qemuImage("check", "-q", "-f", "vdi", path)
    }

    @Test func whatWasAskedForIsRecorded() throws {
        let folder = try TemporaryFolder()
        let ids = (0..<3).map { _ in DiskUUID.random() }
        let path = try create(folder) {
            $0.uuid = ids[0]
            $0.comment = String(repeating: "ä", count: 127)
            $0.blockSize = 64 << 10
            $0.parent = .init(
                path: "base.vdi", format: "vdi", identity: .init(uuid: ids[1], modificationUUID: ids[2]))
        }
        let header = try header(path)
        #expect(header.uuid == ids[0] && header.comment == String(repeating: "ä", count: 127))
        #expect(header.type == .differencing && header.blockSize == 65_536 && header.blockCount == 80)
        #expect(header.parentUUID == ids[1] && header.parentModificationUUID == ids[2])
        #expect(!header.modificationUUID.isNull && header.modificationUUID != header.uuid)
    }

    @Test func whatCannotBeIsRefusedAndLeavesNothing() throws {
        let folder = try TemporaryFolder()
        let known = ParentDescriptions.known
        let changes: [(inout CreateRequest) -> Void] = [
            { $0.variant = "split" }, { $0.virtualSize = 1000 }, { $0.blockSize = 2048 }, { $0.blockSize = 1_000_000 },
            { $0.blockSize = 512 << 20 }, { $0.comment = String(repeating: "x", count: 256) }, { $0.comment = "a\0b" },
            { $0.options = ["alignment": "1000"] }, { $0.options = ["alignment": "256"] }, { $0.options = ["x": "y"] },
            { $0.options = ["preallocation": "off"] },
            {
                $0.variant = "fixed"
                $0.options = ["preallocation": "some"]
            },
            {
                $0.variant = "fixed"
                $0.parent = known
            },
            { $0.parent = .init(path: "base.raw", format: "raw", identity: .init()) },
            // QEMU's limit, and what is over it.
            { $0.virtualSize = 562_949_819_203_584 + 512 }, { $0.virtualSize = 1 << 49 }, { $0.virtualSize = 1 << 62 },
            { $0.virtualSize = .max - 511 },
        ]
        for (number, change) in changes.enumerated() {
            #expect(throws: DiskError.self, "change \(number)") { try create(folder, change) }
            #expect(throws: DiskError.self, "change \(number)") { try folder.read("disk.vdi") }
        }
    }

    private enum ParentDescriptions {
        static let known = CreateRequest.ParentDescription(
            path: "base.vdi", format: "vdi", identity: .init(uuid: .random(), modificationUUID: .random()))
    }

    /// Larger blocks make larger disks possible.
    @Test func largeDisks() throws {
        for (size, block) in [(16 << 40, 1 << 20), (1 << 50, 64 << 20)] as [(UInt64, UInt64)] {
            let folder = try TemporaryFolder()
            let path = try create(folder) {
                $0.virtualSize = size
                $0.blockSize = block
            }
            #expect(try header(path).diskSize == size)
            if block == 1 << 20 { #expect(try qemuImage("info", path).contains("16 TiB")) }
        }
    }

    @Test func emptyDisk() throws {
        let folder = try TemporaryFolder()
        let path = try create(folder) { $0.virtualSize = 0 }
        #expect(try header(path).blockCount == 0)
        try qemuImage("check", "-q", "-f", "vdi", path)
    }
}
