import DiskImage
import DiskStorage
import FuzzSupport
import VirtualDisk

/// What libFuzzer calls with every input (`ImageInput`). Whatever the bytes are, the library must end each call with a
/// result or a `DiskError`.
@_cdecl("LLVMFuzzerTestOneInput")
public func fuzzOneInput(_ data: UnsafePointer<UInt8>, _ count: Int) -> CInt {
    guard let input = ImageInput(data, count) else { return 0 }
    Trial(input: input).run()
    return 0
}

/// One input.
struct Trial {
    let input: ImageInput

    func run() {
        let path = ImageInput.folder + "/a.vmdk"
        let (how, image, other) = (input.how, input.image, input.other)
        var options = DiskOptions(isWritable: how & 1 != 0)
        options.locksImages = false
        options.lazyFlushInterval = 0
        options.tableCacheSize = 128 << 10
        options.depthLimit = 4
        options.wrapStorage = { storage in
            BoundedStorage(storage.name.hasSuffix("a.vmdk") ? image : other, name: storage.name)
        }
        _ = try? ImageInformation.read(path, options: options, wholeChain: how & 2 != 0)
        if how & 4 != 0 { _ = try? ImageCheck.run(path, options: options, repair: how & 1 != 0) }
        guard let disk = try? Disk.open(path, options: options) else { return }
        use(disk)
        try? disk.close()
    }

    private func use(_ disk: Disk) {
        let places = [0, disk.size / 3, disk.size / 2, disk.size - min(disk.size, 70_001)]
        for place in places {
            _ = try? disk.read(at: place, count: Int(min(70_001, disk.size - place)))
        }
        var steps = 0
        try? disk.forEachExtent(offset: 0, length: min(disk.size, 1 << 30)) { _ in
            steps += 1
            return steps < 1000
        }
        guard disk.isWritable else { return }
        for place in places {
            let count = Int(min(5000, disk.size - place))
            _ = try? disk.write([UInt8](repeating: input.how, count: count), at: place)
            _ = try? disk.discard(offset: place, length: min(200_000, disk.size - place))
        }
        _ = try? disk.flush()
        _ = try? disk.read(at: 0, count: Int(min(70_001, disk.size)))
    }
}
