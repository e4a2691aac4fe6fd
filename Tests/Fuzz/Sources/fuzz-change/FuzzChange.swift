import DiskImage
import DiskStorage
import FuzzSupport
import Glibc
import VirtualDisk

/// What libFuzzer calls with every input (`ImageInput`); the low three bits of its first byte say what is changed in
/// the image, the others how.
///
/// Whatever the bytes are, the library must end each call with a result or a `DiskError`; and an image with which
/// nothing is wrong shows the same bytes afterwards, and nothing is wrong with it then either.
@_cdecl("LLVMFuzzerTestOneInput")
public func fuzzOneInput(_ data: UnsafePointer<UInt8>, _ count: Int) -> CInt {
    guard let input = ImageInput(data, count) else { return 0 }
    Trial(input).run()
    return 0
}

/// One input.
final class Trial: Sendable {
    private let how: UInt8
    /// What the image was, and what has become of it.
    private let image: BoundedStorage
    private let other: BoundedStorage

    private static let path = ImageInput.folder + "/a.vmdk"
    private static let sizeLimit: UInt64 = 4 << 20

    init(_ input: ImageInput) {
        how = input.how
        image = BoundedStorage(input.image, name: Self.path)
        other = BoundedStorage(input.other, name: ImageInput.folder + "/b.vmdk")
    }

    private func options(isWritable: Bool = false) -> DiskOptions {
        var options = DiskOptions(isWritable: isWritable)
        options.locksImages = false
        options.lazyFlushInterval = 0
        options.tableCacheSize = 128 << 10
        options.depthLimit = 4
        options.wrapStorage = { [image, other] storage in
            storage.name == image.name ? image : storage.name == other.name ? other : storage
        }
        return options
    }

    func run() {
        defer { removeFiles() }
        let before = soundContent()
        let options = options(isWritable: true)
        let detail = how >> 3
        switch how & 7 {
        case 0: resize(.larger(by: [512, 4096, 100_000, 3 << 20][Int(detail & 3)] << UInt64(detail & 4)))
        case 1: resize(.smaller(by: [512, 4096, 70_000 & ~511, 1 << 20][Int(detail & 3)]), cuts: true)
        case 2: try? ImageEditor.apply(changes(detail), to: Self.path, options: options)
        case 3:
            var compaction = ImageCompaction.Options()
            compaction.dropsFreeSpace = detail & 1 != 0
            _ = try? ImageCompaction.run(Self.path, options: options, compaction: compaction)
        case 4: _ = try? ImageCheck.run(Self.path, options: options, repair: true)
        case 5: convert(detail)
        case 6: _ = try? ImageCheck.dryRun(Self.path, options: options, folder: ImageInput.folder)
        default:
            resize(.larger(by: 1 << 20))
            resize(.smaller(by: 1 << 19))
            _ = try? ImageCompaction.run(Self.path, options: options)
        }
        guard let before else { return }
        let changesContent =
            switch how & 7 {
            case 1: true
            case 2: detail & 12 != 0
            case 3: detail & 1 != 0
            default: false
            }
        verify(before, isKept: !changesContent)
    }

    // MARK: - What is changed

    private func resize(_ size: ImageResize.Size, cuts: Bool = false) {
        var resize = ImageResize(path: Self.path, size: size, options: options())
        resize.allowsShrinking = true
        resize.discardsData = cuts
        _ = try? resize.run()
    }

    private func changes(_ detail: UInt8) -> ImageChanges {
        var changes = ImageChanges()
        if detail & 1 != 0 { changes.metadata.comment = String(repeating: "what it is ", count: Int(detail) * 9) }
        if detail & 2 != 0 {
            changes.metadata.uuid = .random()
            changes.metadata.modificationUUID = .random()
        }
        if detail & 4 != 0 { changes.parent = ImageChanges.ParentChange.none }
        if detail & 8 != 0 {
            changes.parent = .image(
                .init(
                    path: String(repeating: "b", count: 1 << Int(detail & 3) * 4) + ".vmdk", format: "raw",
                    identity: ImageIdentity(uuid: .random(), modificationUUID: .random())))
        }
        if detail & 16 != 0 {
            changes.metadata.logicalGeometry = DiskGeometry(cylinders: 5, heads: 255, sectors: 63)
            changes.metadata.physicalGeometry = DiskGeometry(cylinders: 5, heads: 16, sectors: 63)
        }
        return changes
    }

    private func convert(_ detail: UInt8) {
        guard let disk = try? Disk.open(Self.path, options: options()), disk.size <= Self.sizeLimit else { return }
        try? disk.close()
        let formats = ["vmdk", "vdi", "vhd", "vhdx", "qed", "qcow2", "raw", "vmdk"]
        var new = NewImage(path: ImageInput.folder + "/c." + formats[Int(detail & 7)])
        new.format = formats[Int(detail & 7)]
        var conversion = ImageConversion(from: Self.path, options: options(), to: new)
        conversion.compresses = detail & 8 != 0
        conversion.verifies = true
        do throws(DiskError) {
            try conversion.run()
        } catch {
            precondition(!error.message.contains("reads differently"), "\(error)")
        }
    }

    private func removeFiles() {
        guard let stream = opendir(ImageInput.folder) else { return }
        defer { closedir(stream) }
        while let entry = readdir(stream) {
            let name = withUnsafeBytes(of: &entry.pointee.d_name) {
                String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self)
            }
            if name.hasPrefix(".") || ["a.vmdk", "b.vmdk"].contains(name) { continue }
            unlink(ImageInput.folder + "/" + name)
        }
    }

    // MARK: - What must stay

    /// What the disk shows at some places.
    private struct Content {
        let size: UInt64
        let places: [(offset: UInt64, bytes: [UInt8])]
    }

    /// Of an image with which nothing is wrong; nil of any other.
    private func soundContent() -> Content? {
        guard let report = try? ImageCheck.run(Self.path, options: options()), isSound(report),
            let disk = try? Disk.open(Self.path, options: options())
        else { return nil }
        defer { try? disk.close() }
        var places: [(offset: UInt64, bytes: [UInt8])] = []
        for start in [0, disk.size / 2, disk.size - min(disk.size, 100_000)] {
            let count = Int(min(disk.size - start, 100_000))
            guard let bytes = try? disk.read(at: start, count: count) else { return nil }
            places.append((start, bytes))
        }
        return Content(size: disk.size, places: places)
    }

    private func isSound(_ report: CheckReport) -> Bool {
        report.remaining(.loss) == 0 && report.remaining(.repairable) == 0
    }

    private func verify(_ before: Content, isKept: Bool) {
        let report: CheckReport
        do throws(DiskError) {
            report = try ImageCheck.run(Self.path, options: options())
        } catch {
            preconditionFailure("\(how): after a change a sound image is none: \(error)")
        }
        precondition(isSound(report), "\(how): after a change a sound image is damaged: \(report.findings.prefix(3))")
        guard isKept, let disk = try? Disk.open(Self.path, options: options()) else { return }
        defer { try? disk.close() }
        for place in before.places {
            let found = try? disk.read(at: place.offset, count: place.bytes.count)
            precondition(found == place.bytes, "\(how): after a change other bytes are shown at \(place.offset)")
        }
    }
}
