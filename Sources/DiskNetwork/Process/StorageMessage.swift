internal import DiskStorage
internal import Glibc

/// What goes between a process that uses storages and the one that opens them for it, over stream sockets: a header of
/// fixed size, then bytes. One question at a time on a socket, then its answer.
struct StorageMessage {
    /// What is asked for.
    enum Request: UInt8 {
        /// Bytes: the options and allowed addresses, as words.
        case configure = 1
        /// Bytes: the address; `flag` says whether it is written to. Answered by words.
        case open
        /// Nothing more is opened.
        case seal
        case read
        case write
        case discard
        case flush
        case setLength
        /// Answered by two numbers, or none.
        case nextData
    }

    /// The most bytes after a header.
    static let limit = 1 << 20
    static let headerSize = 32

    /// What is asked for; in answers 0 for success.
    var code: UInt8 = 0
    var flag = false
    /// Which storage.
    var storage: UInt32 = 0
    var offset: UInt64 = 0
    /// How many bytes it is about.
    var length: UInt64 = 0
    /// How many bytes follow.
    var byteCount = 0

    private var header: [UInt8] {
        var bytes: [UInt8] = [code, flag ? 1 : 0, 0, 0]
        func add(_ number: UInt64, _ count: Int) {
            for index in 0..<count { bytes.append(UInt8(truncatingIfNeeded: number >> UInt64(8 * index))) }
        }
        add(UInt64(storage), 4)
        add(offset, 8)
        add(length, 8)
        add(UInt64(byteCount), 8)
        return bytes
    }

    init(_ request: Request) { code = request.rawValue }
    init() {}

    /// The next header from a socket; nil if the other side is gone, or says what cannot be.
    init?(from socket: Int32) {
        var bytes = [UInt8](repeating: 0, count: Self.headerSize)
        let isThere = try? bytes.withIOBuffer { (buffer) throws(DiskError) in Self.receive(buffer, from: socket) }
        guard isThere == true else { return nil }
        func number(_ offset: Int, _ count: Int) -> UInt64 {
            bytes[offset..<offset + count].reversed().reduce(0) { $0 << 8 | UInt64($1) }
        }
        code = bytes[0]
        flag = bytes[1] != 0
        storage = UInt32(number(4, 4))
        offset = number(8, 8)
        length = number(16, 8)
        guard let count = Int(exactly: number(24, 8)), count <= Self.limit else { return nil }
        byteCount = count
    }

    /// Sends it with the bytes that belong to it; false if the other side is gone.
    func send(_ bytes: IOBytes?, to socket: Int32) -> Bool {
        let isSent = try? header.withIOBytes { (header) throws(DiskError) in Self.send(header, to: socket) }
        guard isSent == true else { return false }
        guard let bytes, bytes.count > 0 else { return true }
        return Self.send(bytes, to: socket)
    }

    private static func send(_ bytes: IOBytes, to socket: Int32) -> Bool {
        var done = 0
        while done < bytes.count {
            let sent = unsafe Glibc.send(socket, bytes.pointer + done, bytes.count - done, Int32(MSG_NOSIGNAL))
            if sent > 0 { done += sent } else if sent == 0 || errno != EINTR { return false }
        }
        return true
    }

    /// Fills the buffer; false if the other side is gone before.
    static func receive(_ buffer: IOBuffer, from socket: Int32) -> Bool {
        var done = 0
        while done < buffer.count {
            let count = unsafe Glibc.recv(socket, buffer.pointer + done, buffer.count - done, 0)
            if count > 0 { done += count } else if count == 0 || errno != EINTR { return false }
        }
        return true
    }

    /// The bytes that follow the header.
    func bytes(from socket: Int32) -> [UInt8]? {
        var bytes = [UInt8](repeating: 0, count: byteCount)
        let isThere = try? bytes.withIOBuffer { (buffer) throws(DiskError) in Self.receive(buffer, from: socket) }
        return isThere == true ? bytes : nil
    }

    // MARK: - Words

    /// The most words of an answer that make sense: what comes then is part of the last one.
    private static let mostWords = 16

    /// The words of an answer. (A mebibyte of zero bytes would be as many of them.)
    static func words(_ bytes: [UInt8], atMost limit: Int = mostWords) -> [String] {
        bytes.split(separator: 0, maxSplits: limit - 1, omittingEmptySubsequences: false)
            .map { String(decoding: $0, as: UTF8.self) }
    }

    static func bytes(_ words: [String]) -> [UInt8] {
        // A word with a zero byte would be two.
        Array(
            words.map { String($0.unicodeScalars.filter { $0.value != 0 }.map(Character.init)) }
                .joined(separator: "\0").utf8.prefix(limit))
    }

    static func bytes(_ error: DiskError) -> [UInt8] {
        bytes([
            error.kind.rawValue, String(error.errno), error.offset.map(String.init) ?? "", error.image ?? "",
            error.message,
        ])
    }

    static func error(_ bytes: [UInt8]) -> DiskError {
        let words = words(bytes)
        guard words.count == 5, let kind = DiskError.Kind(rawValue: words[0]) else {
            return DiskError(.system, "the process that reaches the server answers what is not understood", errno: EIO)
        }
        return DiskError(
            kind, words[4], image: words[3].isEmpty ? nil : words[3], offset: UInt64(words[2]),
            errno: Int32(words[1]) ?? EIO)
    }
}
