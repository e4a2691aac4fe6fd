import DiskStorage
import Testing

@testable import DiskFormats

@Suite struct DeflateTests {
    private func compress(_ bytes: [UInt8]) throws -> [UInt8] {
        let compressor = try Deflate.Compressor()
        var output = [UInt8](repeating: 0, count: compressor.zlibBound(bytes.count))
        let count = try bytes.withIOBytes { (input) throws(DiskError) in
            try output.withIOBuffer { (memory) throws(DiskError) in compressor.deflateZlib(input, into: memory) }
        }
        return Array(output[..<(try #require(count))])
    }

    private func inflate(_ bytes: [UInt8], room: Int) throws(DiskError) -> [UInt8] {
        var output = [UInt8](repeating: 0xee, count: room)
        let count = try bytes.withIOBytes { (input) throws(DiskError) in
            try output.withIOBuffer { (memory) throws(DiskError) in try Deflate.inflateZlib(input, into: memory) }
        }
        return Array(output[..<count])
    }

    @Test func roundTrip() throws {
        for size in [0, 1, 511, 65_536, 100_001] {
            let bytes = (0..<size).map { UInt8(truncatingIfNeeded: $0 &* $0 >> 7) }
            let stream = try compress(bytes)
            #expect(try inflate(stream, room: size) == bytes)
            #expect(try inflate(stream + [1, 2, 3], room: size + 10) == bytes, "what follows a stream is ignored")
        }
    }

    @Test func tooMuchAndDamaged() throws {
        let stream = try compress((0..<5000).map { UInt8(truncatingIfNeeded: $0) })
        #expect(throws: DiskError.self) { try inflate(stream, room: 4999) }
        for cut in 0..<stream.count {
            #expect(throws: DiskError.self) { try inflate(Array(stream[..<cut]), room: 5000) }
        }
        var damaged = stream
        damaged[stream.count - 1] ^= 1
        #expect(throws: DiskError.self, "the checksum") { try inflate(damaged, room: 5000) }
    }

    @Test func manyThreadsShareTheIdleOnes() async throws {
        let bytes = [UInt8](repeating: 7, count: 9000)
        let stream = try compress(bytes)
        try await withThrowingTaskGroup(of: Bool.self) { group in
            for _ in 0..<100 { group.addTask { try inflate(stream, room: 9000) == bytes } }
            for try await same in group { #expect(same) }
        }
    }
}
