internal import FuseShim
import Glibc

/// Tells the service manager that started this process how it is: the protocol of sd_notify(3), without its library.
///
/// Each message is one datagram of `KEY=value` lines to the socket that $NOTIFY_SOCKET names. Without the variable, or
/// when nobody listens there, nothing happens: a service manager is a help, and a mount works without.
///
/// The socket is connected once: a confined process can open none.
public struct ServiceNotification: Sendable {
    /// A socket that is connected to the manager, for as long as the process lives; -1 if there is nobody to tell.
    private let descriptor: Int32

    /// Nobody to tell.
    public static let none = ServiceNotification(socket: nil)

    /// - Parameter socket: a path, or '@' and an abstract name. What else systemd may know one day is left alone.
    public init(socket: String?) {
        var name = Array((socket ?? "").utf8)
        let isAbstract = name.first == UInt8(ascii: "@")
        // An abstract name begins with a zero byte and is as long as it is; a path ends with one.
        if isAbstract { name[0] = 0 } else { name.append(0) }
        let isKnown = isAbstract || name.first == UInt8(ascii: "/")
        descriptor = isKnown && name.count > 1 && name.count <= Self.longestName ? Self.connect(to: name) : -1
    }

    /// The manager of this process. Only to be asked by a process that is the service: one that stays in the
    /// foreground. The variable goes from the environment, so that programs which this one runs do not speak for it.
    static func fromEnvironment() -> ServiceNotification {
        let service = ServiceNotification(socket: unsafe getenv("NOTIFY_SOCKET").map { unsafe String(cString: $0) })
        unsafe unsetenv("NOTIFY_SOCKET")
        return service
    }

    /// The service does its work from now on.
    func ready() { send(["READY=1"]) }

    /// One line that `systemctl status` shows.
    public func status(_ text: String) { send(["STATUS=\(Self.line(text))"]) }

    /// The end has begun.
    public func stopping() { send(["STOPPING=1"]) }

    /// The service is about to end for this reason; an `errno` of 0 says nothing.
    public func failed(_ message: String, errno code: Int32 = 0) {
        send(["STATUS=\(Self.line(message))"] + (code > 0 ? ["ERRNO=\(code)"] : []))
    }

    /// A line end in a value would begin another field.
    private static func line(_ text: String) -> String {
        String(decoding: text.utf8.map { $0 < 0x20 ? 0x20 : $0 }, as: UTF8.self)
    }

    private static let longestName = MemoryLayout.size(ofValue: sockaddr_un().sun_path)

    private static func connect(to address: [UInt8]) -> Int32 {
        let descriptor = socket(AF_UNIX, Int32(SOCK_DGRAM.rawValue | SOCK_CLOEXEC.rawValue), 0)
        guard descriptor >= 0 else { return -1 }
        var place = sockaddr_un()
        place.sun_family = sa_family_t(AF_UNIX)
        unsafe withUnsafeMutableBytes(of: &place.sun_path) { unsafe $0.copyBytes(from: address) }
        let length = socklen_t(MemoryLayout<sa_family_t>.size + address.count)
        let connected = unsafe withUnsafeBytes(of: &place) { place in
            unsafe place.assumingMemoryBound(to: sockaddr.self).baseAddress.map {
                unsafe Glibc.connect(descriptor, $0, length) == 0
            } ?? false
        }
        if connected { return descriptor }
        close(descriptor)
        return -1
    }

    private func send(_ fields: [String]) {
        guard descriptor >= 0 else { return }
        let text = Array(fields.joined(separator: "\n").utf8)
        _ = unsafe text.withUnsafeBytes { unsafe fuseshim_send(descriptor, $0.baseAddress, $0.count) }
    }
}
