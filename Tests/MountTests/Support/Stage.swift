import DiskTesting
import Glibc
import Testing

/// All tests that mount: one after the other, so that they do not get into each other's way.
@Suite(.serialized) enum MountTests {}

/// A folder of its own for a test, and what the test mounts, attaches and starts below it. All of it is gone when the
/// test is over, however it ended.
final class Stage {
    private let folder: TemporaryFolder
    private var processes: [RunningProgram] = []
    private var mountCount = 0

    private init() throws { folder = try TemporaryFolder() }

    /// Runs a test; its folder is on the disk or, for many small flushes, in memory.
    static func use(inMemory: Bool = false, _ body: (Stage) throws -> Void) throws {
        try Machine.requireAll()
        let stage = try Stage()
        defer {
            stage.cleanUp()
            if inMemory { _ = try? attempt("umount", "--lazy", stage.path) }
        }
        if inMemory { try tool("mount", "-t", "tmpfs", "-o", "size=1g,mode=755", "vdmount-test", stage.path) }
        try body(stage)
    }

    /// Where it is.
    var path: String { folder.path }

    /// The path of a file in it.
    func file(_ name: String) -> String { folder.file(name) }

    /// Makes a folder in it.
    func makeFolder(_ name: String) throws -> String {
        let path = file(name)
        if unsafe mkdir(path, 0o755) != 0 { throw SystemFailure(errno) }
        return path
    }

    /// Starts a program that runs beside the test.
    func start(_ words: String...) throws -> RunningProgram {
        let process = RunningProgram(try Subprocess.start(words))
        processes.append(process)
        return process
    }

    // MARK: - Disks

    /// Makes a folder to mount at.
    func makeMountpoint() throws -> String {
        mountCount += 1
        return try makeFolder("disk\(mountCount)")
    }

    /// Mounts an image in a new folder.
    func mount(_ image: String, _ options: String...) throws -> MountedDisk {
        try mount(image, at: makeMountpoint(), options: options)
    }

    /// Mounts an image at a folder or a file.
    func mount(_ image: String, at mountpoint: String, options: [String] = []) throws -> MountedDisk {
        try tool([Programs.vdmount] + options + [image, mountpoint])
        return try MountedDisk(at: mountpoint)
    }

    /// A loop device over a file.
    func attach(_ path: String, _ options: String...) throws -> String {
        let device = try tool(["losetup", "--find", "--show"] + options + [path])
        return String(device.prefix { $0 != "\n" })
    }

    /// Detaches a loop device and waits until it has let go of its file.
    func detach(_ device: String) throws {
        try tool(["losetup", "--detach", device])
        let name = device.split(separator: "/").last ?? ""
        let isFree = eventually { unsafe access("/sys/block/\(name)/loop/backing_file", F_OK) != 0 }
        guard isFree else { throw TestFailure("\(device) does not let go of its file") }
    }

    // MARK: - The end

    private func cleanUp() {
        for process in processes { _ = try? process.end(SIGKILL) }
        for target in privateTargets() { _ = try? attempt(Programs.vdumount, target) }
        for isLastTry in [false, false, true] {
            for mount in mounts().reversed() where isLastTry || !mount.isOurs {
                _ = try? attempt(["umount"] + (isLastTry ? ["--lazy"] : []) + [mount.path])
            }
            for device in loopDevices() { _ = try? attempt("losetup", "--detach", device) }
            if isLastTry { for pid in daemons() { kill(pid, SIGKILL) } }
            for mount in mounts().reversed() where mount.isOurs { _ = try? attempt(Programs.vdumount, mount.path) }
            if mounts().isEmpty, loopDevices().isEmpty, daemons().isEmpty { break }
        }
    }

    /// What is mounted below the folder.
    func mounts() -> [(path: String, isOurs: Bool)] {
        contents(of: "/proc/self/mountinfo").split(separator: "\n").compactMap { line in
            let fields = line.split(separator: " ")
            guard fields.count > 4, fields[4].hasPrefix(path + "/") else { return nil }
            return (String(fields[4]), line.contains(" - fuse.vdmount "))
        }
    }

    /// Where `vdmount --fs` says that it mounted file systems below the folder.
    func privateTargets() -> [String] {
        (1..<200).compactMap { number in
            let target = contents(of: "/run/vdmount/fs/\(number)/at")
            return target.hasPrefix(path + "/") ? target : nil
        }
    }

    private func loopDevices() -> [String] {
        (0..<256).compactMap { number in
            let file = contents(of: "/sys/block/loop\(number)/loop/backing_file")
            return file.hasPrefix(path + "/") ? "/dev/loop\(number)" : nil
        }
    }

    private func daemons() -> [Int32] {
        processIdentifiers(of: "vdmount", withArgument: { $0.hasPrefix(self.path + "/") })
    }
}

/// A program that runs beside the test.
final class RunningProgram {
    private let process: Subprocess
    private var result: Subprocess.Result?

    fileprivate init(_ process: Subprocess) { self.process = process }

    var pid: Int32 { process.pid }

    /// Waits for its end.
    func wait() throws -> Subprocess.Result {
        if let result { return result }
        let ended = try process.wait()
        result = ended
        return ended
    }

    /// Sends a signal and waits for the end.
    @discardableResult
    func end(_ signal: Int32) throws -> Subprocess.Result {
        if result == nil { process.send(signal: signal) }
        return try wait()
    }
}

/// A disk that is mounted.
struct MountedDisk {
    /// The folder, or the file that is the disk.
    let mountpoint: String
    /// The disk as a file.
    let file: String
    /// The daemon.
    let pid: Int32

    /// The disk that is mounted at a folder or file.
    init(at mountpoint: String) throws {
        self.mountpoint = mountpoint
        let isFolder = (try? FileStatus("\(mountpoint)/disk.raw")) != nil
        file = isFolder ? "\(mountpoint)/disk.raw" : mountpoint
        guard let pid = processIdentifiers(of: "vdmount", withArgument: { $0 == mountpoint }).first else {
            throw TestFailure("no process serves \(mountpoint)")
        }
        self.pid = pid
    }

    /// Unmounts it with `vdumount`, which must succeed.
    func unmount() throws { try tool(Programs.vdumount, mountpoint) }
}

/// The processes of a program that have an argument like that.
func processIdentifiers(of name: String, withArgument isWanted: (String) -> Bool) -> [Int32] {
    guard let stream = unsafe opendir("/proc") else { return [] }
    defer { unsafe closedir(stream) }
    var found: [Int32] = []
    while let entry = unsafe readdir(stream) {
        let text = unsafe withUnsafeBytes(of: &entry.pointee.d_name) { bytes in
            unsafe String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
        }
        guard let pid = Int32(text), contents(of: "/proc/\(pid)/comm") == name + "\n" else { continue }
        let arguments = contents(of: "/proc/\(pid)/cmdline").split(separator: "\0").map(String.init)
        if arguments.contains(where: isWanted) { found.append(pid) }
    }
    return found
}

/// Whether a process still runs; one that only waits to be reaped does not.
func isRunning(_ pid: Int32) -> Bool {
    let state = contents(of: "/proc/\(pid)/stat").split(separator: ") ").last?.first
    return state != nil && state != "Z"
}
