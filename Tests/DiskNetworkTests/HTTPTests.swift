import DiskStorage
import DiskTesting
import Glibc
import Testing

@testable import DiskNetwork

/// Bytes by which any part of a file can be told from any other.
func noise(_ count: Int, seed: UInt64 = 7) -> [UInt8] {
    var generator = SeededGenerator(seed: seed)
    var bytes: [UInt8] = []
    bytes.reserveCapacity(count + 8)
    while bytes.count < count {
        let word = generator.next()
        for shift in stride(from: 0 as UInt64, to: 64, by: 8) { bytes.append(UInt8(truncatingIfNeeded: word >> shift)) }
    }
    return Array(bytes.prefix(count))
}

extension Storage {
    func all(_ piece: Int = 1 << 20) throws(DiskError) -> [UInt8] {
        var result: [UInt8] = []
        let length = try length()
        while UInt64(result.count) < length {
            let part = try availableBytes(at: UInt64(result.count), count: piece, for: .guestData)
            guard !part.isEmpty else { break }
            result += part
        }
        return result
    }
}

/// Settings with which what cannot succeed fails soon.
func hasty(retries: Int = 4, _ more: (inout StorageSettings) -> Void = { _ in }) -> StorageSettings {
    var settings = StorageSettings()
    settings.timeout = 2
    settings.retries = retries
    more(&settings)
    return settings
}

/// Files on a web server, which behaves as it should, or does not.
@Suite(.serialized) struct HTTPTests {
    private let folder: TemporaryFolder
    private let content: [UInt8]
    private let server: TestServer

    init() throws {
        folder = try TemporaryFolder()
        content = noise(3 << 20 | 777)
        _ = try folder.write(content, to: "disk")
        server = try TestServer.web(folder.path, ["--log", folder.file("log")])
    }

    private func address(_ kind: String, _ name: String = "disk") -> String {
        "http://127.0.0.1:\(server.port)/\(kind)/\(name)"
    }

    private func requests() throws -> [String] {
        String(decoding: try folder.read("log"), as: UTF8.self).split(separator: "\n").map(String.init)
    }

    @Test(arguments: ["plain", "weak", "untagged", "slow", "hop", "flaky"]) func readsWhole(_ kind: String) throws {
        for piece in [1 << 20, 100_000] {
            let storage = try HTTPStorage(address(kind), settings: hasty())
            #expect(try storage.all(piece) == content)
            #expect(storage.length() == UInt64(content.count))
            #expect((storage.version == nil) == (kind == "untagged"))
            #expect(try storage.availableBytes(at: UInt64(content.count), count: 5, for: .table) == [])
            #expect(try storage.availableBytes(at: .max - 3, count: 5, for: .table) == [])
        }
    }

    @Test func smallReadsNeedFewRequests() throws {
        let storage = try HTTPStorage(address("plain"))
        for offset in stride(from: 0, to: content.count, by: 4096) {
            let page = try storage.availableBytes(at: UInt64(offset), count: 4096, for: .table)
            #expect(page == Array(content[offset..<min(content.count, offset + 4096)]))
        }
        // 769 pages; runs of 1, 2, 4, 8, 16, ... blocks of 64 KiB.
        #expect(try requests().count < 12)
    }

    /// Threads that want the same, and others, with a cache that is too small for all.
    @Test func manyThreads() throws {
        let small = try HTTPStorage(address("plain"), settings: hasty { $0.cacheSize = 0 })
        let storage = try HTTPStorage(address("flaky"), settings: hasty(retries: 20))
        let expected = content
        let wrong = Locked(0)
        onThreads(8) { thread in
            var generator = SeededGenerator(seed: UInt64(thread % 4))
            for _ in 0..<60 {
                let count = Int.random(in: 1...(thread % 2 == 0 ? 5000 : 600_000), using: &generator)
                let offset = Int.random(in: 0...expected.count - count, using: &generator)
                for storage in [small, storage] {
                    let bytes = try? storage.availableBytes(at: UInt64(offset), count: count, for: .guestData)
                    if bytes != Array(expected[offset..<offset + count]) { wrong.withLock { $0 += 1 } }
                }
            }
        }
        #expect(wrong.withLock { $0 } == 0)
    }

    /// Never the bytes of two states: after the change nothing is read any more, what is in memory included.
    @Test(arguments: ["changing", "shrinking"]) func changeIsAnError(_ kind: String) throws {
        let storage = try HTTPStorage(address(kind), settings: hasty { $0.cacheSize = 0 })
        var failure: DiskError?
        for offset in stride(from: 0, to: content.count, by: 300_000) where failure == nil {
            do throws(DiskError) {
                let bytes = try storage.availableBytes(at: UInt64(offset), count: 4096, for: .table)
                #expect(bytes == Array(content[offset..<min(content.count, offset + 4096)]))
            } catch { failure = error }
        }
        #expect(failure?.message.contains("changed on the server") == true)
        #expect(throws: DiskError.self) { try storage.availableBytes(at: 0, count: 1, for: .table) }
    }

