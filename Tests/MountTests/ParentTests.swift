import DiskTesting
import Glibc
import Testing

/// Chains are found, checked, and refused when they are not what they say.
extension MountTests {
    @Suite struct ParentTests {
        private static let baseUUID = "11111111-2222-4333-8444-555555555555"
        private static let changeUUID = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee"

        /// A base and a child as QEMU makes them: 0x11 from below, 0x22 in the child.
        private func makeChain(_ stage: Stage) throws -> (base: String, child: String) {
            let base = try stage.makeImage("base.vmdk", size: 4 << 20)
            try qemuIO(base, "write -P 17 0 4M")
            let child = try stage.makeSnapshot("child.vmdk", of: base)
            try qemuIO(child, "write -P 34 1M 1M")
            return (base, child)
        }

        /// Makes a chain like VirtualBox's: the child knows its parent by UUIDs alone.
        private func makeLikeVirtualBox(_ base: String, _ child: String) throws {
            try editDescriptor(base) { text in
                text + "ddb.uuid.image=\"\(Self.baseUUID)\"\nddb.uuid.modification=\"\(Self.changeUUID)\"\n"
            }
            try editDescriptor(child) { text in
                let text = replacingLine(
                    replacingLine(text, "parentFileNameHint", nil), "parentCID", "parentCID=ffffffff")
                return text + """
                    ddb.uuid.image="99999999-2222-4333-8444-555555555555"
                    ddb.uuid.parent="\(Self.baseUUID)"
                    ddb.uuid.parentmodification="\(Self.changeUUID)"

                    """
            }
        }

        private func expectReads(_ stage: Stage, _ image: String, _ options: String...) throws {
            let place = try stage.makeMountpoint()
            let disk = try stage.mount(image, at: place, options: options)
            try qemuIO(
                disk.file, format: "raw", readOnly: true, "read -P 17 0 1M", "read -P 34 1M 1M", "read -P 17 2M 2M")
            try disk.unmount()
        }

        private func expectCannotMount(
            _ stage: Stage, _ image: String, _ words: String..., sourceLocation: SourceLocation = #_sourceLocation
        ) throws {
            let place = try stage.makeMountpoint()
            let result = try attempt(Programs.vdmount, image, place)
            expectRefused(result, sourceLocation: sourceLocation)
            for word in words {
                #expect(result.errorText.contains(word), "\(result.errorText)", sourceLocation: sourceLocation)
            }
            #expect(stage.mounts().isEmpty)
        }

        @Test func linkedByUUIDInTheSameFolder() throws {
            try Stage.use { stage in
                let (base, child) = try makeChain(stage)
                // What is not it: images with other UUIDs, files that are no images.
                let decoy = try stage.makeImage("another.vmdk", size: 4 << 20)
                try editDescriptor(decoy) { $0 + "ddb.uuid.image=\"00000000-1111-4222-8333-444444444444\"\n" }
                try writeFile(stage.file("aaa.vmdk"), "KDMV, or not")
                try makeLikeVirtualBox(base, child)
                try expectReads(stage, child)
                try tool("mv", base, stage.file("{renamed}.vmdk"))
                try expectReads(stage, child)
            }
        }

        @Test func linkedByUUIDAboveSnapshots() throws {
            try Stage.use { stage in
                let (base, child) = try makeChain(stage)
                try makeLikeVirtualBox(base, child)
                let folder = try stage.makeFolder("Snapshots")
                try tool("mv", child, folder)
                try expectReads(stage, "\(folder)/child.vmdk")
                // The folder above is looked at for folders of that name alone.
                try tool("mv", folder, stage.file("Others"))
                try expectCannotMount(stage, stage.file("Others/child.vmdk"), Self.baseUUID, "--allow-dir")
                try expectReads(stage, stage.file("Others/child.vmdk"), "--allow-dir", stage.path)
            }
        }

        @Test func linkedByUUIDElsewhere() throws {
            try Stage.use { stage in
                let (base, child) = try makeChain(stage)
                try makeLikeVirtualBox(base, child)
                let folder = try stage.makeFolder("bases")
                let other = try stage.makeFolder("others")
                try tool("mv", base, folder)
                try expectCannotMount(stage, child, Self.baseUUID, "--allow-dir")
                try expectReads(stage, child, "--allow-dir", other, "--allow-dir", folder)
            }
        }

        @Test func parentWithAnotherModificationUUID() throws {
            try Stage.use { stage in
                let (base, child) = try makeChain(stage)
                try makeLikeVirtualBox(base, child)
                let other = "bbbbbbbb-bbbb-4ccc-8ddd-eeeeeeeeeeee"
                try editDescriptor(base) { $0.replacing(Self.changeUUID, with: other) }
                try expectCannotMount(stage, child, other, Self.changeUUID, "changed after this snapshot")
            }
        }

        @Test func parentChangedAfterSnapshot() throws {
            try Stage.use { stage in
                let (base, child) = try makeChain(stage)
                try qemuIO(base, "write -P 1 0 512")
                try expectCannotMount(stage, child, "base.vmdk", "changed after this snapshot")
            }
        }

