import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// Descriptors that were written to do harm: what they name outside the image's folder is not opened, circles of
/// parents end, and neither their length nor their numbers cost more than they may.
struct HostileDescriptorTests {
    static func descriptor(_ extents: String, parent: String? = nil, header: String = "") -> String {
        """
        # Disk DescriptorFile
        version=1
        CID=12345678
        parentCID=\(parent == nil ? "ffffffff" : "12345678")
        \(parent.map { "parentFileNameHint=\"\($0)\"\n" } ?? "")\(header)createType="custom"
        \(extents)
        ddb.adapterType = "ide"

        """
    }

    // MARK: - Names

    /// Names that lead out of the folder, or to what is no file.
    private static let names = [
        "/etc/shadow", "../outside.vmdk", "below/../../outside.vmdk", "/dev/null", "/dev/zero", "link",
        "linked/outside.vmdk",
        "fifo", ".", "..", "/", "below", "/proc/self/mem", #"..\outside.vmdk"#, #"C:\outside.vmdk"#, "missing",
        "outside.vmdk\u{0}.vmdk", String(repeating: "a", count: 300),
        String(repeating: "../", count: 2000) + "etc/shadow",
    ]

    private static func makeFolder(_ folder: TemporaryFolder) throws -> String {
        let images = folder.file("images")
        try Peer.run("mkdir", "-p", images + "/below")
        try folder.write([UInt8](repeating: 7, count: 1024), to: "outside.vmdk")
        try Peer.run("ln", "-s", "../outside.vmdk", images + "/link")
        try Peer.run("ln", "-s", "..", images + "/linked")
        try Peer.run("mkfifo", images + "/fifo")
        return images
    }

