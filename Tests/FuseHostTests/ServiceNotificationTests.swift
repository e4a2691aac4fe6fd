import Glibc
import Testing

@testable import FuseHost

/// What the service manager is told, as sd_notify(3) describes it.
@Suite struct ServiceNotificationTests {
    @Test func socketWithAPath() throws {
        let manager = try Manager("/tmp/vdmount-notify-\(getpid())-\(UInt32.random(in: 0 ... .max))")
        defer { unsafe unlink(manager.name) }
        try expectAllMessages(manager)
    }

    @Test func abstractSocket() throws {
        try expectAllMessages(try Manager("@vdmount/notify-\(getpid())-\(UInt32.random(in: 0 ... .max))"))
    }

    private func expectAllMessages(_ manager: Manager) throws {
        let service = ServiceNotification(socket: manager.name)
        service.status("disk.vmdk is at /mnt/disk")
        #expect(manager.received() == "STATUS=disk.vmdk is at /mnt/disk")
        service.ready()
        #expect(manager.received() == "READY=1")
        service.stopping()
        #expect(manager.received() == "STOPPING=1")
        service.failed("disk.vmdk: no such file", errno: ENOENT)
        #expect(manager.received() == "STATUS=disk.vmdk: no such file\nERRNO=2")
        service.failed("cannot mount")
        #expect(manager.received() == "STATUS=cannot mount")
        #expect(manager.received() == nil)
    }

    /// A name with a line end in it cannot make another field, such as READY=1.
    @Test func lineEndsInAValue() throws {
        let manager = try Manager("@vdmount/notify-\(getpid())-\(UInt32.random(in: 0 ... .max))")
        ServiceNotification(socket: manager.name).failed("a\nREADY=1\u{1B}[1m\u{0}ö: no such file")
        #expect(manager.received() == "STATUS=a READY=1 [1m ö: no such file")
    }

    /// Nobody to tell is no failure.
    @Test(arguments: [
        nil, "", "@", "notify", "vsock:2:1234", "/nowhere/notify", "@vdmount/nobody",
        "/" + String(repeating: "n", count: 107), "@" + String(repeating: "n", count: 200),
    ])
    func nobodyListens(socket: String?) {
        let service = ServiceNotification(socket: socket)
        service.ready()
        service.failed("disk.vmdk: no such file", errno: ENOENT)
    }

    /// The longest names there can be: 108 bytes with what marks them.
    @Test(arguments: [
        "/tmp/" + String(repeating: "n", count: 102), "@" + String(repeating: "n", count: 107),
    ])
    func longestName(socket: String) throws {
        let manager = try Manager(socket)
        defer { unsafe unlink(socket) }
        ServiceNotification(socket: socket).ready()
        #expect(manager.received() == "READY=1")
    }
}

/// A service manager's end: a socket that takes datagrams.
private final class Manager {
    let name: String
    private let descriptor: Int32

    init(_ name: String) throws {
        self.name = name
        descriptor = socket(AF_UNIX, Int32(SOCK_DGRAM.rawValue | SOCK_CLOEXEC.rawValue | SOCK_NONBLOCK.rawValue), 0)
        var place = sockaddr_un()
        place.sun_family = sa_family_t(AF_UNIX)
        // Independent of the code under test: a path may fill all 108 bytes, an abstract name counts by its length.
        let bytes = name.utf8.enumerated().map { $0 == 0 && $1 == UInt8(ascii: "@") ? 0 : $1 }
        unsafe withUnsafeMutableBytes(of: &place.sun_path) { unsafe $0.copyBytes(from: bytes) }
        let result = unsafe withUnsafeBytes(of: &place) { place in
            unsafe bind(
                descriptor, place.assumingMemoryBound(to: sockaddr.self).baseAddress, socklen_t(2 + bytes.count))
        }
        try #require(result == 0, "bind \(name): errno \(errno)")
    }

    deinit { close(descriptor) }

    /// The next message; nil if there is none.
    func received() -> String? {
        var buffer = [UInt8](repeating: 0, count: 4096)
        let count = unsafe recv(descriptor, &buffer, buffer.count, 0)
        return count < 0 ? nil : String(decoding: buffer[..<count], as: UTF8.self)
    }
}
