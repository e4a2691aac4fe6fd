import DiskImage
import DiskStorage
import DiskTesting
import Glibc
import Testing
import VirtualDisk

/// What the tests of VHDX have in common: the format's fields, by the specification.
enum VHDX {
    static let headers = [64 << 10, 128 << 10]
    static let regionTables = [192 << 10, 256 << 10]
    /// Where the log, the metadata and the table of an image lie that was made here, without a parent.
    static let log = 1 << 20
    static let metadata = 2 << 20
    static let table = 3 << 20

    // MARK: - Checksums

    private static let remainders: [UInt32] = (0..<256).map { byte in
        (0..<8).reduce(UInt32(byte)) { value, _ in value & 1 != 0 ? value >> 1 ^ 0x82f6_3b78 : value >> 1 }
    }

    /// CRC-32C.
    static func checksum(_ bytes: some Sequence<UInt8>) -> UInt32 {
        ~bytes.reduce(UInt32.max) { $0 >> 8 ^ remainders[Int(UInt8(truncatingIfNeeded: $0) ^ $1)] }
    }

    /// Puts the checksum of a structure at `range`, which is at its byte 4, right.
    static func putChecksum(_ bytes: inout [UInt8], _ range: Range<Int>) {
        guard range.upperBound <= bytes.count else { return }
        bytes = bytes.setting(0, at: range.lowerBound + 4, width: 4)
        bytes = bytes.setting(UInt64(checksum(bytes[range])), at: range.lowerBound + 4, width: 4)
    }

    /// Puts those of headers and region tables right, and those of whatever looks like a log entry.
    static func withChecksums(_ bytes: [UInt8]) -> [UInt8] {
        var result = bytes
        for start in headers { putChecksum(&result, start..<start + 4096) }
        for start in regionTables { putChecksum(&result, start..<start + (64 << 10)) }
        for start in stride(from: log, to: min(metadata, result.count - 4096), by: 4096)
        where result[start..<start + 4].elementsEqual("loge".utf8) {
            let length = Int(result.number(at: start + 8, width: 4))
            if (4096...1 << 20).contains(length) { putChecksum(&result, start..<start + length) }
        }
        return result
    }

    // MARK: - Headers

    /// What the current header says.
    struct Header: Equatable {
        let sequenceNumber: UInt64
        let fileWriteGUID: [UInt8]
        let dataWriteGUID: [UInt8]
        let logGUID: [UInt8]
        let logOffset: Int
        let logLength: Int

        var hasLog: Bool { logGUID.contains { $0 != 0 } }
    }

    static func header(in bytes: [UInt8]) throws -> Header {
        let valid = headers.filter { start in
            var copy = bytes
            putChecksum(&copy, start..<start + 4096)
            return bytes.slice(start, 4).elementsEqual("head".utf8) && copy == bytes
        }
        let start = try #require(
            valid.max { bytes.number(at: $0 + 8, width: 8) < bytes.number(at: $1 + 8, width: 8) })
        return Header(
            sequenceNumber: bytes.number(at: start + 8, width: 8), fileWriteGUID: bytes.slice(start + 16, 16),
            dataWriteGUID: bytes.slice(start + 32, 16), logGUID: bytes.slice(start + 48, 16),
            logOffset: Int(bytes.number(at: start + 72, width: 8)),
            logLength: Int(bytes.number(at: start + 68, width: 4)))
    }

    static func header(of path: String) throws -> Header {
        let file = try FileStorage(path: path, isWritable: false)
        return try header(in: file.bytes(at: 0, count: 192 << 10, for: .header, "the headers"))
    }

    /// Whether there is something in the log that begins like an entry of this session and is none: QEMU takes that for
    /// an error, where the specification has it end the sequence.
    static func hasTornLogEntry(_ path: String) throws -> Bool {
        let header = try header(of: path)
        let file = try FileStorage(path: path, isWritable: false)
        let log = try file.bytes(at: UInt64(header.logOffset), count: header.logLength, for: .log, "the log")
        for start in stride(from: 0, to: log.count, by: 4096)
        where log.slice(start, 4).elementsEqual("loge".utf8) && log.slice(start + 32, 16) == header.logGUID {
            let length = Int(log.number(at: start + 8, width: 4))
            guard (4096...log.count - start).contains(length) else { return true }
            var copy = log.slice(start, length)
            putChecksum(&copy, 0..<length)
            if copy != log.slice(start, length) { return true }
        }
        return false
    }

    // MARK: - The table

    /// An entry of the table of an image that was made here.
    static func entry(_ index: Int, of path: String, table: Int = table) throws -> (state: UInt64, offset: UInt64) {
        let file = try FileStorage(path: path, isWritable: false)
        let bytes = try file.bytes(at: UInt64(table + index * 8), count: 8, for: .table, "the table")
        let value = bytes.number(at: 0, width: 8)
        return (value & 7, value & ~0xf_ffff)
    }

    static func setEntry(
        _ index: Int, of path: String, table: Int = table, _ state: UInt64, at offset: UInt64 = 0
    ) throws {
        let bytes = [UInt8](repeating: 0, count: 8).setting(offset | state, at: 0, width: 8)
        try VHD.poke(path, bytes, at: UInt64(table + index * 8))
    }

    /// Gives a file another content.
    static func replace(_ path: String, by bytes: [UInt8]) throws {
        let file = try FileStorage(path: path, isWritable: true)
        try file.setLength(UInt64(bytes.count))
        try file.write(bytes, at: 0, for: .header)
    }

    /// Writes in another process that is killed after it has flushed; so the log is left as it is.
    static func leaveUnclean(_ path: String) async throws {
        let result = await #expect(processExitsWith: .signal(SIGKILL)) { [path = path as String] in
            let disk = try Disk.open(path, options: DiskOptions(isWritable: true))
            for number in 0..<8 as Range<UInt64> {
                try disk.write([UInt8](repeating: UInt8(0xa0 + number), count: 5000), at: number << 20 + 1000)
                try disk.flush()
            }
            kill(getpid(), SIGKILL)
        }
        try #require(result != nil)
    }
}
