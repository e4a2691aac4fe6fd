internal import DiskFormats
internal import DiskImage
public import DiskStorage

extension Disk {
    /// Writes the whole disk as a new image of a format that can be written front to back (VMDK: streamOptimized), with
    /// compressed blocks where the format has them and without blocks of zeros. `sink` gets the image's bytes in
    /// order; `name` is recorded where the format records a file's name.
    public func writeStream(
        format: String, name: String, to sink: @escaping (IOBytes) throws(DiskError) -> Void
    ) throws(DiskError) {
        guard let driver = try Formats.all.driver(named: format) as? any StreamingDriver else {
            throw DiskError(.unsupported, "the format \(format) cannot be written as a stream")
        }
        let stream = try driver.makeStream(CreateRequest(path: name, virtualSize: size), sink: sink)
        var bytes = [UInt8](repeating: 0, count: Int(stream.blockSize))
        try bytes.withIOBuffer { (buffer) throws(DiskError) in
            var offset: UInt64 = 0
            while offset < size {
                // Long runs without data are passed over by their tables alone.
                guard let data = try nextData(from: offset) else { break }
                offset = max(offset, data / stream.blockSize * stream.blockSize)
                let block = buffer.slice(0, Int(min(stream.blockSize, size - offset)))
                try read(into: block, at: offset)
                if !block.readOnly.isZero { try stream.write(block: offset / stream.blockSize, block.readOnly) }
                offset += UInt64(block.count)
            }
        }
        try stream.finish()
    }
}
