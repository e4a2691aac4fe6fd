public import DiskImage

/// The formats of this library.
public enum Formats {
    /// All of them, in the order in which a file is offered to them; raw, which takes anything, is the last.
    public static let all = FormatRegistry([
        VMDKDriver(),
        VDIDriver(),
        QCOW2Driver(),
        QCOWDriver(),
        QEDDriver(),
        VHDDriver(),
        VHDXDriver(),
        OverlayDriver(),
        RawDriver(),
    ])
}
