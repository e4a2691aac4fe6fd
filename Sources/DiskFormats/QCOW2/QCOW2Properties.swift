internal import DiskImage
internal import DiskStorage

extension QCOW2Image {
    var snapshots: [InternalSnapshot] {
        var list: [InternalSnapshot] = []
        // Those that can be read; a check tells of the others.
        _ = try? QCOW2SnapshotTable(header, storages[0].storage).visit { (snapshot) throws(DiskError) in
            list.append(snapshot.description(currentSize: header.size))
            return true
        }
        return list
    }

    var properties: [ImageProperty] {
        var list = [
            ImageProperty("compat", "version", header.version == 2 ? "2 (compat 0.10)" : "3 (compat 1.1)"),
            ImageProperty("refcount-bits", "refcount bits", String(header.refcountBits)),
        ]
        func add(_ key: String, _ title: String, _ value: String) { list.append(ImageProperty(key, title, value)) }
        if header.version >= 3 {
            add("compression-type", "compression type", header.compressionType.name)
            add("lazy-refcounts", "lazy refcounts", header.compatible.contains(.lazyRefcounts) ? "on" : "off")
            add("extended-l2", "extended L2 entries", header.hasExtendedL2 ? "on" : "off")
        }
        if let name = extensions.dataFileName, header.hasDataFile {
            add("data-file", "data file", name)
            add("data-file-raw", "raw data file", keepsRawData ? "on" : "off")
        }
        if let backingName { add("backing-file", "backing file", backingName) }
        if let format = extensions.backingFormatName { add("backing-format", "backing format", format) }
        if let directory = extensions.bitmapDirectory {
            let isValid = header.autoclear.contains(.bitmaps)
            add("bitmaps", "bitmaps", "\(directory.count)" + (isValid ? "" : ", inconsistent"))
        }
        if header.incompatible.contains(.dirty) {
            add("dirty", "dirty", "yes: refcounts are made anew when it is written")
        }
        if header.incompatible.contains(.corrupt) {
            add("corrupt", "corrupt", "yes: may not be written before a repair")
        }
        if let snapshot { add("snapshot", "shown snapshot", snapshot.name) }
        return list
    }
}
