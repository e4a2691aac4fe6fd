import DiskTesting
import Glibc
import Testing

/// The file system that holds the image has no space left: writers are told, and nothing that was flushed is lost.
extension MountTests {
    @Suite struct FullDiskTests {
        private static let blockSize = 48 << 10

        /// What a block holds in a round.
        private func block(_ number: Int, _ round: Int) -> [UInt8] {
            [UInt8](repeating: UInt8(truncatingIfNeeded: number &* 7 &+ round &* 13 &+ 1), count: Self.blockSize)
        }

        @Test(arguments: ["tmpfs", "ext4"], ["dynamic", "split", "esx-sparse"])
        func noSpaceLeft(_ fileSystem: String, _ variant: String) throws {
            try Stage.use { stage in
                let small = try stage.makeFolder("small")
                if fileSystem == "tmpfs" {
                    try tool("mount", "-t", "tmpfs", "-o", "size=24m", "vdmount-test", small)
                } else {
                    let device = try stage.attach(stage.makeRaw("small.raw", size: 32 << 20))
                    try tool("mkfs.ext4", "-q", "-F", "-m", "0", device)
                    try tool("mount", device, small)
                }
                try tool("sh", "-c", "head -c 6000000 /dev/urandom > '\(small)/filler'")
                let image = "\(small)/disk.vmdk"
                try vdimg("create", "--quiet", "--size", "128M", "--variant", variant, image)

                var disk = try stage.mount(image, "--rw")
                let written = try fill(disk, from: 0, round: 1)
                #expect(written > 50)
                // Still full: the same again, and reads go on.
                #expect(try fill(disk, from: written, round: 2) <= written + 4)
                try expectBlocks(0..<written, round: 1, disk)
                unsafe unlink("\(small)/filler")
                let more = try fill(disk, from: written, round: 3)
                #expect(more > written + 50)
                try expectBlocks(0..<written, round: 1, disk)
                try expectBlocks(written..<more, round: 3, disk)
                try disk.unmount()

                try tool("qemu-img", "check", "-q", image)
                try tool(Programs.vdimg, "check", image)
                disk = try stage.mount(image)
                try expectBlocks(0..<written, round: 1, disk)
                try expectBlocks(written..<more, round: 3, disk)
                try disk.unmount()
                try tool("umount", small)
            }
        }

        /// Writes and syncs block after block until there is no space: the number of the block that failed.
        private func fill(_ disk: MountedDisk, from first: Int, round: Int) throws -> Int {
            try OpenedFile.with(disk.file, O_RDWR) { file in
                for number in first..<(100 << 20) / Self.blockSize {
                    do {
                        let done = try file.write(block(number, round), at: number * Self.blockSize)
                        guard done == Self.blockSize else { return number }
                        if number % 8 == 0 { try file.sync() }
                    } catch let failure as SystemFailure {
                        #expect(failure == SystemFailure(ENOSPC))
                        return number / 8 * 8
                    }
                }
                throw TestFailure("the disk does not become full")
            }
        }

        private func expectBlocks(
            _ numbers: Range<Int>, round: Int, _ disk: MountedDisk, sourceLocation: SourceLocation = #_sourceLocation
        ) throws {
            try OpenedFile.with(disk.file) { file in
                for number in numbers {
                    let bytes = try file.read(at: number * Self.blockSize, count: Self.blockSize)
                    let expected = block(number, round)
                    guard isEqual(bytes[...], expected[...]) else {
                        Issue.record("block \(number) of \(numbers) holds \(bytes[0])", sourceLocation: sourceLocation)
                        return
                    }
                }
            }
        }
    }
}
