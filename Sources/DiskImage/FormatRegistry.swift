public import DiskStorage

/// The formats that are known, in the order in which they are asked.
public struct FormatRegistry: Sendable {
    public let drivers: [any ImageDriver]

    public init(_ drivers: [any ImageDriver]) { self.drivers = drivers }

    /// The driver of that name; ``DiskError/Kind/unknownFormat`` if there is none.
    public func driver(named name: String) throws(DiskError) -> any ImageDriver {
        if let driver = drivers.first(where: { $0.name == name.lowercased() }) { return driver }
        let known = drivers.map(\.name).joined(separator: ", ")
        throw DiskError(.unknownFormat, "there is no format '\(name)'; known are \(known)")
    }

    /// The driver whose magic numbers the file has, or nil: then it is raw, if anything.
    ///
    /// Some formats are known by the file's end, and have the guest's own bytes at its beginning (a fixed VHD); of the
    /// others a guest may have got hold of the end. A file with the marks of two formats could therefore be one of them
    /// that its guest made look like the other: ``DiskError/Kind/unknownFormat``, and the user says which it is.
    public func probe(_ storage: any Storage) throws(DiskError) -> (any ImageDriver)? {
        let file = try ProbedFile(storage)
        var found: (any ImageDriver)?
        for driver in drivers {
            guard try driver.probe(file) == .certain else { continue }
            guard let first = found else {
                found = driver
                continue
            }
            throw DiskError(
                .unknownFormat,
                "it has the marks of two formats, \(first.name) and \(driver.name), and a guest may have made it look "
                    + "so: say with --format which it is", image: storage.name)
        }
        return found
    }
}