    @Test func replacedFileIsNoticed() throws {
        let storage = try HTTPStorage(address("plain"), settings: hasty())
        _ = try storage.availableBytes(at: 0, count: 10, for: .header)
        unsafe _ = unlink(folder.file("disk"))
        usleep(1_100_000)
        _ = try folder.write(noise(content.count, seed: 8), to: "disk")
        #expect(throws: DiskError.self) { try storage.availableBytes(at: 1 << 20, count: 10, for: .header) }
        #expect(throws: DiskError.self) { try storage.availableBytes(at: 0, count: 10, for: .header) }
    }

    /// What no client can use, and what a hostile server would send: an error in bounded time and memory.
    @Test(arguments: [
        ("whole", "no range requests"), ("liar", "which bytes"), ("endless", "header"), ("garbage", ""),
        ("gzip", "compressed"), ("more", "more bytes"), ("drip", ""), ("loop", "redirects more than"),
        ("away", "redirects to"),
        ("plain/none", "no such file"),
    ]) func isRefused(_ kind: String, _ text: String) throws {
        let path = kind.contains("/") ? kind : kind + "/disk"
        let settings = hasty(retries: 1)
        #expect {
            _ = try HTTPStorage("http://127.0.0.1:\(server.port)/\(path)", settings: settings)
        } throws: { error in
            "\(error)".contains(text) && "\(error)".contains("127.0.0.1")
        }
    }

    @Test func failuresThatLastAreToldInTheEnd() throws {
        let storage = try HTTPStorage(address("broken"), settings: hasty(retries: 2))
        #expect { try storage.availableBytes(at: 1 << 20, count: 5, for: .table) } throws: { "\($0)".contains("500") }
        server.stop()
        #expect(throws: DiskError.self) { try storage.availableBytes(at: 2 << 20, count: 5, for: .table) }
        #expect(throws: DiskError.self) { try HTTPStorage(address("plain"), settings: hasty()) }
    }

    @Test func emptyFile() throws {
        _ = try folder.write([], to: "empty")
        let storage = try HTTPStorage(address("plain", "empty"))
        #expect(storage.length() == 0)
        #expect(try storage.availableBytes(at: 0, count: 10, for: .header) == [])
    }

    /// User, password and headers go to the server that was named, and to no other.
    @Test func secretsStayAtTheirServer() throws {
        let closed = try TestServer.web(folder.path, ["--user", "me:it's secret", "--log", folder.file("closed")])
        let place = "http://127.0.0.1:\(closed.port)/plain/disk"
        #expect { try HTTPStorage(place, settings: hasty()) } throws: { ($0 as? DiskError)?.kind == .refused }
        let named = try HTTPStorage("http://me:it's%20secret@127.0.0.1:\(closed.port)/plain/disk", settings: hasty())
        #expect(try named.all() == content)
        #expect(!named.name.contains("secret"))
        _ = try folder.write(Array("it's secret\nmore".utf8), to: "password")
        let file = folder.file("password")
        let settings = try StorageSettings(["user=me", "password-file=\(file)", "header=X-Test: also"])
        #expect(try HTTPStorage(place, settings: settings).all() == content)
        // A redirect leads away from there.
        let away = "http://127.0.0.1:\(closed.port)/elsewhere/\(server.port)/disk"
        #expect(try HTTPStorage(away, settings: settings).all() == content)
        let lines = try requests()
        #expect(!lines.isEmpty)
        for line in lines { #expect(line.hasSuffix("None None"), "\(line)") }
        let own = String(decoding: try folder.read("closed"), as: UTF8.self)
        #expect(own.contains("also"))
    }

    /// TLS: only who is known, or on the user's word.
    @Test func certificatesAreChecked() throws {
        try Certificates.make(in: folder)
        let key = ["--tls", folder.file("server-cert.pem"), folder.file("server-key.pem")]
        let server = try TestServer.web(folder.path, key)
        let place = "https://127.0.0.1:\(server.port)/plain/disk"
        #expect { try HTTPStorage(place, settings: hasty()) } throws: { error in
            "\(error)".contains("certificate") && (error as? DiskError)?.kind == .refused
        }
        let trusting = try StorageSettings(["ca-file=\(folder.file("ca-cert.pem"))", "timeout=5"])
        #expect(try HTTPStorage(place, settings: trusting).all() == content)
        // Of another name.
        let other = "https://localhost:\(server.port)/plain/disk"
        #expect { try HTTPStorage(other, settings: trusting) } throws: { "\($0)".contains("certificate") }
        #expect(try HTTPStorage(other, settings: StorageSettings(["insecure=yes"])).all() == content)
    }
}

/// A certificate authority and a server's certificate for 127.0.0.1, by openssl.
enum Certificates {
    static func make(in folder: TemporaryFolder) throws {
        _ = try folder.write(Array("subjectAltName=IP:127.0.0.1\n".utf8), to: "names")
        let path = folder.path
        let command = """
            set -e; cd '\(path)'
            openssl req -x509 -newkey rsa:2048 -nodes -keyout ca-key.pem -out ca-cert.pem -days 2 -subj /CN=test-ca
            openssl req -newkey rsa:2048 -nodes -keyout server-key.pem -out server.csr -subj /CN=127.0.0.1
            openssl x509 -req -in server.csr -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial -days 2 \
              -extfile names -out server-cert.pem
            """
        let result = try Subprocess.run(["sh", "-c", command])
        try #require(result.status == 0, "\(result.errorText)")
    }
}
