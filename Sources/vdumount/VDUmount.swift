import ArgumentParser
import CommandSupport
import DiskStorage
import FuseHost
import Glibc

/// `vdumount MOUNTPOINT...`: unmounts, and returns when the disks are closed.
@main
struct VDUmount: ParsableCommand {
    static func main() {
        ProcessPreparation.run()
        Program.expectText("vdumount")
        Program.run(Self.self, named: "vdumount", Array(CommandLine.arguments.dropFirst()))
    }

    static let configuration = CommandConfiguration(
        commandName: "vdumount",
        abstract: "Unmount what vdmount mounted, and return when the disk is closed.",
        discussion: """
            When it returns with status 0, all data is durable in the image files, their locks are released, and they \
            may be used, copied or moved. A dead mount, whose daemon was killed, is cleared.

            EXAMPLES
              vdumount /mnt/disk
                  Unmount one disk.
              umount /mnt/fs && losetup --detach /dev/loop0 && vdumount /mnt/disk
                  Free what lies on the disk first.
              vdumount --all
                  Unmount every disk of this user (as root: every disk).

            EXIT STATUS
              0  unmounted and closed cleanly
              1  something failed: see the message
              64 wrong usage
            """,
        version: programVersion)

    @Flag(name: .long, help: "Unmount everything that vdmount mounted.")
    var all = false

    @Argument(help: ArgumentHelp("Where the disks are mounted.", valueName: "mountpoint"), completion: .file())
    var mountpoints: [String] = []

    func validate() throws {
        if all && !mountpoints.isEmpty { throw ValidationError("--all takes no mountpoint.") }
        if !all && mountpoints.isEmpty { throw ValidationError("Which mountpoint? Name one, or give --all.") }
    }

    func run() throws {
        var failed = false
        for mountpoint in all ? everything() : mountpoints {
            do throws(HostError) {
                try Unmounter.unmount(mountpoint) { Daemon.say("vdumount: \($0)") }
            } catch {
                Daemon.say("vdumount: \(error)")
                failed = true
            }
        }
        if failed { throw ExitCode.failure }
    }

    /// The mountpoints of this user's mounts, the last mounted first.
    private func everything() -> [String] {
        let user = geteuid()
        return MountTable.current().ours.filter { user == 0 || $0.owner == user }.map(\.mountpoint).reversed()
    }
}
