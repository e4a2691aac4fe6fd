/// What a daemon says of the chain that it serves, for who wants to change it: the answer to `chain` on its control
/// socket.
///
/// It takes orders there too. Each is a line; answers are lines. Descriptors of files come with the line `file`, first
/// the one for writing; paths are written as in /proc/self/mountinfo.
///
/// * `merge GENERATION SOURCE TARGET keep|remove` (numbers of ``images``), then for each file of images that change
///   `file`, for each file that is not needed afterwards `gone` (with one descriptor), then `go`. It is answered with
///   `progress PHASE DONE TOTAL` any number of times, and with `done NUMBER` or `error KIND IMAGE TEXT`. To end sending
///   cancels.
///   Before that, with `replace DEVICE INODE locked|open BYTES` and lines of hexadecimal digits the daemon has a file
///   replaced by one of that content; the answer is `file` with the new one, or `failed TEXT`.
/// * `snapshot GENERATION`; when that is answered with `ready`, the new image is made, and `image FORMAT PATH`, `file`,
///   `companion NAME PATH`, `file`, …, then `file` for each file of the image below, and `go` follow.
/// * `forget NUMBER`, a question: the files of that merge are removed.
public struct ChainDescription: Codable, Sendable {
    /// A file by its identity.
    public struct File: Codable, Sendable, Equatable {
        public var device: UInt64
        public var inode: UInt64

        public init(device: UInt64, inode: UInt64) {
            self.device = device
            self.inode = inode
        }
    }

    /// One image, with its first file.
    public struct Image: Codable, Sendable {
        public var path: String
        public var format: String
        public var file: File?

        public init(path: String, format: String, file: File?) {
            self.path = path
            self.format = format
            self.file = file
        }
    }

    /// The files that a merge has made superfluous, and of which nobody has said yet that they are removed.
    public struct Leftover: Codable, Sendable {
        public var number: Int
        public var files: [File]

        public init(number: Int, files: [File]) {
            self.number = number
            self.files = files
        }
    }

    /// Counts the changes: an order is for the chain that was looked at.
    public var generation: Int
    public var isWritable: Bool
    /// Bytes of the disk.
    public var size: UInt64
    /// The top image first; an overlay is none of them.
    public var images: [Image]
    /// The overlay that lies over them, and takes what is written; one without a name has no file. Nil: there is none.
    public var overlay: Image?
    public var leftovers: [Leftover]
    /// Why the chain cannot be changed; nil: it can.
    public var obstacle: String?

    public init(
        generation: Int, isWritable: Bool, size: UInt64, images: [Image], overlay: Image?, leftovers: [Leftover],
        obstacle: String?
    ) {
        self.generation = generation
        self.isWritable = isWritable
        self.size = size
        self.images = images
        self.overlay = overlay
        self.leftovers = leftovers
        self.obstacle = obstacle
    }
}

extension ChainDescription {
    /// Bytes as lines of hexadecimal digits.
    public static func hexLines(_ bytes: [UInt8]) -> [String] {
        let digits = Array("0123456789abcdef".utf8)
        return stride(from: 0, to: bytes.count, by: 2048).map { start in
            let part = bytes[start..<min(start + 2048, bytes.count)]
            return String(decoding: part.flatMap { [digits[Int($0 >> 4)], digits[Int($0 & 15)]] }, as: UTF8.self)
        }
    }

    /// The bytes of such a line; nil if it is none.
    public static func bytes(ofHexLine line: String) -> [UInt8]? {
        let units = Array(line.utf8)
        guard units.count % 2 == 0 else { return nil }
        var bytes: [UInt8] = []
        for index in stride(from: 0, to: units.count, by: 2) {
            guard let byte = UInt8(String(decoding: units[index..<index + 2], as: UTF8.self), radix: 16) else {
                return nil
            }
            bytes.append(byte)
        }
        return bytes
    }
}
