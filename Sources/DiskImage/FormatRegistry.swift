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
    public func probe(_ storage: any Storage) throws(DiskError) -> (any ImageDriver)? {
        let file = try ProbedFile(storage)
        for driver in drivers {
            if try driver.probe(file) == .certain { return driver }
        }
        return nil
    }
}
