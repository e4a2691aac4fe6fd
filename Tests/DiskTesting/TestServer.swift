public import DiskStorage
// The environment is a variable there; nobody changes it.
@unsafe @preconcurrency internal import Glibc

/// A server that runs for a test, on 127.0.0.1 alone, and is killed with it.
public final class TestServer: Sendable {
    private let process: Subprocess
    /// Where it listens.
    public let port: Int
    private let isRunning = Locked(true)

    /// Starts it and waits until it listens.
    public init(_ command: [String], port: Int) throws(DiskError) {
        self.port = port
        process = try Subprocess.start(command)
        for _ in 0..<3000 {
            if Self.listens(port) { return }
            usleep(10_000)
        }
        stop()
        throw DiskError(.system, "\(command[0]) does not listen at \(port)")
    }

    /// The web server of the tests, for the files of a folder; see `Tests/Servers/ranges.py`.
    public static func web(_ folder: String, _ options: [String] = []) throws(DiskError) -> TestServer {
        let script = #filePath.replacing("DiskTesting/TestServer.swift", with: "Servers/ranges.py")
        let port = freePort()
        let base = ["python3", script, folder, "--port", "\(port)"]
        return try TestServer(base + options, port: port)
    }

    /// An NBD server for a file.
    public static func nbd(_ file: String, _ options: [String] = []) throws(DiskError) -> TestServer {
        let port = freePort()
        let base = ["qemu-nbd", "--persistent", "--shared=8", "-f", "raw", "-b", "127.0.0.1", "-p", "\(port)"]
        return try TestServer(base + options + [file], port: port)
    }

    deinit { stop() }

    /// Ends it at once.
    public func stop() {
        let wasRunning = isRunning.withLock { isRunning in
            defer { isRunning = false }
            return isRunning
        }
        guard wasRunning else { return }
        process.send(signal: SIGKILL)
        _ = try? process.wait()
    }

    /// A port where nobody listens, by chance, and below those that the system gives to clients.
    public static func freePort() -> Int {
        while true {
            let port = Int.random(in: 10_000..<32_000)
            if !listens(port) { return port }
        }
    }

    private static func local(_ port: Int) -> sockaddr_in {
        var address = sockaddr_in()
        address.sin_family = sa_family_t(AF_INET)
        address.sin_port = UInt16(port).bigEndian
        address.sin_addr.s_addr = UInt32(0x7f00_0001).bigEndian
        return address
    }

    private static func listens(_ port: Int) -> Bool {
        let descriptor = socket(AF_INET, Int32(SOCK_STREAM.rawValue), 0)
        defer { close(descriptor) }
        var address = local(port)
        return unsafe withUnsafePointer(to: &address) { pointer in
            unsafe pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { place in
                unsafe connect(descriptor, place, socklen_t(MemoryLayout<sockaddr_in>.size)) == 0
            }
        }
    }
}

/// An iSCSI target with one disk, unit 1: tgtd of the package tgt.
public final class TestTarget: Sendable {
    private let server: TestServer
    private let control: String
    public var port: Int { server.port }
    public static let name = "iqn.2001-04.org.example:disk"

    /// - Parameter options: Of the unit, as tgtadm's `--params` takes them.
    public init(
        _ file: String, user: String? = nil, password: String = "", options: String? = nil
    ) throws(DiskError) {
        let port = TestServer.freePort()
        // A short number is what tgtd takes.
        control = "\(port % 30_000 + 100)"
        unsafe _ = mkdir("/var/run/tgtd", 0o755)
        server = try TestServer(["tgtd", "-f", "-C", control, "--iscsi", "portal=127.0.0.1:\(port)"], port: port)
        try administer("target", "new", ["--tid", "1", "--targetname", Self.name])
        try administer("logicalunit", "new", ["--tid", "1", "--lun", "1", "-b", file])
        if let options { try administer("logicalunit", "update", ["--tid", "1", "--lun", "1", "--params", options]) }
        if let user {
            try administer("account", "new", ["--user", user, "--password", password])
            try administer("account", "bind", ["--tid", "1", "--user", user])
        }
        try administer("target", "bind", ["--tid", "1", "-I", "ALL"])
    }

    deinit { stop() }

    /// Ends it at once.
    public func stop() {
        server.stop()
        for end in ["", ".lock"] { unsafe unlink("/var/run/tgtd/socket.\(control)\(end)") }
    }

    private func administer(_ mode: String, _ operation: String, _ words: [String]) throws(DiskError) {
        let base = ["tgtadm", "-C", control, "--lld", "iscsi", "--mode", mode, "--op", operation]
        let result = try Subprocess.run(base + words)
        guard result.status == 0 else { throw DiskError(.system, "tgtadm: \(result.errorText)") }
    }
}
