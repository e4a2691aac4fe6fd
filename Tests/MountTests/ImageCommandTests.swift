import DiskTesting
import Testing

/// Commands of vdimg that look at images and make them smaller: options, answers and exit statuses.
extension MountTests {
    @Suite struct ImageCommandTests {
        @Test func compareAnswersByStatus() throws {
            try Stage.use { stage in
                let first = try stage.makeImage("first.vmdk", size: 4 << 20)
                let second = stage.file("second.qcow2")
                try tool("qemu-img", "create", "-q", "-f", "qcow2", second, "4M")
                let same = try attempt(Programs.vdimg, "compare", first, second)
                #expect(same.status == 0 && same.outputText.contains("same"))
                #expect(try attempt(Programs.vdimg, "compare", "--quiet", first, second).outputText.isEmpty)
                try tool("qemu-io", "-f", "qcow2", "-c", "write -P 1 1M 512", "-c", "write -P 1 3M 1024", second)
                let differs = try attempt(Programs.vdimg, "compare", "--quiet", first, second)
                #expect(differs.status == 1 && differs.outputText.contains("first at byte 1048576"))
                #expect(differs.errorText.isEmpty)
                let all = try attempt(Programs.vdimg, "compare", "--quiet", "--all", first, second)
                #expect(all.outputText.hasPrefix("1048576 512\n3145728 1024\n"))
                let json = try attempt(Programs.vdimg, "compare", "--quiet", "--all", "--json", first, second)
                #expect(json.status == 1 && json.outputText.contains(#""differing-bytes" : 1536"#))
                let missing = stage.file("missing")
                let failed = try attempt(Programs.vdimg, "compare", first, missing)
                expectRefused(failed, status: 2, missing, "no such file")
                #expect(try attempt(Programs.vdimg, "compare", first).status == 64)
            }
        }

        @Test func measureAgreesWithCreate() throws {
            try Stage.use { stage in
                let text = try tool(
                    Programs.vdimg, "measure", "--quiet", "--format", "qcow2", "--size", "1G", "--json")
                let peer = try tool("qemu-img", "measure", "-O", "qcow2", "--size", "1G", "--output=json")
                let line = peer.split(separator: "\n").first { $0.contains("fully-allocated") } ?? ""
                let number = line.filter(\.isNumber)
                #expect(!number.isEmpty && text.contains(#""fully-allocated" : \#(number)"#), "\(text) \(peer)")
                #expect(try attempt(Programs.vdimg, "measure", "--format", "qcow2").status == 64)
                #expect(try attempt(Programs.vdimg, "measure", "--size", "1G").status == 64)
                expectRefused(
                    try attempt(Programs.vdimg, "measure", "--format", "vhd", "--size", "3T"), "2040 GiB")
            }
        }

        /// A picture is written as a whole, to a new file unless told otherwise.
        @Test func mapDraws() throws {
            try Stage.use { stage in
                let image = try stage.makeImage("disk.vmdk", size: 4 << 20)
                let picture = stage.file("picture.svg")
                try tool(Programs.vdimg, "map", "--svg", picture, image)
                let first = try tool("cat", picture)
                #expect(first.hasPrefix("<?xml") && first.hasSuffix("</svg>\n"))
                #expect(try tool(Programs.vdimg, "map", "--svg", "-", image) == first)
                expectRefused(try attempt(Programs.vdimg, "map", "--svg", picture, image), picture, "--force")
                try tool("qemu-io", "-f", "vmdk", "-c", "write -P 1 1M 1M", image)
                try tool(Programs.vdimg, "map", "--svg", picture, "--force", image)
                #expect(try tool("cat", picture) != first)
                #expect(try tool("ls", "-A", stage.file("")) == "disk.vmdk\npicture.svg\n")
                #expect(try attempt(Programs.vdimg, "map", "--svg", picture, "--json", image).status == 64)
                #expect(try attempt(Programs.vdimg, "map", "--force", image).status == 64)
            }
        }

        @Test func compactTellsWhatItDid() throws {
            try Stage.use { stage in
                let image = try stage.makeImage("disk.vmdk", size: 8 << 20)
                try tool("qemu-io", "-f", "vmdk", "-c", "write -P 1 0 8M", "-c", "write -P 0 0 6M", image)
                let child = stage.file("child.vmdk")
                try tool(Programs.vdimg, "create", "--quiet", "--parent", image, child)
                let result = try attempt(Programs.vdimg, "compact", image)
                #expect(result.status == 0 && result.outputText.contains("zeros dropped:"))
                try tool("qemu-img", "check", "-q", image)
                try tool(Programs.vdimg, "compare", "--quiet", image, child)
                let again = try tool(Programs.vdimg, "compact", "--quiet", "--json", image)
                #expect(again.contains(#""zero-bytes" : 0"#))
                let raw = stage.file("disk.raw")
                try tool("truncate", "-s", "1M", raw)
                let note = try attempt(Programs.vdimg, "compact", "--format", "raw", "--quiet", raw)
                #expect(note.status == 0 && note.outputText.isEmpty && note.errorText.contains("note: "))
                expectRefused(try attempt(Programs.vdimg, "compact", raw), "--format raw")
            }
        }
    }
}
