import ArgumentParser
import CommandSupport
import DiskPartitions
import DiskStorage
import FuseHost
import Glibc

/// `vdmount --fs[=N] IMAGE DIR`: exposes the disk in a private place and mounts a file system of it at a folder.
///
/// The disk is served by a `vdmount` of its own, as if the user had started it; this process does what he would do
/// then, and takes everything back if a step fails.
struct FileSystemCommand {
    let image: String
    /// The image's name for messages.
    let shownImage: String
    let folder: String
    /// The partition; 0 is the whole disk, nil the only one that holds a file system.
    let number: Int?
    let isWritable: Bool
    /// The options for the disk, as on the command line.
    let diskOptions: [String]
    /// Options for the kernel, such as `noatime`, for the file system.
    let mountOptions: [String]

    func run() throws {
        do throws(HostError) {
            try mount()
        } catch {
            Daemon.say("vdmount: \(error)")
            throw ExitCode(1)
        }
    }

    private func mount() throws(HostError) {
        guard geteuid() == 0, !FileSystemMount.isInUserNamespace else {
            let who = geteuid() == 0 ? "root outside of user namespaces" : "root"
            throw HostError(
                subject: folder,
                reason:
                    "mounting a file system needs \(who); without, 'vdmount \(shownImage) FOLDER' shows the disk and "
                    + "its partitions as files")
        }
        let place = try Mountpoint(folder)
        guard place.isFolder else { throw HostError(subject: folder, reason: "is no folder: cannot mount here") }
        let mount = try FileSystemMount.prepare(for: place.path)
        do throws(HostError) {
            try expose(at: mount.disk)
            let chosen = try choose(in: mount.disk)
            try mount.mount(
                file: chosen.file, sectorSize: chosen.sectorSize, types: chosen.kind.mountTypes,
                options: chosen.kind.mountOptions(isWritable: isWritable) + mountOptions, isReadOnly: !isWritable)
        } catch {
            mount.abandon()
            throw error
        }
    }

    /// Lets a daemon serve the disk; it prints what keeps it from that itself.
    private func expose(at path: String) throws(HostError) {
        // By its name, so that it shows as what it is.
        let arguments = [SystemFiles.link("/proc/self/exe") ?? "/proc/self/exe"] + diskOptions + ["--", image, path]
        let (status, said) = Program.run(arguments)
        let prefix = "vdmount: "
        let text = said.hasPrefix(prefix) ? String(said.dropFirst(prefix.count)) : said
        guard status == 0 else {
            throw HostError(subject: folder, reason: text.isEmpty ? "the disk cannot be exposed" : text)
        }
        // The loop device is told here.
        let rest = said.split(separator: "\n").filter { !$0.hasSuffix(RunningMount.sectorNote(4096)) }
        if !rest.isEmpty { Daemon.say(rest.joined(separator: "\n")) }
    }

    private struct Choice {
        let file: String
        let sectorSize: Int
        let kind: FileSystemKind
    }

    private func choose(in path: String) throws(HostError) -> Choice {
        guard let text = SystemFiles.text(path + "/info.json"), let disk = jsonValue(DiskInformation.self, from: text)
        else { throw HostError(subject: shownImage, reason: "its partitions cannot be read") }
        var all = disk.partitions.map { ($0.number, $0.file, $0.fileSystem) }
        if disk.partitions.isEmpty || number == 0 { all.insert((0, "disk.raw", disk.disk.fileSystem), at: 0) }
        let found = all.compactMap { part -> (number: Int, choice: Choice)? in
            guard let kind = part.2.flatMap({ FileSystemKind(rawValue: $0.kind) }) else { return nil }
            return (part.0, Choice(file: part.1, sectorSize: disk.disk.sectorSize, kind: kind))
        }
        let list = all.map { part in
            (part.0 == 0 ? "the whole disk" : "partition \(part.0)") + ": \(part.2?.kind ?? "nothing known")"
        }.joined(separator: "; ")
        if let number {
            guard all.contains(where: { $0.0 == number }) else {
                throw HostError(subject: shownImage, reason: "has no partition \(number); it has \(list)")
            }
            guard let wanted = found.first(where: { $0.number == number }), wanted.choice.kind.isMountable else {
                throw HostError(subject: shownImage, reason: "no file system can be mounted from there; it has \(list)")
            }
            return wanted.choice
        }
        let mountable = found.filter(\.choice.kind.isMountable)
        guard let only = mountable.first, mountable.count == 1 else {
            let what = mountable.isEmpty ? "holds no file system that can be mounted" : "holds several file systems"
            throw HostError(
                subject: shownImage,
                reason: "\(what): \(list)" + (mountable.isEmpty ? "" : "; choose one with --fs=N"))
        }
        return only.choice
    }
}

extension FileSystemKind {
    /// The types for mount(8), the kernel's own first.
    var mountTypes: [String] {
        switch self {
        case .ntfs: ["ntfs3", "ntfs-3g"]
        default: [rawValue]
        }
    }

    /// What mount(8) gets besides. Foreign programs do not run with the rights that a foreign image gives them, and
    /// what is mounted read-only is not changed either by replaying its journal.
    func mountOptions(isWritable: Bool) -> [String] {
        var options = [isWritable ? "rw" : "ro", "nosuid", "nodev"]
        // Two XFS with the same UUID, as a machine's own and a copy, cannot be mounted otherwise.
        if self == .xfs { options.append("nouuid") }
        guard !isWritable else { return options }
        switch self {
        case .ext3, .ext4: options.append("noload")
        case .xfs, .f2fs: options.append("norecovery")
        case .btrfs: options.append("rescue=nologreplay")
        default: break
        }
        return options
    }
}
