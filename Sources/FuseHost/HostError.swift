import Glibc

/// Why something about a mount failed: the file or folder it is about, what is wrong and what to do.
public struct HostError: Error, Sendable, CustomStringConvertible {
    public let subject: String
    public let reason: String

    public init(subject: String, reason: String) {
        self.subject = subject
        self.reason = reason
    }

    init(subject: String, action: String, errno code: Int32) {
        self.init(subject: subject, reason: "\(action): \(errorText(code))")
    }

    /// `subject: reason`
    public var description: String { "\(subject): \(reason)" }
}

/// The system's text for an errno value.
func errorText(_ code: Int32) -> String {
    var buffer = [CChar](repeating: 0, count: 128)
    // The XSI variant, which Swift imports: it fills the buffer.
    _ = unsafe strerror_r(code, &buffer, buffer.count)
    let said = text(from: buffer)
    return said.isEmpty ? "error \(code)" : said
}
