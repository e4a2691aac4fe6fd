internal import FuseShim
import Glibc

/// A connection to or from a control socket: lines of text both ways, and descriptors of files with them.
///
/// Who sends descriptors sends them with one line, in one message; so they arrive with that line at the latest.
// Sendable: the descriptor does not change; the rest is used by one thread at a time.
public final class ControlConnection: @unchecked Sendable {
    /// What came.
    public enum Line: Sendable, Equatable {
        case text(String)
        /// The other side sends nothing more, or what it sends cannot be received.
        case ended
        /// Nothing came in time.
        case late
    }

    /// The most bytes of a line.
    public static let lineLimit = 16 << 10
    /// The most descriptors that wait to be taken.
    private static let waitingLimit = Int(FUSESHIM_MAX_PASSED)

    private let descriptor: Int32
    private var buffer: [UInt8] = []
    private var waiting: [Int32] = []
    private var hasEnded = false

    /// Takes over a connected socket.
    init(_ descriptor: Int32) { self.descriptor = descriptor }

    deinit {
        for descriptor in waiting { close(descriptor) }
        close(descriptor)
    }

    // MARK: - Receiving

    /// The next line, without its end; what is left when the other side ends counts as one.
    ///
    /// - Parameter milliseconds: For how long it is waited for, in all.
    public func line(within milliseconds: Int, limit: Int = lineLimit) -> Line {
        let start = ContinuousClock.now
        while true {
            if let end = buffer.firstIndex(of: 0x0A) {
                let text = String(decoding: buffer[..<end], as: UTF8.self)
                buffer.removeSubrange(...end)
                return .text(text)
            }
            if hasEnded || buffer.count >= limit {
                guard !buffer.isEmpty else { return .ended }
                let text = String(decoding: buffer.prefix(limit), as: UTF8.self)
                buffer.removeAll()
                hasEnded = true  // what follows a line that is too long is none
                return .text(text)
            }
            let left = milliseconds - Self.milliseconds(since: start)
            guard left > 0 else { return .late }
            receive(within: left)
        }
    }

    private func receive(within milliseconds: Int) {
        let found = fuseshim_control_wait(descriptor, Int32(clamping: milliseconds))
        guard found != 0 else { return }
        var bytes = [UInt8](repeating: 0, count: 4096)
        var passed = [Int32](repeating: -1, count: Self.waitingLimit)
        var count = 0
        let received = unsafe bytes.withUnsafeMutableBytes { bytes in
            unsafe passed.withUnsafeMutableBufferPointer { passed in
                unsafe fuseshim_control_receive(descriptor, bytes.baseAddress, bytes.count, passed.baseAddress, &count)
            }
        }
        waiting += passed[..<count]
        if received == -Int(EAGAIN), found > 0 { return }
        // Descriptors that nobody takes are no reason to keep more of them.
        guard received > 0, waiting.count <= Self.waitingLimit else {
            hasEnded = true
            return
        }
        buffer += bytes[..<received]
    }

    /// Everything until the other side ends; nil if that takes too long, or is too much.
    func all(within milliseconds: Int, limit: Int) -> [UInt8]? {
        let start = ContinuousClock.now
        while !hasEnded {
            let left = milliseconds - Self.milliseconds(since: start)
            guard left > 0, buffer.count <= limit else { return nil }
            receive(within: left)
        }
        defer { buffer = [] }
        return buffer
    }

    private static func milliseconds(since start: ContinuousClock.Instant) -> Int {
        let passed = (ContinuousClock.now - start).components
        return Int(passed.seconds) * 1000 + Int(passed.attoseconds / 1_000_000_000_000_000)
    }

    /// The descriptors that came with the lines so far and were not taken yet; they are the caller's from now on.
    public func takeDescriptors() -> [Int32] {
        defer { waiting = [] }
        return waiting
    }

    /// Whether nothing has come that was not received, and the other side has not ended.
    public var isQuiet: Bool { buffer.isEmpty && !hasEnded && fuseshim_control_is_quiet(descriptor) }

    // MARK: - Sending

    /// Sends a text and with it descriptors, which stay the caller's; whether all of it went. Waits two seconds at most
    /// for one who does not receive.
    @discardableResult
    public func send(_ text: String, descriptors: [Int32] = []) -> Bool {
        let bytes = Array(text.utf8)
        var done = 0
        while done < bytes.count {
            let passed = done == 0 ? descriptors : []
            let sent = transmit(bytes[done...], passed, waits: true)
            guard sent > 0 else { return false }
            done += sent
        }
        return true
    }

    /// Sends a short text unless that takes waiting; false if nobody will receive anything any more.
    public func offer(_ text: String) -> Bool {
        let bytes = Array(text.utf8)
        let sent = transmit(bytes[...], [], waits: false)
        return sent == bytes.count || sent == -Int(EAGAIN)
    }

    private func transmit(_ bytes: ArraySlice<UInt8>, _ passed: [Int32], waits: Bool) -> Int {
        unsafe bytes.withUnsafeBytes { bytes in
            unsafe passed.withUnsafeBufferPointer { passed in
                unsafe fuseshim_control_send(
                    descriptor, bytes.baseAddress, bytes.count, passed.baseAddress, passed.count, waits)
            }
        }
    }

    /// Says that nothing more will be sent.
    public func endSending() { fuseshim_control_end_sending(descriptor) }

    /// Ends it, also for a thread that waits for a line.
    public func end() { fuseshim_control_end(descriptor) }

    /// Calls `body`, once, on a queue of its own, when something comes or the other side ends; not after
    /// ``PeerWatch/end()``.
    public func watch(_ body: @escaping @Sendable () -> Void) -> PeerWatch { PeerWatch(descriptor, self, body) }
}
