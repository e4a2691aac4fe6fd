import DiskStorage
import DiskTesting
import Testing

/// Fields of on-disk structures, and numbers from files.
struct FieldReaderTests {
    @Test func integersInBothByteOrders() throws {
        let reader = FieldReader([1, 2, 3, 4, 5, 6, 7, 8, 0xff])
        #expect(try reader.littleEndian(at: 0, as: UInt32.self) == 0x0403_0201)
        #expect(try reader.bigEndian(at: 0, as: UInt32.self) == 0x0102_0304)
        #expect(try reader.littleEndian(at: 0, as: UInt64.self) == 0x0807_0605_0403_0201)
        #expect(try reader.bigEndian(at: 1, as: UInt16.self) == 0x0203)
        #expect(try reader.byte(at: 8) == 0xff)
        #expect(reader.matches("\u{1}\u{2}", at: 0))
        #expect(!reader.matches("\u{1}\u{2}", at: 8))
        #expect(!reader.matches("x", at: -1))
    }

    @Test func fieldsOutsideAreErrors() {
        let reader = FieldReader([1, 2, 3])
        for offset in [-1, 0, 1, 3, Int.max, Int.min] {
            #expect(throws: DiskError.self) { try reader.littleEndian(at: offset, as: UInt32.self) }
        }
        #expect(throws: DiskError.self) { try reader.bytes(at: 1, count: 3) }
        #expect(throws: DiskError.self) { try reader.bytes(at: 1, count: -1) }
        #expect(throws: DiskError.self) { try reader.byte(at: 3) }
    }

    @Test func whatIsWrittenIsReadBack() throws {
        var generator = SeededGenerator(seed: 1)
        for _ in 0..<200 {
            var writer = FieldWriter(count: 40)
            let (a, b, c) = (
                generator.next(), UInt32(truncatingIfNeeded: generator.next()), UInt16.random(in: 0...(.max))
            )
            writer.littleEndian(a, at: 3)
            writer.bigEndian(b, at: 17)
            writer.littleEndian(c, at: 38)
            let reader = FieldReader(writer.bytes)
            #expect(try reader.littleEndian(at: 3) == a)
            #expect(try reader.bigEndian(at: 17) == b)
            #expect(try reader.littleEndian(at: 38) == c)
        }
    }

    @Test func arithmeticOnNumbersFromFiles() throws {
        #expect(try UInt64(3).adding(4) == 7)
        #expect(throws: DiskError.self) { try UInt64.max.adding(1) }
        #expect(throws: DiskError.self) { try UInt64(1).subtracting(2) }
        #expect(throws: DiskError.self) { try (UInt64.max / 2).multiplied(by: 3) }
        #expect(throws: DiskError.self) { try UInt64.max.converted(to: Int.self) }
        #expect(try UInt64(7).converted(to: Int8.self) == 7)
        #expect(UInt64(0).dividedRoundingUp(by: 8) == 0)
        #expect(UInt64(9).dividedRoundingUp(by: 8) == 2)
        #expect(UInt64.max.dividedRoundingUp(by: 2) == 1 << 63)
        #expect(UInt64(513).alignedUp(to: 512) == 1024)
        #expect(UInt64.max.alignedUp(to: 512) == nil)
        #expect(UInt64(4096).isPowerOfTwo && !UInt64(0).isPowerOfTwo && !UInt64(12).isPowerOfTwo)
    }

    @Test func uuidsInAllTheirForms() throws {
        let text = "00112233-4455-6677-8899-aabbccddeeff"
        let uuid = try #require(DiskUUID(text))
        #expect(uuid.description == text)
        #expect(DiskUUID("{00112233-4455-6677-8899-AABBCCDDEEFF}") == uuid)
        #expect(uuid.mixedEndian.prefix(8).elementsEqual([0x33, 0x22, 0x11, 0x00, 0x55, 0x44, 0x77, 0x66]))
        #expect(try DiskUUID(mixedEndian: uuid.mixedEndian) == uuid)
        #expect(DiskUUID("0011") == nil && DiskUUID("g0112233-4455-6677-8899-aabbccddeeff") == nil)
        #expect(throws: DiskError.self) { try DiskUUID(bigEndian: [1, 2]) }
        #expect(DiskUUID.null.isNull && !DiskUUID.random().isNull && DiskUUID.random() != DiskUUID.random())
        #expect(DiskUUID.random().bytes[6] >> 4 == 4)
    }
}