    @Test(.timeLimit(.minutes(1)), arguments: ["FLAT", "SPARSE", "VMFS", "parent"])
    func namesThatLeadOutside(_ kind: String) throws {
        let folder = try TemporaryFolder()
        let images = try Self.makeFolder(folder)
        for (number, name) in Self.names.enumerated() {
            let text =
                kind == "parent"
                ? Self.descriptor("RW 2 ZERO", parent: name) : Self.descriptor("RW 2 \(kind) \"\(name)\" 0")
            unsafe unlink(images + "/disk.vmdk")
            try FileStorage(creating: images + "/disk.vmdk").write(Array(text.utf8), at: 0, for: .descriptor)
            let options = DiskOptions(isWritable: number % 2 == kind.utf8.count % 2)
            #expect {
                try Disk.open(images + "/disk.vmdk", options: options)
            } throws: { error in
                guard let error = error as? DiskError else { return false }
                return [.refused, .notFound, .invalidImage].contains(error.kind) && error.description.utf8.count < 2000
            }
        }
        #expect(try folder.read("outside.vmdk") == [UInt8](repeating: 7, count: 1024))
    }

    /// The same folders named by the user, as an image.
    @Test(.timeLimit(.minutes(1))) func whatIsNoFileIsNoImage() throws {
        let folder = try TemporaryFolder()
        let images = try Self.makeFolder(folder)
        for name in ["fifo", "below", "/dev/null", "/dev/zero"] {
            let path = name.hasPrefix("/") ? name : images + "/" + name
            for isWritable in [false, true] {
                #expect { try Disk.open(path, options: DiskOptions(isWritable: isWritable, format: "raw")) } throws: {
                    ($0 as? DiskError)?.kind == .refused
                }
            }
        }
    }

    // MARK: - Circles and depth

    @Test(.timeLimit(.minutes(1)), arguments: 1...3) func circleOfParentsEnds(_ count: Int) throws {
        let folder = try TemporaryFolder()
        for number in 0..<count {
            let text = Self.descriptor("RW 8 ZERO", parent: "disk\((number + 1) % count).vmdk")
            try folder.write(Array(text.utf8), to: "disk\(number).vmdk")
        }
        for isWritable in [false, true] {
            #expect {
                try Disk.open(folder.file("disk0.vmdk"), options: DiskOptions(isWritable: isWritable))
            } throws: { error in
                [.brokenLink, .locked].contains((error as? DiskError)?.kind)
            }
        }
        #expect { try ImageInformation.read(folder.file("disk0.vmdk"), wholeChain: true) } throws: {
            ($0 as? DiskError)?.kind == .brokenLink
        }
    }

    /// The same file under another name is the same file.
    @Test(.timeLimit(.minutes(1))) func circleThroughALinkEnds() throws {
        let folder = try TemporaryFolder()
        try folder.write(Array(Self.descriptor("RW 8 ZERO", parent: "other.vmdk").utf8), to: "disk.vmdk")
        try Peer.run("ln", folder.file("disk.vmdk"), folder.file("other.vmdk"))
        #expect { try Disk.open(folder.file("disk.vmdk")) } throws: { ($0 as? DiskError)?.kind == .brokenLink }
    }

    @Test func chainThatIsTooDeepIsRefused() throws {
        #expect(DiskOptions().depthLimit == 256)
        let folder = try TemporaryFolder()
        for number in 0...12 {
            let text = Self.descriptor("RW 8 ZERO", parent: number == 12 ? nil : "disk\(number + 1).vmdk")
            try folder.write(Array(text.utf8), to: "disk\(number).vmdk")
        }
        var options = DiskOptions()
        options.depthLimit = 13
        try Disk.open(folder.file("disk0.vmdk"), options: options).close()
        options.depthLimit = 12
        #expect { try Disk.open(folder.file("disk0.vmdk"), options: options) } throws: {
            ($0 as? DiskError)?.kind == .brokenLink
        }
    }

    // MARK: - Texts

    /// What a text does: an error of one of some kinds, or (nil among them) it opens.
    struct Text {
        let name: String
        let bytes: [UInt8]
        let kinds: [DiskError.Kind?]

        init(_ name: String, _ text: String, _ kinds: DiskError.Kind?...) {
            self.init(name, bytes: Array(text.utf8), kinds)
        }

        init(_ name: String, bytes: [UInt8], _ kinds: [DiskError.Kind?]) {
            self.name = name
            self.bytes = bytes
            self.kinds = kinds
        }
    }

    static func texts() -> [Text] {
        let largest = 1 << 54
        func lines(_ line: String, _ count: Int) -> String { String(repeating: line + "\n", count: count) }
        return [
            Text("as many extents as there may be", descriptor(lines("RW 8 ZERO", 65_536)), nil),
            Text("one extent more", descriptor(lines("RW 8 ZERO", 65_537)), .invalidImage),
            Text("missing extents", descriptor(lines("RW 8 FLAT \"a\" 0", 65_536)), .notFound),
            Text("sizes that reach the limit", descriptor(lines("RW \(largest / 2 - 1) ZERO", 2)), nil),
            Text("sizes beyond the limit", descriptor(lines("RW \(largest / 2) ZERO", 3)), .invalidImage),
            Text("sizes whose sum does not fit", descriptor(lines("RW \(largest) ZERO", 2000)), .invalidImage),
            Text("a size of 2^63", descriptor("RW 9223372036854775808 ZERO"), .invalidImage),
            Text("an offset of 2^63", descriptor("RW 8 FLAT \"disk.vmdk\" 9223372036854775808"), .invalidImage),
            Text("an offset at the limit", descriptor("RW 8 FLAT \"disk.vmdk\" \(largest)"), .invalidImage),
            Text(
                "an extent that is the descriptor", descriptor("RW 1 FLAT \"disk.vmdk\" 0\n# \(lines("x", 300))"), nil),
            Text("sparse extent that is the descriptor", descriptor("RW 1 SPARSE \"disk.vmdk\""), .invalidImage),
            Text("no extents", descriptor(""), .invalidImage),
            Text("extents of no length", descriptor(lines("RW 0 ZERO", 50_000)), .invalidImage, nil),
            Text("100,000 lines", descriptor("RW 8 ZERO", header: lines("ddb.a = \"b\"", 99_980)), nil),
            Text("more lines", descriptor("RW 8 ZERO", header: lines("a=b", 100_001)), .invalidImage),
            Text("2 MiB of line ends", descriptor("RW 8 ZERO", header: lines("", 2_000_000)), .invalidImage),
            Text(
                "one long line",
                descriptor("RW 8 ZERO", header: "a=" + lines(String(repeating: "b", count: 2_000_000), 1)), nil),
            Text(
                "one long comment",
                descriptor("RW 8 ZERO", header: "#" + lines(String(repeating: "=", count: 2_000_000), 1)), nil),
            Text(
                "one long blank", descriptor("RW 8 ZERO", header: lines(String(repeating: " ", count: 2_000_000), 1)),
                nil),
            Text("one long name", descriptor("RW 8 FLAT \"\(String(repeating: "n", count: 2_000_000))\" 0"), .notFound),
            Text(
                "one long parent", descriptor("RW 8 ZERO", parent: String(repeating: "../", count: 600_000)), .notFound,
                .refused),
            Text(
                "quotes without end", descriptor("RW 8 FLAT \"\(String(repeating: "\"\" \"", count: 400_000))"),
                .invalidImage, .notFound),
            Text(
                "more than 2 MiB",
                descriptor("RW 8 ZERO", header: "#" + lines(String(repeating: "x", count: 2 << 20), 1)), .invalidImage),
            Text(
                "every key twice", descriptor("RW 8 ZERO", header: "CID=1\nparentCID=2\nversion=9\ncreateType=\"x\"\n"),
                nil),
            Text(
                "a version that is none", "# Disk DescriptorFile\nversion=99999999999999999999\nRW 8 ZERO\n",
                .unsupported),
            Text("an unknown encoding", descriptor("RW 8 ZERO", header: "encoding=\"EBCDIC\"\n"), nil),
            Text(
                "an unknown encoding in use",
                descriptor("RW 8 ZERO", header: "encoding=\"EBCDIC\"\nddb.comment = \"ä\"\n"), .unsupported),
            Text(
                "UTF-16", bytes: Array(descriptor("RW 8 ZERO").utf16.flatMap { [UInt8($0 & 255), UInt8($0 >> 8)] }),
                [.unknownFormat, .invalidImage, nil]),
            Text(
                "bytes that are no UTF-8",
                bytes: Array(descriptor("RW 8 ZERO", header: "encoding=\"UTF-8\"\n").utf8) + [0xff, 0xc0, 0x80], [nil]),
            Text(
                "a NUL in the text", bytes: Array(descriptor("RW 8 ZERO").utf8) + [0] + Array("RW 8 ZERO\n".utf8), [nil]
            ),
            Text(
                "a NUL in the first line", bytes: [UInt8](repeating: 0, count: 2) + Array(descriptor("RW 8 ZERO").utf8),
                [nil, .unknownFormat]),
            Text("each line in windows-1252", bytes: windows1252(), [nil]),
        ]
    }

    /// 90,000 lines, each with a character of another encoding.
    private static func windows1252() -> [UInt8] {
        let line = Array("ddb.x = \"".utf8) + [0xe4] + Array("\"\n".utf8)
        let header = descriptor("RW 8 ZERO", header: "encoding=\"windows-1252\"\n")
        return Array(header.utf8) + (0..<90_000).flatMap { _ in line }
    }

    @Test func textsOfAllKinds() async throws {
        let folder = try TemporaryFolder()
        let result = await #expect(processExitsWith: .success) { [path = folder.path as String] in
            alarm(300)
            let progress = try Progress(folder: path)
            let images = try TemporaryFolder()
            for text in HostileDescriptorTests.texts() {
                progress.note(text.name)
                let image = try HostileImage([("disk.vmdk", text.bytes)], folder: images)
                let isLarge = text.bytes.count > 100_000
                // One opening of what is large; of the rest, everything that can be done.
                if let problem = isLarge ? image.open() : image.exercise() { Issue.record("\(text.name): \(problem)") }
                let kind = image.openingError()
                #expect(text.kinds.contains(kind), "\(text.name): \(kind?.rawValue ?? "opens")")
            }
        }
        HostileVMDKTests.explain(result, "", folder)
    }
}