        @Test func parentChangedThroughTheMount() throws {
            try Stage.use { stage in
                let (base, child) = try makeChain(stage)
                // Reading leaves the snapshot alone, also with permission to write.
                let disk = try stage.mount(base, "--rw")
                try qemuIO(disk.file, format: "raw", "read -P 17 0 1M")
                try disk.unmount()
                try expectReads(stage, child)
                let again = try stage.mount(base, "--rw")
                try qemuIO(again.file, format: "raw", "write -P 1 0 512")
                try again.unmount()
                try expectCannotMount(stage, child, "changed after this snapshot")
            }
        }

        @Test func missingParent() throws {
            try Stage.use { stage in
                let (base, child) = try makeChain(stage)
                try tool("mv", base, stage.file("gone.vmdk"))
                try expectCannotMount(stage, child, "base.vmdk", "child.vmdk", "missing", stage.path, "--allow-dir")
                // It can be looked at all the same.
                #expect(try vdimg("info", child).contains("base.vmdk"))
            }
        }

        /// What a mount will ask for, `vdimg create` says at once.
        @Test(arguments: ["vmdk", "vdi", "vhd", "vhdx", "qed", "qcow2"]) func parentOutOfReachIsNoted(
            _ format: String
        ) throws {
            try Stage.use { stage in
                let base = "\(try stage.makeFolder("bases"))/base.\(format)"
                let folder = try stage.makeFolder("children")
                try vdimg("create", "--quiet", "--size", "8M", base)
                let apart = try attempt(Programs.vdimg, "create", "--parent", base, "\(folder)/child.\(format)")
                #expect(apart.status == 0 && apart.errorText.contains("--allow-dir"), "\(apart.errorText)")
                let beside = stage.file("bases/child.\(format)")
                let result = try attempt(Programs.vdimg, "create", "--parent", base, beside)
                #expect(result.status == 0 && result.errorText.isEmpty, "\(result.errorText)")
            }
        }

        @Test func parentInAnAllowedFolder() throws {
            try Stage.use { stage in
                let (base, child) = try makeChain(stage)
                let folder = try stage.makeFolder("bases")
                let outside = "\(folder)/base.vmdk"
                try tool("mv", base, outside)
                try tool("mv", child, try stage.makeFolder("children"))
                let moved = stage.file("children/child.vmdk")
                try editDescriptor(moved) {
                    replacingLine($0, "parentFileNameHint", "parentFileNameHint=\"\(outside)\"")
                }
                // It is there, and not trusted.
                try expectCannotMount(stage, moved, outside, "child.vmdk", "--allow-dir")
                try expectReads(stage, moved, "--allow-dir", folder)
                try expectReads(stage, moved, "-o", "allow-dir=\(folder)")
                // In the image's folder, but a link to outside.
                try tool("ln", "-s", outside, stage.file("children/base.vmdk"))
                try expectCannotMount(stage, moved, outside, "--allow-dir")
            }
        }

        @Test(arguments: [
            "/home/somebody/vms/base.vmdk", #"C:\\VMs\\My Machine\\base.vmdk"#, #"C:\VMs\base.vmdk"#,
            "../elsewhere/base.vmdk",
            #".\base.vmdk"#, "./base.vmdk", "[datastore1] vm/base.vmdk", #"\\server\share\base.vmdk"#,
        ]) func movedChainIsFoundByItsName(_ hint: String) throws {
            try Stage.use { stage in
                let (_, child) = try makeChain(stage)
                try editDescriptor(child) { replacingLine($0, "parentFileNameHint", "parentFileNameHint=\"\(hint)\"") }
                try expectReads(stage, child)
            }
        }

        @Test func parentBelowTheFolder() throws {
            try Stage.use { stage in
                let (base, child) = try makeChain(stage)
                try tool("mv", base, try stage.makeFolder("bases"))
                for hint in ["bases/base.vmdk", #"bases\base.vmdk"#, stage.file("bases/base.vmdk")] {
                    try editDescriptor(child) {
                        replacingLine($0, "parentFileNameHint", "parentFileNameHint=\"\(hint)\"")
                    }
                    try expectReads(stage, child)
                }
            }
        }

        @Test func cycles() throws {
            try Stage.use { stage in
                let (base, child) = try makeChain(stage)
                func contentID(_ image: String) throws -> String {
                    var line = ""
                    try editDescriptor(image) { text in
                        line = text.split(separator: "\n").first { $0.hasPrefix("CID=") }.map(String.init) ?? ""
                        return text
                    }
                    return String(line.dropFirst(4))
                }
                func link(_ image: String, to parent: String) throws {
                    let content = try contentID(parent)
                    try editDescriptor(image) { text in
                        let text = replacingLine(text, "parentFileNameHint", nil)
                        return replacingLine(
                            text, "parentCID", "parentCID=\(content)\nparentFileNameHint=\"\(parent)\"")
                    }
                }
                try link(base, to: child)
                try expectCannotMount(stage, child, "circle")
                try expectCannotMount(stage, base, "circle")
                try link(base, to: base)
                try expectCannotMount(stage, base, "circle")
                try expectCannotMount(stage, child, "circle")
            }
        }

        @Test func parentThatIsNoImage() throws {
            try Stage.use { stage in
                let (base, child) = try makeChain(stage)
                try writeFile(base, "this is no image at all")
                try expectCannotMount(stage, child, "base.vmdk")
                try writeFile(base, [])
                try expectCannotMount(stage, child, "base.vmdk")
            }
        }
    }
}
