import DiskImage
import DiskStorage
import DiskTesting
import Testing

@testable import DiskFormats

/// When a place of the file may be used again: what an entry on the disk leads to is never written over. (The disk
/// moves the data; here is what the image says when.)
struct VDIRelocationTests {
    private static let block: UInt64 = 4096

    /// An image with blocks 0 to 4 in places 0 to 4, all durable.
    private func makeImage(_ folder: TemporaryFolder, blocks: UInt64 = 16) throws -> VDIImage {
        let request = CreateRequest(
            path: folder.file("disk.vdi"), virtualSize: blocks * Self.block, blockSize: Self.block)
        try VDIDriver().create(request, companions: FolderCompanions())
        let image = try VDIImage(
            OpenRequest(
                storage: FileStorage(path: request.path, isWritable: true), path: request.path, mode: .readWrite,
                cache: TableCache(capacity: 64 << 10), companions: FolderCompanions()))
        try image.beginWriting()
        for number in 0..<5 as Range<UInt64> { #expect(try allocate(number, in: image) == number) }
        try image.flush()
        return image
    }

    /// Allocates a block and answers its place.
    private func allocate(_ number: UInt64, in image: VDIImage) throws -> UInt64 {
        let reservation = try image.reserve(offset: number * Self.block, length: 1)
        let place = image.space.place(at: reservation.fileOffset)
        try image.commit(reservation)
        return place
    }

    private func places(_ image: VDIImage) throws -> UInt64 {
        try (image.storages[0].storage.length() - image.header.blocksOffset) / Self.block
    }

    @Test func droppedPlaceIsUsedAfterAFlush() throws {
        let folder = try TemporaryFolder()
        let image = try makeImage(folder)
        #expect(try image.drop(offset: Self.block, length: Self.block, leaving: .absent))
        #expect(try image.nextRelocation() == nil)
        #expect(!image.needsRelocation)
        #expect(try allocate(5, in: image) == 5)
        try image.flush()
        #expect(image.needsRelocation)
        #expect(try allocate(6, in: image) == 1)
        try image.close()
    }

    @Test func oldPlaceOfAMovedBlockIsUsedAfterAFlush() throws {
        let folder = try TemporaryFolder()
        let image = try makeImage(folder)
        #expect(try image.drop(offset: 0, length: Self.block, leaving: .absent))
        try image.flush()
        let move = try #require(try image.nextRelocation())
        #expect(move.offset == 4 * Self.block && move.length == Self.block)
        #expect(image.space.place(at: move.source) == 4 && image.space.place(at: move.target) == 0)
        // Nobody else gets the place that is moved to, nor another move.
        #expect(try image.nextRelocation() == nil)
        #expect(try allocate(6, in: image) == 5)
        try image.commit(move)
        #expect(try allocate(7, in: image) == 6)
        #expect(try places(image) == 5)
        try image.flush()
        #expect(try places(image) == 7)
        #expect(try allocate(8, in: image) == 4)
        try image.close()
    }

    @Test func abandonedMoveLeavesAllAsItWas() throws {
        let folder = try TemporaryFolder()
        let image = try makeImage(folder)
        #expect(try image.drop(offset: 2 * Self.block, length: Self.block, leaving: .zero))
        try image.flush()
        let move = try #require(try image.nextRelocation())
        image.abandon(move)
        try image.flush()
        #expect(try places(image) == 5 && image.needsRelocation)
        #expect(try image.nextRelocation()?.target == move.target)
        try image.close()
    }

    /// The last blocks of the file need no move.
    @Test func freeEndIsCutOff() throws {
        let folder = try TemporaryFolder()
        let image = try makeImage(folder)
        #expect(try image.drop(offset: 3 * Self.block, length: 2 * Self.block, leaving: .absent))
        #expect(try places(image) == 5)
        try image.flush()
        #expect(try places(image) == 3 && !image.needsRelocation)
        try image.close()
        let header = try VDIHeader(parsing: image.storages[0].storage.availableBytes(at: 0, count: 512, for: .header))
        #expect(header.allocatedBlocks == 3)
    }

    /// A disk all of whose blocks have places: a freed one is found by a flush.
    @Test func fullDiskUsesWhatIsGivenUp() throws {
        let folder = try TemporaryFolder()
        let image = try makeImage(folder, blocks: 5)
        for number in [2, 4, 2, 0, 3] as [UInt64] {
            #expect(try image.drop(offset: number * Self.block, length: Self.block, leaving: .absent))
            #expect(try allocate(number, in: image) < 5)
        }
        try image.close()
    }
}
