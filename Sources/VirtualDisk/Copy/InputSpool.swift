public import DiskStorage
internal import Glibc

/// Keeps what comes through a pipe, so that it can be read at offsets.
public enum InputSpool {
    /// Bytes that are looked at at once: zeros become a hole.
    private static let piece = 64 << 10

    /// Reads to the end into a file without a name in `folder`; `name` is for messages.
    public static func read(
        _ descriptor: Int32, name: String, folder: String, _ control: OperationControl
    ) throws(DiskError) -> any Storage {
        let file = try FileStorage(temporaryIn: folder, name: name)
        control.begin("reading", total: 0)
        var length: UInt64 = 0
        var bytes = [UInt8](repeating: 0, count: piece)
        try bytes.withIOBuffer { (buffer) throws(DiskError) in
            while true {
                try control.checkCancelled()
                let count = try fill(buffer, from: descriptor, name)
                let part = buffer.slice(0, count)
                if !part.readOnly.isZero { try file.write(part.readOnly, at: length, for: .guestData) }
                length += UInt64(count)
                if count < buffer.count { break }
            }
        }
        guard length > 0 else {
            throw DiskError(.invalidImage, "holds nothing: what should have written to it may have failed", image: name)
        }
        try file.setLength(length)
        return file
    }

    /// Reads until the buffer is full or there is no more.
    private static func fill(_ buffer: IOBuffer, from descriptor: Int32, _ name: String) throws(DiskError) -> Int {
        var done = 0
        while done < buffer.count {
            let result = unsafe Glibc.read(descriptor, buffer.pointer + done, buffer.count - done)
            if result == 0 { break }
            if result > 0 {
                done += result
            } else if errno != EINTR {
                throw .system(errno, "read", image: name)
            }
        }
        return done
    }
}
