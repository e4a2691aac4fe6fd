internal import DiskImage
internal import DiskStorage

/// Which of a footer's two sizes is the disk's: the geometry's (Virtual PC) or the current size (everybody else).
enum VHDSizeRule: String, Sendable {
    case chs
    case current

    /// The name of the open option.
    static let option = "vhd-size"
    /// The creator application of images that are made here: nobody else's name, so that nobody takes CHS for meant.
    static let creatorApplication = "vdm "

    /// What a request for opening asks for; nil: what the creator application says.
    static func asked(_ request: OpenRequest) throws(DiskError) -> VHDSizeRule? {
        guard let text = request.formatOptions[option] else { return nil }
        guard let rule = VHDSizeRule(rawValue: text.lowercased()) else {
            throw DiskError(.invalidArgument, "the option \(option)=\(text) cannot be: it is chs or current")
        }
        return rule
    }

    /// What the creator application means, by QEMU's rule (`block/vpc.c`, since 10.0): Virtual PC and QEMU without
    /// `force_size` mean CHS, but a geometry at its maximum says nothing.
    init(_ footer: VHDFooter) {
        let meansGeometry = ["vpc ", "qemu"].contains { Array($0.utf8) == footer.creatorApplication }
        let isUsable = footer.geometry.byteCount > 0 && footer.geometry != .vhdMaximum
        self = meansGeometry && isUsable ? .chs : .current
    }

    /// The size of the disk in bytes, down to a whole sector.
    func size(_ footer: VHDFooter) -> UInt64 {
        (self == .chs ? footer.geometry.byteCount : footer.currentSize) & ~511
    }
}

extension DiskGeometry {
    /// The largest one that a footer can hold: it also stands for disks that are larger.
    static let vhdMaximum = DiskGeometry(cylinders: 65_535, heads: 16, sectors: 255)

    /// The bytes of a disk of this geometry.
    var byteCount: UInt64 { cylinders * heads * sectors * 512 }

    /// The geometry of a disk by the specification's appendix, "CHS Calculation".
    init(vhdSectorCount count: UInt64) {
        let total = min(count, 65_535 * 16 * 255)
        if total >= 65_535 * 16 * 63 {
            self.init(cylinders: total / 255 / 16, heads: 16, sectors: 255)
            return
        }
        var (heads, sectors): (UInt64, UInt64) = (max(4, (total / 17).dividedRoundingUp(by: 1024)), 17)
        if heads > 16 || total / 17 >= heads * 1024 { (heads, sectors) = (16, 31) }
        if total / sectors >= heads * 1024 { (heads, sectors) = (16, 63) }
        self.init(cylinders: total / sectors / heads, heads: heads, sectors: sectors)
    }

    /// The geometry of a new image: the specification's where it is the disk's size; else the maximum, which says to
    /// everybody that it is not. QEMU before 10.0 takes the geometry of any creator that it does not know, and would
    /// cut the disk's end off.
    static func newVHD(size: UInt64) -> DiskGeometry {
        let geometry = DiskGeometry(vhdSectorCount: size / 512)
        return geometry.byteCount == size ? geometry : .vhdMaximum
    }
}
