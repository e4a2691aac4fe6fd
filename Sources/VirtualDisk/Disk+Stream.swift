internal import DiskFormats
internal import DiskImage
public import DiskStorage

extension Disk {
    /// Writes the whole disk as a new image of a format that can be written front to back (raw, and VMDK:
    /// streamOptimized), with compressed blocks where the format has them and without blocks of zeros. `sink` gets the
    /// image's bytes in order, one call at a time but from any thread; `name` is recorded where the format records a
    /// file's name.
    public func writeStream(
        format: String, name: String, control: OperationControl = OperationControl(),
        to sink: @escaping (IOBytes) throws(DiskError) -> Void
    ) throws(DiskError) {
        var image = NewImage(path: name)
        image.format = format
        try writeStream(image, control: control, to: sink)
    }

    /// The same with all that can be said of a new image. Its path is the name that is recorded. What a stream of that
    /// format cannot have (a parent, another variant, a disk that is smaller than what is not zeros) is an error.
    public func writeStream(
        _ image: NewImage, control: OperationControl = OperationControl(),
        to sink: @escaping (IOBytes) throws(DiskError) -> Void
    ) throws(DiskError) {
        let driver = try image.driver(parentFormat: nil)
        guard image.parent == nil else {
            throw DiskError(.unsupported, "what is written as a stream has no parent")
        }
        let newSize = try image.checkedSize(for: self, named: current.chain.layers[0].path)
        if driver.name == "raw" {
            guard image.variant == nil, image.blockSize == nil, image.options.isEmpty else {
                throw DiskError(.invalidArgument, "a stream of raw bytes has no variants, block size or options")
            }
            return try writeRaw(newSize, control, to: sink)
        }
        guard let streaming = driver as? any StreamingDriver else {
            throw DiskError(.unsupported, "the format \(driver.name) cannot be written as a stream")
        }
        if let variant = image.variant, (driver as? any CompressingDriver)?.isCompressed(variant: variant) != true {
            throw DiskError(
                .unsupported, "the variant \(variant) of \(driver.name) cannot be written as a stream")
        }
        let request = CreateRequest(
            path: image.path, virtualSize: newSize, variant: image.variant, blockSize: image.blockSize,
            comment: image.comment, uuid: image.uuid, options: image.options)
        try StreamCopier(self, try streaming.makeStream(request, sink: sink), control).run()
    }

    /// All bytes of the disk, one after the other, and zeros behind its end.
    private func writeRaw(
        _ newSize: UInt64, _ control: OperationControl, to sink: (IOBytes) throws(DiskError) -> Void
    ) throws(DiskError) {
        control.begin("copying", total: newSize)
        var bytes = [UInt8](repeating: 0, count: 1 << 20)
        try bytes.withIOBuffer { (buffer) throws(DiskError) in
            var offset: UInt64 = 0
            while offset < newSize {
                try control.checkCancelled()
                let piece = buffer.slice(0, Int(min(UInt64(buffer.count), newSize - offset)))
                let count = Int(min(UInt64(piece.count), size - min(size, offset)))
                try read(into: piece.slice(0, count), at: min(size, offset))
                piece.slice(count, piece.count - count).zero()
                try sink(piece.readOnly)
                offset += UInt64(piece.count)
                control.advance(to: offset)
            }
        }
    }
}
