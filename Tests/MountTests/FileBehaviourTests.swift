import DiskTesting
import Glibc
import Testing

/// `disk.raw` behaves like a disk in all that a file can do.
extension MountTests {
    @Suite struct FileBehaviourTests {
        private static let seed = UInt64.random(in: 0...UInt64.max)

        /// A writable disk over a snapshot, with what it holds.
        private func withDisk(
            size: Int, _ options: String..., body: (Stage, String, MountedDisk, inout [UInt8]) throws -> Void
        ) throws {
            try Stage.use { stage in
                let base = stage.file("base.vmdk")
                try vdimg("create", "--quiet", "--size", "\(size)", base)
                try qemuIO(base, "write -P 170 0 \(size / 2)")
                let child = stage.file("child.vmdk")
                try vdimg("create", "--quiet", "--parent", base, child)
                var model = [UInt8](repeating: 170, count: size / 2)
                model += [UInt8](repeating: 0, count: size - size / 2)
                let disk = try stage.mount(child, at: stage.makeMountpoint(), options: ["--rw"] + options)
                try body(stage, child, disk, &model)
                try disk.unmount()
                try writeFile(stage.file("model"), model)
                try expectEqual(child, toRaw: stage.file("model"))
                let again = try stage.mount(child)
                try expectSameBytes(again.file, stage.file("model"))
                try again.unmount()
            }
        }

        /// Reads and writes of any size at any place, through the page cache and past it, against an array.
        @Test func oddSizesAndOffsets() throws {
            let size = 5 << 20 + 1536
            try withDisk(size: size) { _, _, disk, model in
                var generator = SeededGenerator(seed: Self.seed)
                for flags in [O_RDWR, O_RDWR | OpenedFile.direct, O_RDWR | O_SYNC] {
                    try OpenedFile.with(disk.file, flags) { file in
                        let unit = flags & OpenedFile.direct != 0 ? 512 : 1
                        for number in 0..<150 {
                            let limit = number % 10 == 0 ? 1 << 20 + 4096 : 20_000
                            let count = Int.random(in: 1...limit, using: &generator) / unit * unit
                            let offset = Int.random(in: 0...size - count, using: &generator) / unit * unit
                            if number % 3 == 0 {
                                let bytes = try file.read(at: offset, count: count)
                                #expect(isEqual(bytes[...], model[offset..<offset + count]), "seed \(Self.seed)")
                            } else {
                                let bytes = [UInt8](
                                    repeating: UInt8.random(in: 0...255, using: &generator), count: count)
                                let done = try file.write(bytes, at: offset)
                                #expect(done == count)
                                model.replaceSubrange(offset..<offset + count, with: bytes)
                            }
                        }
                        try file.sync()
                    }
                }
                try OpenedFile.with(disk.file) { file in
                    let bytes = try file.allBytes()
                    #expect(isEqual(bytes[...], model[...]), "seed \(Self.seed)")
                }
            }
        }

        @Test func theEnd() throws {
            let size = 1 << 20 + 512
            try withDisk(size: size) { _, _, disk, model in
                for flags in [O_RDWR, O_RDWR | OpenedFile.direct] {
                    try OpenedFile.with(disk.file, flags) { file in
                        #expect(try file.read(at: size - 512, count: 4096).count == 512)
                        #expect(try file.read(at: size, count: 4096).isEmpty)
                        #expect(try file.read(at: size + (1 << 40), count: 4096).isEmpty)
                        // As on a disk: what reaches over the end is cut, what begins there finds no space.
                        #expect(try file.write([UInt8](repeating: 9, count: 4096), at: size - 512) == 512)
                        for offset in [size, size + 512, size + (1 << 40)] {
                            #expect(throws: SystemFailure(ENOSPC)) {
                                try file.write([UInt8](repeating: 8, count: 512), at: offset)
                            }
                        }
                        try file.sync()
                    }
                    #expect(try FileStatus(disk.file).size == size)
                }
                try OpenedFile.with(disk.file, O_WRONLY | O_APPEND) { file in
                    #expect(throws: SystemFailure(ENOSPC)) { try file.append([1]) }
                    try file.sync()
                }
                model.replaceSubrange(size - 512..<size, with: [UInt8](repeating: 9, count: 512))
            }
        }

        @Test func sizeIsFixed() throws {
            let size = 1 << 20
            try withDisk(size: size) { _, _, disk, model in
                try OpenedFile.with(disk.file, O_RDWR | O_TRUNC) { file in
                    #expect(try file.seek(0, SEEK_END) == size)
                    #expect(try file.read(at: 0, count: 512) == [UInt8](repeating: 170, count: 512))
                    for other in [1, size - 1, size + 1, size * 2] {
                        #expect(throws: SystemFailure(EPERM)) { try file.truncate(to: other) }
                    }
                    try file.truncate(to: size)
                }
                // The shell opens with O_TRUNC.
                try tool("sh", "-c", "printf hello > '\(disk.file)'")
                model.replaceSubrange(0..<5, with: Array("hello".utf8))
                #expect(try FileStatus(disk.file).size == size)
                let grown = try attempt("fallocate", "-l", "2M", disk.file)
                #expect(grown.status != 0)
                #expect(try FileStatus(disk.file).size == size)
            }
        }

