internal import CLinux

/// What a program that opens images does before anything else.
public enum ProcessPreparation {
    /// Makes the process safe to open images in. To be called before the first file is opened.
    ///
    /// - A standard descriptor that the caller had closed becomes `/dev/null`. Its number would otherwise go to an
    ///   image, and what is printed would be written into it.
    /// - As many files may be open as the system lets this process open: a split disk can have thousands of extents.
    public static func run() {
        precondition(clinux_fill_standard_descriptors() == 0, "/dev/null is needed for closed standard descriptors")
        // A limit that stays as it is shows when a file cannot be opened.
        _ = clinux_raise_file_limit()
    }
}
