import DiskTesting
import Glibc
import Testing

/// A test that cannot go on.
struct TestFailure: Error, CustomStringConvertible {
    let description: String
    init(_ text: String) { description = text }
}

/// The programs under test, from the folder that the tests were built into.
enum Programs {
    static let vdmount = path("vdmount")
    static let vdumount = path("vdumount")
    static let vdimg = path("vdimg")

    /// The folder of the test bundle, which on Linux is the running program.
    static let folder: String = {
        var buffer = [UInt8](repeating: 0, count: Int(PATH_MAX))
        let count = unsafe buffer.withUnsafeMutableBytes { buffer in
            unsafe readlink(
                "/proc/self/exe", buffer.bindMemory(to: CChar.self).baseAddress.unsafelyUnwrapped, buffer.count)
        }
        let path = String(decoding: buffer.prefix(max(0, count)), as: UTF8.self)
        return String(path[..<(path.lastIndex(of: "/") ?? path.startIndex)])
    }()

    private static func path(_ name: String) -> String { "\(folder)/\(name)" }
}

/// What the tests need of the machine.
enum Machine {
    private static let tools = [
        "blkid", "blockdev", "cmp", "cp", "diff", "du", "dumpe2fs", "e2fsck", "fallocate", "findmnt", "fio", "flock",
        "fstrim", "fusermount3", "losetup", "mkfs.btrfs", "mkfs.ext2", "mkfs.ext4", "mkfs.xfs", "mkswap", "mount",
        "python3", "qemu-img", "qemu-io", "qemu-storage-daemon", "setpriv", "sfdisk", "sha256sum", "stat", "timeout",
        "umount", "unshare", "vmdkmount", "wipefs",
    ]

    /// What is missing, as one text; nil if nothing is.
    private static let missing: String? = {
        var missing: [String] = []
        if geteuid() != 0 { missing.append("root (the tests mount, and attach loop devices)") }
        for device in ["/dev/fuse", "/dev/loop-control"] where unsafe access(device, F_OK) != 0 {
            missing.append("\(device) (load its kernel module)")
        }
        let folders = (unsafe getenv("PATH").map { unsafe String(cString: $0) } ?? "").split(separator: ":")
        for tool in tools where !folders.contains(where: { unsafe access("\($0)/\(tool)", X_OK) == 0 }) {
            missing.append("the program \(tool) ('make deps' installs it)")
        }
        for program in [Programs.vdmount, Programs.vdumount, Programs.vdimg]
        where unsafe access(program, X_OK) != 0 {
            missing.append("\(program) ('swift build --build-tests' makes it)")
        }
        return missing.isEmpty ? nil : missing.joined(separator: ", ")
    }()

    /// Throws what is missing: nothing is skipped.
    static func requireAll() throws {
        if let missing { throw TestFailure("missing for the mount tests: \(missing)") }
    }
}

// MARK: - Running programs

/// Runs a program to its end, whatever it answers. One that hangs is ended after two minutes.
func attempt(_ command: [String]) throws -> Subprocess.Result {
    try Subprocess.run(["timeout", "-k", "5", "120"] + command)
}

/// ``attempt(_:)``
func attempt(_ words: String...) throws -> Subprocess.Result { try attempt(words) }

/// Runs a program that must succeed, and answers its standard output.
@discardableResult
func tool(_ command: [String]) throws -> String {
    let result = try attempt(command)
    guard result.status == 0 else {
        throw TestFailure(
            "\(command.joined(separator: " ")): status \(result.status)\n\(result.outputText)\(result.errorText)")
    }
    return result.outputText
}

/// ``tool(_:)``
@discardableResult
func tool(_ words: String...) throws -> String { try tool(words) }

/// `vdimg` with arguments; must succeed.
@discardableResult
func vdimg(_ words: String...) throws -> String { try tool([Programs.vdimg] + words) }

/// Runs commands of qemu-io on an image or file; all must succeed and find what they expect.
func qemuIO(_ image: String, format: String = "vmdk", readOnly: Bool = false, _ commands: [String]) throws {
    let options = ["-f", format] + (readOnly ? ["-r"] : [])
    let result = try attempt(["qemu-io"] + options + commands.flatMap { ["-c", $0] } + [image])
    let text = result.outputText + result.errorText
    guard result.status == 0, !text.contains("failed"), !text.contains("Pattern verification") else {
        throw TestFailure("qemu-io \(image) \(commands): status \(result.status)\n\(text)")
    }
}

/// ``qemuIO(_:format:readOnly:_:)``
func qemuIO(_ image: String, format: String = "vmdk", readOnly: Bool = false, _ commands: String...) throws {
    try qemuIO(image, format: format, readOnly: readOnly, commands)
}

/// Checks that an image and a file hold the same disk, and that qemu-img finds the image's structure in order.
func expectEqual(
    _ image: String, toRaw raw: String, checks: Bool = true, _ sourceLocation: SourceLocation = #_sourceLocation
) throws {
    if checks {
        let check = try attempt("qemu-img", "check", "-f", "vmdk", image)
        let text = check.outputText + check.errorText
        #expect(
            check.status == 0 && text.contains("No errors were found"), "qemu-img check: \(text)",
            sourceLocation: sourceLocation)
    }
    let comparison = try attempt("qemu-img", "compare", "-f", "vmdk", "-F", "raw", image, raw)
    #expect(
        comparison.status == 0, "qemu-img compare: \(comparison.outputText)\(comparison.errorText)",
        sourceLocation: sourceLocation)
}

/// Checks that two files are equal byte for byte.
func expectSameBytes(_ a: String, _ b: String, _ sourceLocation: SourceLocation = #_sourceLocation) throws {
    let result = try attempt("cmp", a, b)
    #expect(result.status == 0, "\(result.outputText)\(result.errorText)", sourceLocation: sourceLocation)
}

/// Checks that a program of ours failed as it should: the status, one line of its own, with these words in it.
func expectRefused(
    _ result: Subprocess.Result, status: Int32 = 1, _ words: String...,
    sourceLocation: SourceLocation = #_sourceLocation
) {
    let text = result.errorText
    #expect(result.status == status, "\(text)", sourceLocation: sourceLocation)
    for word in words {
        #expect(text.contains(word), "'\(word)' is not in: \(text)", sourceLocation: sourceLocation)
    }
    for word in ["Fatal error", ".swift", "Stack", "Backtrace", "Error Domain", "terminated"] {
        #expect(!text.contains(word), "\(text)", sourceLocation: sourceLocation)
    }
    // A usage error also shows the usage.
    guard status != 64 else { return }
    #expect(text.hasPrefix("vd") && text.hasSuffix("\n"), "\(text)", sourceLocation: sourceLocation)
    #expect(text.filter { $0 == "\n" }.count == 1, "more than one line: \(text)", sourceLocation: sourceLocation)
}

/// Asks again and again until the answer is yes; false after ten seconds.
func eventually(_ condition: () throws -> Bool) rethrows -> Bool {
    for _ in 0..<400 {
        if try condition() { return true }
        usleep(25_000)
    }
    return false
}

/// Expects that something becomes true within ten seconds.
func expectEventually(
    _ condition: () throws -> Bool, sourceLocation: SourceLocation = #_sourceLocation
) rethrows {
    let isSo = try eventually(condition)
    #expect(isSo, "still not so after ten seconds", sourceLocation: sourceLocation)
}