        @Test func folderIsFixed() throws {
            try withDisk(size: 1 << 20) { stage, _, disk, _ in
                let folder = disk.mountpoint
                for command in [
                    ["touch", "\(folder)/new"], ["mkdir", "\(folder)/new"], ["rm", "-f", disk.file],
                    ["mv", disk.file, "\(folder)/other"], ["ln", "-s", "x", "\(folder)/link"],
                    ["ln", disk.file, "\(folder)/link"],
                    ["chmod", "644", disk.file], ["chown", "1", disk.file], ["chmod", "755", folder],
                    ["mknod", "\(folder)/n", "p"],
                ] {
                    let result = try attempt(command)
                    #expect(result.status != 0, "\(command)")
                    #expect(!result.errorText.contains("Input/output"), "\(result.errorText)")
                }
                #expect(try tool("ls", "-A", folder) == "disk.raw\ninfo.json\n")
                #expect(throws: SystemFailure(ENOENT)) { try FileStatus("\(folder)/Disk.raw") }
                // Times may be set, as cp -p and tar do; it does no harm.
                try tool("touch", disk.file)
            }
        }

        @Test func mappedMemory() throws {
            let size = 4 << 20
            try withDisk(size: size) { _, _, disk, model in
                try OpenedFile.with(disk.file, O_RDWR) { file in
                    try file.mapped(at: 0, count: size, writable: true) { memory in
                        #expect(memory[100] == 170)
                        for index in stride(from: 0, to: size, by: 77_777) {
                            memory[index] = 7
                            model[index] = 7
                        }
                        for index in 1 << 20..<1 << 20 + 70_000 {
                            memory[index] = 8
                            model[index] = 8
                        }
                    }
                }
                // Another opener sees it at once, past the page cache as well.
                try OpenedFile.with(disk.file, O_RDONLY | OpenedFile.direct) { file in
                    let bytes = try file.read(at: 1 << 20, count: 65536)
                    #expect(bytes == [UInt8](repeating: 8, count: 65536))
                }
                // And a mapping sees what is written past the cache.
                try OpenedFile.with(disk.file, O_RDWR) { file in
                    try file.mapped(at: 2 << 20, count: 4096, writable: false) { memory in
                        #expect(memory[0] == model[2 << 20])
                        try OpenedFile.with(disk.file, O_RDWR | OpenedFile.direct) { direct in
                            _ = try direct.write([UInt8](repeating: 6, count: 4096), at: 2 << 20)
                        }
                        #expect(memory[0] == 6)
                    }
                }
                model.replaceSubrange(2 << 20..<2 << 20 + 4096, with: [UInt8](repeating: 6, count: 4096))
            }
        }

        @Test func readOnlyDisk() throws {
            try Stage.use { stage in
                let image = try stage.makeImage("disk.vmdk", size: 1 << 20)
                let disk = try stage.mount(image)
                for flags in [O_RDWR, O_WRONLY, O_WRONLY | O_TRUNC, O_WRONLY | O_APPEND, O_RDWR | OpenedFile.direct] {
                    #expect(throws: SystemFailure(EROFS)) { try OpenedFile.with(disk.file, flags) { _ in } }
                }
                try OpenedFile.with(disk.file) { file in
                    try file.sync()
                    #expect(throws: SystemFailure(EACCES)) {
                        try file.mapped(at: 0, count: 4096, writable: true) { _ in }
                    }
                    #expect(throws: SystemFailure(EBADF)) { try file.write([1], at: 0) }
                }
                let device = try stage.attach(disk.file)
                #expect(try tool("blockdev", "--getro", device) == "1\n")
                try stage.detach(device)
                try disk.unmount()
            }
        }

        /// Tools that copy files.
        @Test func copies() throws {
            let size = 3 << 20 + 512
            try withDisk(size: size) { stage, _, disk, model in
                try tool(
                    "dd", "if=/dev/urandom", "of=\(disk.file)", "bs=100000", "seek=3", "count=5", "conv=notrunc",
                    "status=none")
                try tool("cp", disk.file, stage.file("copy1"))
                try tool("dd", "if=\(disk.file)", "of=\(stage.file("copy2"))", "bs=1M", "iflag=direct", "status=none")
                try tool("sh", "-c", "cat '\(disk.file)' > '\(stage.file("copy3"))'")
                for number in 1...3 { try expectSameBytes(disk.file, stage.file("copy\(number)")) }
                model = try OpenedFile.with(disk.file) { try $0.allBytes() }
                #expect(model.count == size)
                try tool("cp", stage.file("copy1"), disk.file)
                try expectSameBytes(disk.file, stage.file("copy1"))
            }
        }

        /// The modification time is that of the image, then that of the last write.
        @Test func modificationTime() throws {
            try withDisk(size: 1 << 20) { _, image, disk, model in
                #expect(try FileStatus(disk.file).modified.tv_sec == FileStatus(image).modified.tv_sec)
                try OpenedFile.with(disk.file, O_WRONLY) { file in _ = try file.write([5], at: 0) }
                model[0] = 5
                var now = timespec()
                unsafe clock_gettime(CLOCK_REALTIME, &now)
                try expectEventually { try abs(FileStatus(disk.file).modified.tv_sec - now.tv_sec) <= 5 }
            }
        }
    }
}
