import DiskTesting
import Glibc
import Testing

/// Many requests at once: fio writes what it can recognise, reads it back, and again after another mount.
extension MountTests {
    @Suite struct ConcurrencyTests {
        /// Jobs side by side on one disk, each in a part of its own; all blocks are sealed with checksums.
        private static let jobs = """
            [global]
            filename=${DISK}
            verify=crc32c
            verify_fatal=1
            verify_state_save=0
            size=12m
            randseed=31
            group_reporting
            [direct-small]
            rw=randwrite
            bs=4k
            direct=1
            ioengine=libaio
            iodepth=16
            size=6m
            offset=0
            [direct-mixed]
            rw=randrw
            bssplit=4k/40:12k/20:64k/20:100k/20
            bs_unaligned=0
            direct=1
            ioengine=libaio
            iodepth=8
            offset=12m
            [buffered]
            rw=randwrite
            bs=8k
            ioengine=psync
            fsync=64
            offset=24m
            [large]
            rw=write
            bs=1m
            direct=1
            ioengine=libaio
            iodepth=4
            offset=36m
            [odd]
            rw=randwrite
            bs=1536
            ioengine=psync
            size=3m
            offset=48m
            """

        @Test(arguments: [
            ["--variant", "dynamic"], ["--variant", "dynamic", "--block-size", "4K", "--option", "zeroed-grain=on"],
            ["--variant", "split", "--option", "split-size=16M"], ["--variant", "esx-sparse"],
        ]) func verifiedByFio(_ options: [String]) throws {
            try Stage.use { stage in
                let base = stage.file("base.vmdk")
                try vdimg("create", "--quiet", "--size", "64M", base)
                try qemuIO(base, "write -P 1 0 56M")
                let child = stage.file("child.vmdk")
                try tool([Programs.vdimg, "create", "--quiet"] + options + ["--parent", base, child])
                try writeFile(stage.file("jobs"), Self.jobs)
                func fio(_ disk: MountedDisk, _ words: String...) throws {
                    try tool(["env", "-C", stage.path, "DISK=\(disk.file)", "fio"] + words + [stage.file("jobs")])
                }
                var disk = try stage.mount(child, "--rw")
                try fio(disk)
                try qemuIO(disk.file, format: "raw", "read -P 1 51M 5M", "read -P 0 56M 8M")
                try disk.unmount()
                try tool("qemu-img", "check", "-q", child)

                // Verified by the same jobs, which want to open the disk for writing.
                disk = try stage.mount(child, "--rw")
                try fio(disk, "--verify_only")
                try disk.unmount()
                disk = try stage.mount(child)
                try tool("cp", "--sparse=always", disk.file, stage.file("copy.raw"))
                try disk.unmount()
                try expectEqual(child, toRaw: stage.file("copy.raw"))
            }
        }

        /// Readers and writers of the same blocks: what is read is always one of what was written, never a mixture
        /// within a sector, never what lies below where the writer was before.
        @Test func readersBesideWriters() throws {
            try Stage.use { stage in
                let base = stage.file("base.vmdk")
                try vdimg("create", "--quiet", "--size", "16M", base)
                try qemuIO(base, "write -P 1 0 16M")
                let child = stage.file("child.vmdk")
                try vdimg("create", "--quiet", "--parent", base, child)
                let disk = try stage.mount(child, "--rw")
                let writer = """
                    import os, sys
                    disk = os.open(sys.argv[1], os.O_RDWR)
                    for position in range(0, 16 << 20, 20480):
                        data = bytes([2 + position // 20480 % 250]) * min(20480, (16 << 20) - position)
                        os.pwrite(disk, data, position)
                    """
                let reader = """
                    import mmap, os, random, sys
                    disk = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
                    page = mmap.mmap(-1, 65536)
                    for _ in range(1500):
                        position = random.randrange(0, 256) * 65536
                        os.preadv(disk, [page], position)
                        for sector in range(128):
                            number = (position + sector * 512) // 20480
                            found = page[sector * 512:sector * 512 + 512]
                            if found != b"\\1" * 512 and found != bytes([2 + number % 250]) * 512:
                                sys.exit("at %d: %r" % (position + sector * 512, set(found)))
                    """
                let programs = try [writer, reader, reader].map { try stage.start("python3", "-c", $0, disk.file) }
                for program in programs {
                    let result = try program.wait()
                    #expect(result.status == 0, "\(result.errorText)")
                }
                try disk.unmount()
                try tool("qemu-img", "check", "-q", child)
            }
        }

        /// Programs that write, give up and zero blocks of 4 KiB, each its own, side by side in the same grains.
        @Test(arguments: [
            [], ["--option", "zeroed-grain=on"], ["--block-size", "4K", "--option", "zeroed-grain=on"],
            ["--variant", "esx-sparse"],
        ]) func neighboursInOneGrain(_ options: [String]) throws {
            try Stage.use(inMemory: true) { stage in
                let base = stage.file("base.vmdk")
                try vdimg("create", "--quiet", "--size", "24M", base)
                try qemuIO(base, "write -P 1 0 20M")
                let child = stage.file("child.vmdk")
                try tool([Programs.vdimg, "create", "--quiet"] + options + ["--parent", base, child])
                let disk = try stage.mount(child, "--rw")
                let program = """
                    import ctypes, mmap, os, random, sys
                    path, me, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
                    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
                    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
                    choice = random.Random(seed + me)
                    disk = os.open(path, os.O_RDWR | os.O_DIRECT)
                    page = mmap.mmap(-1, 4096)
                    own = range(me, os.fstat(disk).st_size // 4096, 4)
                    known = {}
                    def check(block):
                        os.preadv(disk, [page], block * 4096)
                        if page[:] != bytes([known[block]]) * 4096:
                            sys.exit("seed %d: block %d: %r, not %d" % (seed, block, set(page[:]), known[block]))
                    for step in range(1500):
                        block = choice.choice(own[:300]) if step % 2 else choice.choice(own)
                        what = choice.randrange(10)
                        if what < 5:
                            known[block] = choice.randrange(1, 256)
                            page[:] = bytes([known[block]]) * 4096
                            os.pwrite(disk, page, block * 4096)
                        elif what < 7:
                            known[block] = 0
                            if fallocate(disk, 3 if what == 5 else 0x11, block * 4096, 4096):
                                sys.exit("fallocate: error %d" % ctypes.get_errno())
                        elif known and (what < 9 or step % 50):
                            check(choice.choice(list(known)))
                        else:
                            os.fsync(disk)
                    for block in known:
                        check(block)
                    """
                let seed = Int.random(in: 0...1 << 40)
                let programs = try (0..<4).map {
                    try stage.start("python3", "-c", program, disk.file, "\($0)", "\(seed)")
                }
                for program in programs {
                    let result = try program.wait()
                    #expect(result.status == 0, "\(result.errorText)")
                }
                try tool("cp", disk.file, stage.file("copy.raw"))
                try disk.unmount()
                try expectEqual(child, toRaw: stage.file("copy.raw"))
                try tool(Programs.vdimg, "check", child)
            }
        }
    }
}
