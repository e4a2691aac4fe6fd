import DiskStorage
import DiskTesting
import Glibc
import Testing

/// A process that makes an image anew in its place, and is killed at any moment, leaves the old image or the new one
/// under its name, each as a whole; the next run goes through, and clears away what was left.
struct InPlaceTests {
    @Test(arguments: ["qcow2", "vhdx", "vmdk"]) func killedAtAnyMoment(_ format: String) throws {
        try Machine.requireAll()
        let folder = try TemporaryFolder()
        let original = folder.file("original.raw")
        var generator = SeededGenerator(seed: 8)
        let pool = RandomPool(seed: 8)
        let file = try FileStorage(creating: original)
        for place in 0..<48 {
            try file.write(pool.bytes(1 << 20, using: &generator), at: UInt64(place) << 21, for: .guestData)
        }
        try file.setLength(96 << 20)
        let image = folder.file("disk.vdi")
        _ = try vdimg("convert", "--quiet", "--format", "raw", original, image)
        let command = [Programs.vdimg, "convert", "--quiet", "--in-place", "--no-reflink", "--to", format, image]
        for delay in [2, 10, 25, 50, 100, 200, 400] {
            let process = try Subprocess.start(command)
            usleep(UInt32(delay) * 1000)
            kill(process.pid, SIGKILL)
            _ = try process.wait()
            _ = try vdimg("compare", "--quiet", "--second-format", "raw", image, original)
            _ = try vdimg("check", image)
        }
        _ = try vdimg("convert", "--quiet", "--in-place", "--to", format, image)
        _ = try vdimg("compare", "--quiet", "--second-format", "raw", image, original)
        let names = try Subprocess.run(["ls", "-A", folder.path]).outputText
        #expect(names == "disk.vdi\noriginal.raw\n")
    }
}
