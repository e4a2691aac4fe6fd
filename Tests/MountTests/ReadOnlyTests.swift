import DiskTesting
import Glibc
import Testing

/// What a read-only mount shows is what QEMU reads, and the images stay as they were.
extension MountTests {
    @Suite struct ReadOnlyTests {
        private static let seed = UInt64.random(in: 0...UInt64.max)

        /// Mounts an image and compares it with what qemu-img makes of it.
        private func expectEqualToQEMU(_ stage: Stage, _ image: String, size: Int) throws {
            let expected = try stage.convert(image)
            let before = try stage.fingerprint()
            let disk = try stage.mount(image)
            let status = try FileStatus(disk.file)
            #expect(status.size == size)
            #expect(status.mode == 0o400)
            #expect(status.owner == 0 && status.group == 0)
            try expectSameBytes(disk.file, expected)
            #expect(throws: SystemFailure(EROFS)) { try OpenedFile.with(disk.file, O_RDWR) { _ in } }
            try disk.unmount()
            #expect(try stage.fingerprint() == before)
        }

        @Test(arguments: 1...4) func chain(_ depth: Int) throws {
            try Stage.use { stage in
                let size = 33 << 20 + 512
                var plan = WritePlan(seed: Self.seed &+ UInt64(depth), size: size)
                var image = try stage.makeImage("base.vmdk", size: size)
                try qemuIO(image, plan.writes(30))
                for level in 1..<depth {
                    image = try stage.makeSnapshot("snapshot\(level).vmdk", of: image)
                    try qemuIO(image, plan.writes(20))
                }
                try expectEqualToQEMU(stage, image, size: size)
            }
        }

        @Test(arguments: [
            "monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "streamOptimized",
        ]) func subformat(_ subformat: String) throws {
            try Stage.use { stage in
                let size = 20 << 20
                var plan = WritePlan(seed: Self.seed, size: size)
                let source = try stage.makeRaw("source.raw", size: size)
                try qemuIO(source, format: "raw", plan.writes(25))
                try tool(
                    "qemu-img", "convert", "-O", "vmdk", "-o", "subformat=\(subformat)", source,
                    stage.file("disk.vmdk"))
                try expectEqualToQEMU(stage, stage.file("disk.vmdk"), size: size)
                try expectSameBytes(source, stage.file("expected.raw"))
            }
        }

        /// Disks of several extents, compared where the data is and at the edges of the extents.
        @Test(arguments: ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "monolithicSparse"])
        func moreThanFourGibibytes(_ subformat: String) throws {
            try Stage.use { stage in
                let size = 5 << 30
                let image = try stage.makeImage("disk.vmdk", size: size, subformat: subformat)
                let edges = [0, 2 << 30, 4 << 30, size - 65536, 3 << 30 + 12345]
                let writes = edges.enumerated().map { number, edge in
                    let start = max(0, edge - 70_000)
                    return "write -P \(number + 1) \(start) \(min(size, edge + 140_001) - start)"
                }
                try qemuIO(image, writes)
                let before = try stage.fingerprint(ofBytes: false)
                let disk = try stage.mount(image)
                #expect(try FileStatus(disk.file).size == size)
                try qemuIO(disk.file, format: "raw", readOnly: true, writes.map { $0.replacing("write", with: "read") })
                #expect(try differenceOfSparseFiles(disk.file, stage.convert(image)) == nil)
                try tool("cmp", "-n", "\(64 << 20)", "-i", "\(1 << 30)", disk.file, "/dev/zero")
                try disk.unmount()
                #expect(try stage.fingerprint(ofBytes: false) == before)
            }
        }

        /// A snapshot may be larger or smaller than what it is over.
        @Test(arguments: [3 << 20 + 512, 9 << 20]) func snapshotOfAnotherSize(_ size: Int) throws {
            try Stage.use { stage in
                let base = try stage.makeImage("base.vmdk", size: 5 << 20 + 512)
                try qemuIO(base, "write -P 1 0 \(5 << 20 + 512)")
                let child = stage.file("child.vmdk")
                try tool(
                    "qemu-img", "create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", child, "\(size)")
                try qemuIO(child, "write -P 2 1M 100k")
                try expectEqualToQEMU(stage, child, size: size)
                // Writes at the end of what comes from below fill the rest of the grain with zeros.
                let disk = try stage.mount(child, "--rw")
                try qemuIO(
                    disk.file, format: "raw", "write -P 3 \(size - 700) 700",
                    "write -P 4 \(min(size, 5 << 20) - 90000) 10")
                try tool("cp", disk.file, stage.file("copy.raw"))
                try disk.unmount()
                try expectEqual(child, toRaw: stage.file("copy.raw"))
            }
        }

        @Test func zeroGrainsHideTheParent() throws {
            try Stage.use { stage in
                let size = 16 << 20
                let base = try stage.makeImage("base.vmdk", size: size, "zeroed_grain=on")
                try qemuIO(base, "write -P 1 0 16M", "write -z 3M 1M")
                let child = try stage.makeSnapshot("child.vmdk", of: base, "zeroed_grain=on")
                try qemuIO(child, "write -P 2 1M 100k", "write -z 6M 2M", "write -z 9000000 200000")
                try expectEqualToQEMU(stage, child, size: size)
            }
        }

        /// QEMU's clusters can be other than 64 KiB only in streams; ours in every sparse image.
        @Test(arguments: ["4K", "32K", "1M"]) func otherGrainSizes(_ grain: String) throws {
            try Stage.use { stage in
                let size = 40 << 20 + 1024
                let base = stage.file("base.vmdk")
                try vdimg("create", "--quiet", "--size", "\(size)", "--block-size", grain, base)
                var plan = WritePlan(seed: Self.seed, size: size)
                try qemuIO(base, plan.writes(30))
                let child = stage.file("child.vmdk")
                try vdimg("create", "--quiet", "--parent", base, child)
                try qemuIO(child, plan.writes(30))
                try expectEqualToQEMU(stage, child, size: size)
            }
        }

        /// An image that was not closed is shown as it is, and not touched.
        @Test func uncleanImage() throws {
            try Stage.use { stage in
                let size = 8 << 20
                let image = try stage.makeImage("disk.vmdk", size: size)
                try qemuIO(image, "write -P 5 1M 3M")
                try OpenedFile.with(image, O_WRONLY) { file in _ = try file.write([1], at: 72) }
                try expectEqualToQEMU(stage, image, size: size)
            }
        }

        @Test func rawImage() throws {
            try Stage.use { stage in
                let image = try stage.makeRaw("disk.img", size: 5 << 20)
                try qemuIO(image, format: "raw", "write -P 3 1M 1M")
                let before = try FileStatus(image).modified
                let disk = try stage.mount(image)
                try expectSameBytes(disk.file, image)
                try disk.unmount()
                let after = try FileStatus(image).modified
                #expect(after.tv_sec == before.tv_sec && after.tv_nsec == before.tv_nsec)
            }
        }
    }
}
