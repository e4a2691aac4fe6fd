import DiskTesting
import Glibc
import Testing

/// Images that name files which are not theirs: refused, and those files are not even opened.
extension MountTests {
    @Suite struct HostileNamesTests {
        /// Notes whether anybody opens a file or reads it.
        private final class Watch {
            private let descriptor: Int32

            init(_ paths: [String]) throws {
                descriptor = inotify_init1(Int32(IN_NONBLOCK) | Int32(IN_CLOEXEC))
                for path in paths {
                    guard unsafe inotify_add_watch(descriptor, path, UInt32(IN_OPEN | IN_ACCESS | IN_MODIFY)) >= 0
                    else {
                        throw SystemFailure(errno)
                    }
                }
            }

            deinit { close(descriptor) }

            var hasSeenAnything: Bool {
                var events = [UInt8](repeating: 0, count: 4096)
                return unsafe events.withUnsafeMutableBytes { unsafe read(descriptor, $0.baseAddress, $0.count) } > 0
            }
        }

        /// A descriptor with one flat extent.
        private func descriptor(_ extent: String, kind: String = "FLAT", parent: String? = nil) -> String {
            """
            # Disk DescriptorFile
            version=1
            CID=12345678
            parentCID=\(parent == nil ? "ffffffff" : "12345678")
            \(parent.map { "parentFileNameHint=\"\($0)\"\n" } ?? "")createType="monolithicFlat"
            RW 2 \(kind) "\(extent)" 0
            ddb.adapterType = "ide"

            """
        }

        @Test func extents() throws {
            try Stage.use { stage in
                let folder = try stage.makeFolder("images")
                let secret = stage.file("secret")
                try writeFile(secret, [UInt8](repeating: 0x55, count: 4096))
                try tool("ln", "-s", secret, "\(folder)/link")
                try tool("ln", "-s", "..", "\(folder)/up")
                try tool("ln", "-s", "/proc/self/root\(secret)", "\(folder)/magic")
                try tool("mkfifo", "\(folder)/fifo")
                try tool("mknod", "\(folder)/zero", "c", "1", "5")
                let device = try stage.attach(try stage.makeRaw("device.raw", size: 1 << 20))
                let watch = try Watch([secret, "/etc/shadow", "\(folder)/fifo", "\(folder)/zero", device])
                let names = [
                    "/etc/shadow", "../secret", "../../../../../../../../etc/shadow", secret, "link", "up/secret",
                    "magic",
                    "fifo", "zero", "/dev/zero", device, "/proc/self/mem", "/proc/self/fd/0", ".", "..", "", "up",
                    #"..\secret"#, "./../secret", "images/../../secret",
                ]
                let place = try stage.makeFolder("place")
                for (number, name) in names.enumerated() {
                    // Every kind of extent opens its file in the same way; each meets some of the names.
                    let kinds = ["FLAT", ["SPARSE", "VMFS", "VMFSSPARSE", "SESPARSE"][number % 4]]
                    for (kind, option) in zip(kinds, number % 2 == 0 ? ["ro", "rw"] : ["rw", "ro"]) {
                        try writeFile("\(folder)/disk.vmdk", descriptor(name, kind: kind))
                        let result = try attempt(Programs.vdmount, "-o", option, "\(folder)/disk.vmdk", place)
                        expectRefused(result, folder)
                    }
                }
                #expect(!watch.hasSeenAnything)
                #expect(stage.mounts().isEmpty)
            }
        }

        @Test func parents() throws {
            try Stage.use { stage in
                let folder = try stage.makeFolder("images")
                let secret = stage.file("secret.vmdk")
                try writeFile("\(folder)/own", [UInt8](repeating: 0, count: 1024))
                try writeFile(secret, descriptor("images/own"))
                try tool("ln", "-s", secret, "\(folder)/link.vmdk")
                try tool("mkfifo", "\(folder)/fifo")
                let watch = try Watch([secret, "/etc/shadow", "\(folder)/fifo"])
                let place = try stage.makeFolder("place")
                for name in [
                    "/etc/shadow", "../secret.vmdk", secret, "link.vmdk", "fifo", "/dev/zero", "..", "/proc/self/mem",
                ] {
                    try writeFile("\(folder)/disk.vmdk", descriptor("own", parent: name))
                    expectRefused(try attempt(Programs.vdmount, "\(folder)/disk.vmdk", place), folder)
                }
                #expect(!watch.hasSeenAnything)
                // The same with the folder allowed, to see that nothing else was wrong.
                try writeFile("\(folder)/disk.vmdk", descriptor("own", parent: "../secret.vmdk"))
                try stage.mount("\(folder)/disk.vmdk", "--allow-dir", stage.path).unmount()
                #expect(watch.hasSeenAnything)
            }
        }

        /// A descriptor whose extent is the descriptor, or another image's file in use twice.
        @Test func extentsThatOverlap() throws {
            try Stage.use { stage in
                let place = try stage.makeFolder("place")
                let image = stage.file("disk.vmdk")
                try writeFile(image, descriptor("disk.vmdk"))
                // Two sectors do not fit into the short text file.
                expectRefused(try attempt(Programs.vdmount, "--rw", image, place), "disk.vmdk")
                #expect(contents(of: image) == descriptor("disk.vmdk"))
            }
        }
    }
}
