import DiskStorage
import Glibc
import Testing

@testable import DiskNetwork

/// What the process that reaches servers may answer, whoever has taken it over: an error, at worst.
struct StorageProcessTests {
    /// A process that answers these bytes, whatever it is asked, and is gone then.
    private func process(answering bytes: [UInt8]) throws -> StorageProcess {
        var ends: [Int32] = [-1, -1]
        let result = unsafe socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0, &ends)
        try #require(result == 0)
        let sent = unsafe send(ends[1], bytes, bytes.count, Int32(MSG_DONTWAIT))
        try #require(sent == bytes.count)
        shutdown(ends[1], Int32(SHUT_WR))
        ended.withLock { $0.append(ends[1]) }
        return try StorageProcess(answeringOn: [ends[0]])
    }

    private let ended = Locked<[Int32]>([])

    private func end(_ process: StorageProcess) {
        for end in ended.withLock({ $0 }) { close(end) }
        process.end()
    }

    private func message(
        code: UInt8 = 0, flag: Bool = false, offset: UInt64 = 0, length: UInt64 = 0, count: UInt64? = nil,
        _ bytes: [UInt8] = []
    ) -> [UInt8] {
        var fields = FieldWriter(count: StorageMessage.headerSize)
        fields.byte(code, at: 0)
        fields.byte(flag ? 1 : 0, at: 1)
        fields.littleEndian(offset, at: 8)
        fields.littleEndian(length, at: 16)
        fields.littleEndian(count ?? UInt64(bytes.count), at: 24)
        return fields.bytes + bytes
    }

    private func opened(length: String) -> [UInt8] {
        message(StorageMessage.bytes(["0", length, "w", "d", "-", "http://h/x", "1"]))
    }

    @Test(arguments: ["9223372036854775808", "18446744073709551615", "-1", "x", ""])
    func lengthsThatCannotBe(_ length: String) throws {
        let process = try process(answering: opened(length: length))
        #expect(throws: DiskError.self) { try process.open("http://h/x", isWritable: true) }
        end(process)
    }

    @Test func lengthsThatCanBe() throws {
        let process = try process(answering: opened(length: "9223372036854775807"))
        let storage = try process.open("http://h/x", isWritable: true).storage
        #expect(try storage.length() == UInt64(Int64.max))
        #expect(throws: DiskError.self) { try storage.flush() }
        end(process)
    }

    /// Neither more bytes than were asked for, nor more than a message can have, nor fewer.
    @Test(arguments: [5001, 1 << 20, (1 << 20) + 1, UInt64.max, 4999] as [UInt64]) func readsOfOtherLengths(
        _ count: UInt64
    ) throws {
        let answer = message(count: count, [UInt8](repeating: 1, count: min(Int(clamping: count), 5000)))
        let process = try process(answering: opened(length: "5000") + answer)
        let storage = try process.open("http://h/x", isWritable: true).storage
        var bytes = [UInt8](repeating: 0, count: 5000)
        #expect(throws: DiskError.self) {
            try bytes.withIOBuffer { (buffer) throws(DiskError) in
                _ = try storage.read(into: buffer, at: 0, for: .guestData)
            }
        }
        end(process)
    }

    /// A range of data that cannot be is none to be left out.
    @Test(arguments: [(.max, 2), (0, .max), (0, 0), (5000, 1), (9, 4992)] as [(UInt64, UInt64)])
    func dataThatCannotBe(_ offset: UInt64, _ length: UInt64) throws {
        let process = try process(
            answering: opened(length: "5000") + message(flag: true, offset: offset, length: length))
        let storage = try process.open("http://h/x", isWritable: true).storage
        #expect(try storage.nextData(from: 7) == 7..<5000)
        end(process)
    }

    /// A mebibyte of empty words is not a million of them.
    @Test func words() {
        #expect(StorageMessage.words([UInt8](repeating: 0, count: StorageMessage.limit)).count <= 16)
        #expect(StorageMessage.error([UInt8](repeating: 0, count: 100)).errno == EIO)
        #expect(StorageMessage.words(Array("a\0\0b".utf8)) == ["a", "", "b"])
    }
}
