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
        guard format.lowercased() != "raw" else { return try writeRaw(control, to: sink) }
        guard let driver = try Formats.all.driver(named: format) as? any StreamingDriver else {
            throw DiskError(.unsupported, "the format \(format) cannot be written as a stream")
        }
        let stream = try driver.makeStream(CreateRequest(path: name, virtualSize: size), sink: sink)
        try StreamCopier(self, stream, control).run()
    }

    /// All bytes of the disk, one after the other.
    private func writeRaw(
        _ control: OperationControl, to sink: (IOBytes) throws(DiskError) -> Void
    ) throws(DiskError) {
        control.begin("copying", total: size)
        var bytes = [UInt8](repeating: 0, count: 1 << 20)
        try bytes.withIOBuffer { (buffer) throws(DiskError) in
            var offset: UInt64 = 0
            while offset < size {
                try control.checkCancelled()
                let piece = buffer.slice(0, Int(min(UInt64(buffer.count), size - offset)))
                try read(into: piece, at: offset)
                try sink(piece.readOnly)
                offset += UInt64(piece.count)
                control.advance(to: offset)
            }
        }
    }
}
