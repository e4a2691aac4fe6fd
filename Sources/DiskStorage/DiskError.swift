internal import CLinux

/// The one error of the library: what went wrong, in which image, at which offset, and what a person can do about it.
///
/// Three classes stay apart: a bad image (``Kind/invalidImage``, ``Kind/unsupported``, ``Kind/brokenLink``), a bad
/// environment (``Kind/system``, ``Kind/notFound``, ``Kind/locked``, ``Kind/refused``) and a call that cannot be
/// (``Kind/invalidArgument``, ``Kind/readOnly``, ``Kind/losesData``). Beside them stands ``Kind/cancelled``. A bug of
/// ours is none of them: it is a precondition.
public struct DiskError: Error, Sendable {
    /// What sort of thing went wrong; callers decide by it, people read ``description``.
    public enum Kind: String, Sendable {
        /// The image's bytes contradict its format.
        case invalidImage
        /// The image is well formed, and uses something that is not supported.
        case unsupported
        /// No format recognises the file.
        case unknownFormat
        /// A child and its parent do not belong together, or the chain is circular or too deep.
        case brokenLink
        /// A file that an image names is missing.
        case notFound
        /// A file that an image names lies where it may not be opened from.
        case refused
        /// Another process has the image open in a way that excludes ours.
        case locked
        /// The image must be repaired before it can be used this way.
        case needsRepair
        /// The disk or image was opened read-only.
        case readOnly
        /// The caller asked for something that cannot be.
        case invalidArgument
        /// The operating system refused; ``DiskError/errno`` says how.
        case system
        /// What was asked for would lose data of the disk, which the caller has not allowed.
        case losesData
        /// The operation was asked to stop, and did.
        case cancelled
    }

    /// All fields behind one reference, so that a function which throws stays as cheap as one which does not.
    private final class Contents: Sendable {
        let kind: Kind
        let message: String
        let image: String?
        let offset: UInt64?
        let errno: Int32

        init(kind: Kind, message: String, image: String?, offset: UInt64?, errno: Int32) {
            self.kind = kind
            self.message = message
            self.image = image
            self.offset = offset
            self.errno = errno
        }
    }

    private let contents: Contents

    /// What sort of error this is.
    public var kind: Kind { contents.kind }
    /// What is wrong and what to do, without the image's name.
    public var message: String { contents.message }
    /// The name of the image (or extent file) it is about.
    public var image: String? { contents.image }
    /// Where in that file, in bytes.
    public var offset: UInt64? { contents.offset }
    /// The operating system's number for it; 0 if it did not come from there.
    public var errno: Int32 { contents.errno }

    public init(
        _ kind: Kind, _ message: String, image: String? = nil, offset: UInt64? = nil, errno: Int32 = 0
    ) {
        contents = Contents(kind: kind, message: message, image: image, offset: offset, errno: errno)
    }

    /// A system call's failure: `doing` completes "cannot …".
    public static func system(_ errno: Int32, _ doing: String, image: String? = nil, offset: UInt64? = nil) -> DiskError
    {
        DiskError(
            .system, "cannot \(doing): \(describe(errno: errno))", image: image, offset: offset, errno: abs(errno))
    }

    /// The same error, about `image` if it did not say yet which one it is about.
    public func about(_ image: String) -> DiskError {
        self.image == nil ? DiskError(kind, message, image: image, offset: offset, errno: errno) : self
    }

    /// The same error, at `offset` if it did not say yet.
    public func at(_ offset: UInt64) -> DiskError {
        self.offset == nil ? DiskError(kind, message, image: image, offset: offset, errno: errno) : self
    }

    /// The number that a system call would have answered with: what FUSE and block layers understand.
    public var errnoValue: Int32 {
        if errno != 0 { return errno }
        return switch kind {
        case .readOnly: 30  // EROFS
        case .invalidArgument: 22  // EINVAL
        case .locked: 16  // EBUSY
        case .notFound: 2  // ENOENT
        case .refused: 1  // EPERM
        case .cancelled: 125  // ECANCELED
        default: 5  // EIO
        }
    }

    /// The system's words for an errno, positive or negative.
    public static func describe(errno: Int32) -> String {
        var text = [CChar](repeating: 0, count: 128)
        unsafe text.withUnsafeMutableBufferPointer { unsafe clinux_strerror(abs(errno), $0.baseAddress, $0.count) }
        return String(decoding: text.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }
}

extension DiskError: CustomStringConvertible {
    /// `FILE: what is wrong (at byte N)`, for one line on standard error.
    public var description: String {
        var text = image.map { $0 + ": " } ?? ""
        text += message
        if let offset { text += " (at byte \(offset))" }
        return text.printable()
    }
}
