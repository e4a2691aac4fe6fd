import DiskStorage
import Glibc

@testable import DiskNetwork

/// What libFuzzer calls with every input: the first byte says what the rest is. Whatever servers and images say, each
/// call must end, and nobody takes for the truth what cannot be.
@_cdecl("LLVMFuzzerTestOneInput")
public func fuzzOneInput(_ data: UnsafePointer<UInt8>, _ count: Int) -> CInt {
    let input = [UInt8](UnsafeBufferPointer(start: data, count: count))
    guard let kind = input.first else { return 0 }
    let rest = Array(input.dropFirst())
    switch kind & 3 {
    case 0: takeHeader(rest)
    case 1: takeAddresses(rest)
    case 2: takeMessages(rest)
    default: askProcess(rest)
    }
    return 0
}

private func number(_ bytes: ArraySlice<UInt8>) -> UInt64 { bytes.reversed().reduce(0) { $0 << 8 | UInt64($1) } }

/// The header of a web server's answer: 16 bytes say what was asked for, and what else came.
private func takeHeader(_ input: [UInt8]) {
    guard input.count > 16 else { return }
    let first = number(input[0..<6])
    let wanted = first...first + number(input[6..<9])
    var response = HTTPResponse()
    for line in String(decoding: input[16...], as: UTF8.self).split(separator: "\n") {
        guard response.take(String(line) + "\n") else { break }
    }
    var state: HTTPVersion?
    if input[9] & 1 != 0 {
        state = HTTPVersion(length: first + 5, entityTag: response.entityTag, lastModified: response.lastModified)
    }
    let statuses = [200, 206, 206, 206, 301, 401, 404, 408, 412, 416, 429, 500, 503, 999]
    let outcome = HTTPTransfer.Outcome(
        code: input[10] & 1 != 0 ? 0 : UInt32(input[10]), status: statuses[Int(input[11]) % statuses.count],
        response: response, redirect: nil, received: Int(number(input[12..<15])), isHeaderTooLong: false, reason: "")
    let verdict = HTTPVerdict(outcome, wanted, state)
    if case .complete = verdict, outcome.status == 206 {
        guard let range = response.contentRange, let bytes = range.bytes, let total = range.total else {
            preconditionFailure("complete, and it is not known what")
        }
        precondition(bytes.lowerBound == wanted.lowerBound && bytes.upperBound < total && total <= UInt64(Int64.max))
    }
    if case .passing(_, let after) = verdict {
        precondition((0...10_000_000).contains(HTTPVerdict.delay(1, asked: after)))
    }
}

/// Addresses, as images name them, one after the other; the first says what is allowed.
private func takeAddresses(_ input: [UInt8]) {
    let words = input.split(separator: 0, maxSplits: 4).map { String(decoding: $0, as: UTF8.self) }
    let rules = words.first.flatMap { try? AddressRules([$0]) }
    for word in words.dropFirst() {
        _ = AddressRules.recognizes(word)
        _ = AddressRules.shownName(word)
        if let rules, rules.permits(word), let first = words.first {
            let meant = StorageAddress(word)
            precondition(meant?.path.contains("/../") == false && meant?.origin == StorageAddress(first)?.origin)
        }
        guard let meant = AddressRules.address(of: word, namedBy: words[0]) else { continue }
        _ = StorageAddress(meant)
    }
    _ = try? StorageSettings(words)
}

/// What the other end of a socket sends, which then closes it; answers this end.
private func socket(with input: [UInt8]) -> Int32? {
    var ends: [Int32] = [-1, -1]
    guard socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0, &ends) == 0 else { return nil }
    // (More than fits would wait for a reader.)
    _ = input.prefix(100_000).withUnsafeBytes { send(ends[1], $0.baseAddress, $0.count, Int32(MSG_DONTWAIT)) }
    shutdown(ends[1], Int32(SHUT_WR))
    // Questions go nowhere.
    var size: Int32 = 1 << 20
    setsockopt(ends[0], SOL_SOCKET, SO_SNDBUF, &size, 4)
    others.append(ends[1])
    return ends[0]
}

nonisolated(unsafe) private var others: [Int32] = []

private func closeOthers() {
    for end in others { close(end) }
    others = []
}

private func takeMessages(_ input: [UInt8]) {
    guard let socket = socket(with: input) else { return }
    while let message = StorageMessage(from: socket) {
        precondition(message.byteCount <= StorageMessage.limit)
        guard let bytes = message.bytes(from: socket) else { break }
        precondition(bytes.count == message.byteCount)
        _ = StorageMessage.Request(rawValue: message.code)
        _ = StorageMessage.words(bytes)
        _ = StorageMessage.error(bytes)
    }
    close(socket)
    closeOthers()
}

/// A process that answers whatever it likes to who opens and reads a storage.
private func askProcess(_ input: [UInt8]) {
    guard let socket = socket(with: input), let process = try? StorageProcess(answeringOn: [socket]) else { return }
    if let opened = try? process.open("http://h/x", isWritable: true) {
        let storage = opened.storage
        let length = (try? storage.length()) ?? 0
        precondition(length <= UInt64(Int64.max), "a file of \(length) bytes")
        var buffer = [UInt8](repeating: 0, count: 3000)
        for offset in [0, length / 2, length - min(length, 100)] {
            let done = try? buffer.withIOBuffer { (buffer) throws(DiskError) in
                try storage.read(into: buffer, at: offset, for: .guestData)
            }
            precondition((done ?? 0) <= 3000)
            if let data = try? storage.nextData(from: offset) {
                precondition(data.lowerBound >= offset && !data.isEmpty && data.upperBound <= length)
            }
        }
        try? storage.flush()
    }
    closeOthers()
    process.end()
}
