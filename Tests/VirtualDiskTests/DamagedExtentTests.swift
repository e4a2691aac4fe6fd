import DiskImage
import DiskStorage
import DiskTesting
import Testing
import VirtualDisk

/// An extent that is damaged as a whole: refused where its disk is asked for, described where the image is.
struct DamagedExtentTests {
    private static func damage(_ path: String) throws -> String? {
        try ImageInformation.read(path)[0].properties.first { $0.key == "damage" }?.value
    }

    private static func makeSparse(_ folder: TemporaryFolder, size: UInt64) throws -> String {
        var image = NewImage(path: folder.file("disk.vmdk"))
        image.size = size
        try image.create()
        let disk = try Disk.open(image.path, options: DiskOptions(isWritable: true))
        try disk.write([UInt8](repeating: 7, count: 512), at: 0)
        try disk.close()
        return image.path
    }

    /// Cut off inside the primary tables: the redundant ones are whole, and repair needs no more.
    @Test func truncatedInItsTables() throws {
        let folder = try TemporaryFolder()
        let path = try Self.makeSparse(folder, size: 100 << 30)
        try FileStorage(path: path, isWritable: true).setLength(10 << 20)
        for isWritable in [false, true] {
            #expect { try Disk.open(path, options: DiskOptions(isWritable: isWritable)) } throws: { error in
                (error as? DiskError)?.kind == .invalidImage && "\(error)".contains("cut short")
            }
        }
        #expect(try Self.damage(path)?.contains("cut short") == true)
        let report = try ImageCheck.run(path)
        #expect(report.remaining(.repairable) > 1000)
        #expect(report.findings[0].message.contains("cut short"))
        #expect(report.remaining(.loss) == 1, "the one grain lay beyond the end")
        #expect(try FileStorage(path: path, isWritable: false).length() == 10 << 20, "a check changed the image")
        let repair = try ImageCheck.run(path, options: DiskOptions(isWritable: true), repair: true)
        #expect(repair.remaining(.loss) == 0 && repair.remaining(.repairable) == 0)
        let after = try ImageCheck.run(path)
        #expect(after.remaining(.loss) == 0 && after.remaining(.repairable) == 0, "\(after.findings)")
        #expect(try Self.damage(path) == nil)
        try Peer.run("qemu-img", "check", "-q", "-f", "vmdk", path)
        let disk = try Disk.open(path, options: DiskOptions(isWritable: true))
        #expect(try disk.read(at: 0, count: 512) == [UInt8](repeating: 0, count: 512))
        try disk.write([UInt8](repeating: 8, count: 512), at: 99 << 30)
        try disk.close()
        #expect(try ImageCheck.run(path).remaining(.loss) == 0)
    }

    /// "See the footer" in a file that has none.
    @Test func footerThatIsNotThere() throws {
        let folder = try TemporaryFolder()
        let path = try Self.makeSparse(folder, size: 64 << 20)
        try FileStorage(path: path, isWritable: true).write([UInt8](repeating: 0xff, count: 8), at: 56, for: .header)
        #expect { try Disk.open(path) } throws: { ($0 as? DiskError)?.kind == .invalidImage }
        let information = try ImageInformation.read(path)[0]
        #expect(information.virtualSize == 64 << 20)
        #expect(information.files == [path])
        #expect(try Self.damage(path)?.contains("footer") == true)
        let before = try folder.read("disk.vmdk")
        for isRepair in [false, true] {
            let report = try ImageCheck.run(path, options: DiskOptions(isWritable: isRepair), repair: isRepair)
            #expect(report.remaining(.loss) == 1)
            #expect(report.findings.first?.message.contains("footer") == true)
        }
        #expect(try folder.read("disk.vmdk") == before)
    }

    /// An overhead that no file can have is not made true by repair.
    @Test func absurdOverhead() throws {
        let folder = try TemporaryFolder()
        let path = try Self.makeSparse(folder, size: 64 << 20)
        try FileStorage(path: path, isWritable: true).write([0, 0, 0, 0, 0, 0, 1, 0], at: 64, for: .header)
        let length = try FileStorage(path: path, isWritable: false).length()
        #expect { try Disk.open(path) } throws: { ($0 as? DiskError)?.kind == .invalidImage }
        #expect(try Self.damage(path) != nil)
        #expect(try ImageCheck.run(path).remaining(.loss) > 0)
        let repair = try ImageCheck.run(path, options: DiskOptions(isWritable: true), repair: true)
        #expect(repair.remaining(.loss) > 0)
        #expect(try FileStorage(path: path, isWritable: false).length() == length)
    }

    @Test func shortFlatExtent() throws {
        let folder = try TemporaryFolder()
        var image = NewImage(path: folder.file("disk.vmdk"))
        image.size = 8 << 20
        image.variant = "fixed"
        try image.create()
        #expect(try ImageCheck.run(image.path).findings.isEmpty)
        try FileStorage(path: folder.file("disk-flat.vmdk"), isWritable: true).setLength(5 << 20)
        #expect(throws: DiskError.self) { try Disk.open(image.path) }
        #expect(try Self.damage(image.path)?.contains("cut short") == true)
        #expect(try ImageCheck.run(image.path).remaining(.loss) == 1)
    }
}
