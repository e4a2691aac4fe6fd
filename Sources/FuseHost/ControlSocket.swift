import Dispatch
internal import FuseShim
import Glibc

/// What a daemon says to a line.
public enum ControlAnswer: Sendable {
    case text(String)
    /// There is no such question.
    case unknown
    /// Somebody has taken over the connection, and answers there.
    case taken
}

/// Answers a line that came over a connection, which whoever wants more of it may take over.
public typealias ControlHandler = @Sendable (String, ControlConnection) -> ControlAnswer

/// The socket on which a daemon answers questions about itself, and takes orders: a line is asked, a text is answered,
/// the connection ends. Only the daemon's user and root get an answer.
// Sendable: constants; the Dispatch source may be used from any thread.
final class ControlSocket: @unchecked Sendable {
    /// The most bytes of a question.
    private static let questionLimit = 4096
    /// How long a question may take to arrive, in milliseconds.
    private static let patience = 3000
    /// The most bytes of an answer.
    private static let answerLimit = 1 << 20

    private let source: any DispatchSourceRead

    /// Takes over a listening socket and answers with what `answer` says to a line. Questions are answered one after
    /// the other, on a queue of low priority.
    init(listening descriptor: Int32, answer: @escaping ControlHandler) {
        let queue = DispatchQueue(label: "vdmount.control", qos: .utility)
        source = DispatchSource.makeReadSource(fileDescriptor: descriptor, queue: queue)
        source.setEventHandler { Self.serve(descriptor, answer) }
        source.setCancelHandler { close(descriptor) }
        source.activate()
    }

    /// Ends answering.
    func end() { source.cancel() }

    private static func serve(_ listening: Int32, _ answer: ControlHandler) {
        var user: uid_t = 0
        let descriptor = unsafe fuseshim_control_accept(listening, &user)
        guard descriptor >= 0 else { return }
        let connection = ControlConnection(descriptor)
        guard user == 0 || user == geteuid() else { return }
        let question: String
        switch connection.line(within: patience, limit: questionLimit) {
        case .text(let text): question = text
        case .ended: question = ""
        case .late: return
        }
        switch answer(question, connection) {
        case .text(let text): connection.send("ok\n" + text)
        case .unknown: connection.send("unknown\n")
        case .taken: break
        }
    }

    /// Asks the daemon at a path: its answer, nil if there is none. Nothing is said to anybody but a process of
    /// `owner`: a user's folder can hold a link to somebody else's socket.
    ///
    /// - Parameter milliseconds: For how long it is waited for all of the answer.
    static func ask(
        _ question: String, at path: String, of owner: UInt32, within milliseconds: Int = 3000
    ) -> DaemonAnswer {
        guard let connection = connect(to: path, of: owner), connection.send(question + "\n") else { return .none }
        connection.endSending()
        guard let bytes = connection.all(within: milliseconds, limit: answerLimit) else { return .none }
        if bytes.starts(with: "unknown".utf8) { return .unknown }
        guard bytes.starts(with: "ok\n".utf8) else { return .none }
        return .text(String(decoding: bytes.dropFirst(3), as: UTF8.self))
    }

    /// A connection to the daemon at a path, if it is a process of `owner`.
    static func connect(to path: String, of owner: UInt32) -> ControlConnection? {
        var user: uid_t = 0
        let descriptor = unsafe fuseshim_control_connect(path, &user)
        guard descriptor >= 0 else { return nil }
        let connection = ControlConnection(descriptor)
        return user == owner ? connection : nil
    }
}

/// What came back from a daemon that was asked.
public enum DaemonAnswer: Sendable, Equatable {
    case text(String)
    /// It does not know the question: it is of another version.
    case unknown
    /// It does not answer, or not this user.
    case none
}
