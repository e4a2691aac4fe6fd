import DiskStorage
import Testing

@testable import DiskPartitions

/// Superblocks and descriptors of ext2 that nobody would write.
struct HostileFreeSpaceTests {
    /// As many groups as there may be, each of eight blocks of 1 KiB; where their metadata lies is made up when it is
    /// asked for.
    private struct ManyGroups: SectorSource {
        static let groups: UInt64 = 1 << 20
        /// The block of a group in which its n-th piece of metadata lies.
        let place: @Sendable (_ group: UInt64, _ piece: UInt64) -> UInt64
        var size: UInt64 { (Self.groups * 8 + 1) << 10 }
        var sectorSize: UInt32? { nil }

        func read(into buffer: IOBuffer, at offset: UInt64) throws(DiskError) {
            var fields = FieldWriter(count: buffer.count)
            let first = offset < 2048 ? 0 : (offset - 2048) / 32
            if offset == 1024 {
                fields.littleEndian(UInt32(Self.groups * 8 + 1), at: 4)
                fields.littleEndian(UInt32(1), at: 20)
                for place in [32, 36, 40] { fields.littleEndian(UInt32(8), at: place) }
                fields.littleEndian(UInt16(0xef53), at: 56)
                fields.littleEndian(UInt16(1), at: 58)
                fields.littleEndian(UInt32(1), at: 76)
                fields.littleEndian(UInt16(128), at: 88)
            } else {
                for index in 0..<UInt64(buffer.count / 32) where first + index < Self.groups {
                    for piece in 0..<3 as Range<UInt64> {
                        let block = UInt32(truncatingIfNeeded: place(first + index, piece))
                        fields.littleEndian(block, at: Int(index * 32 + piece * 4))
                    }
                }
            }
            try fields.bytes.withIOBytes { buffer.copy(from: $0) }
        }
    }

    private func error(_ place: @escaping @Sendable (UInt64, UInt64) -> UInt64) throws -> DiskError? {
        let source = ManyGroups(place: place)
        let geometry = try ExtGeometry(source, offset: 0, length: source.size)
        #expect(geometry.groupCount == ManyGroups.groups)
        var reader = ExtFreeSpaceReader(source, geometry)
        do throws(DiskError) { try reader.run { _ in } } catch { return error }
        return nil
    }

    /// Metadata in three million places is not remembered.
    @Test func scatteredMetadata() throws {
        let error = try error { group, piece in group * 8 + 2 + piece * 2 }
        #expect(error?.kind == .invalidImage && error?.message.contains("too many places") == true)
    }

    /// In one place a group it is: then the bitmaps, which are of zeros here, contradict it.
    @Test func metadataSideBySide() throws {
        let error = try error { group, piece in group * 8 + 2 + piece }
        #expect(error?.kind == .invalidImage && error?.message.contains("group 0 ") == true)
    }
}
