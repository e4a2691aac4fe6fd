internal import DiskStorage

/// The two headers of a file, of which one is current. [MS-VHDX] 2.2.2.
struct VHDXHeaders: Sendable {
    private(set) var current: VHDXHeader
    /// Which of the two places holds it.
    private(set) var currentIndex: Int
    /// What is wrong with the other one.
    private(set) var damage: String?

    /// Reads both. Throws if none is valid, or if the current one asks for what nobody knows.
    init(_ storage: any Storage) throws(DiskError) {
        var valid: [(index: Int, header: VHDXHeader, bytes: [UInt8])] = []
        var newer: UInt16?
        for (index, offset) in VHDXHeader.offsets.enumerated() {
            let bytes = try storage.availableBytes(at: offset, count: VHDXHeader.byteCount, for: .header)
            guard let header = try VHDXHeader(parsing: bytes) else { continue }
            if header.version == VHDXHeader.version {
                valid.append((index, header, bytes))
            } else {
                newer = header.version
            }
        }
        guard let best = valid.max(by: { $0.header.sequenceNumber < $1.header.sequenceNumber }) else {
            if let newer {
                throw DiskError(.unsupported, "it is of version \(newer) of the format; version 1 is known")
            }
            throw DiskError(
                .invalidImage, "both headers are damaged (their signatures or checksums are wrong)",
                offset: VHDXHeader.offsets[0])
        }
        // Disk2vhd writes the same header twice; nothing tells which of two that differ is current.
        if valid.count == 2, valid[0].header.sequenceNumber == valid[1].header.sequenceNumber,
            valid[0].bytes != valid[1].bytes
        {
            throw DiskError(
                .invalidImage,
                "both headers have the sequence number \(best.header.sequenceNumber), and they differ",
                offset: VHDXHeader.offsets[0])
        }
        current = best.header
        currentIndex = best.index
        if valid.count < 2 {
            damage = "the header at byte \(VHDXHeader.offsets[1 - best.index]) is damaged; the other one is whole"
        }
        try Self.check(current)
    }

    private static func check(_ header: VHDXHeader) throws(DiskError) {
        guard header.logVersion == VHDXHeader.logVersion else {
            throw DiskError(.unsupported, "its log is of version \(header.logVersion); version 0 is known")
        }
        guard header.logLength > 0, header.logLength % VHDXRegion.alignment == 0,
            header.logOffset >= UInt64(VHDXRegion.alignment), header.logOffset % UInt64(VHDXRegion.alignment) == 0,
            !header.logOffset.addingReportingOverflow(UInt64(header.logLength)).overflow
        else {
            throw DiskError(
                .invalidImage,
                "the log is said to have \(header.logLength) bytes from byte \(header.logOffset) on; both must be "
                    + "multiples of 1 MiB, and not 0")
        }
    }

    /// Writes a changed header to both places, the one that is not current first, each made durable before the next is
    /// begun, so that one of the two is valid at every instant. [MS-VHDX] 2.2.2.1.
    mutating func update(
        in storage: any Storage, _ change: (inout VHDXHeader) -> Void
    ) throws(DiskError) {
        var header = current
        change(&header)
        for _ in VHDXHeader.offsets {
            header.sequenceNumber = try header.sequenceNumber.adding(1, "the header's sequence number")
            let index = 1 - currentIndex
            try storage.write(header.encode(), at: VHDXHeader.offsets[index], for: .header)
            try storage.flush()
            current = header
            currentIndex = index
        }
        damage = nil
    }
}
