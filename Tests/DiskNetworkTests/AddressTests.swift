import DiskStorage
import Testing

@testable import DiskNetwork

/// Addresses: what of them is shown, and which ones an image may name.
struct AddressTests {
    @Test(arguments: [
        ("http://u:secret@Host:80/a/b.vmdk?token=secret", "http://u:***@host:80/a/b.vmdk?..."),
        ("https://secret:x@h/d", "https://secret:***@h/d"),
        (
            "iscsi://me%secret@10.0.0.1:3260/iqn.2001-04.com.example:disk/1",
            "iscsi://me:***@10.0.0.1:3260/iqn.2001-04.com.example:disk/1"
        ),
        ("iscsi://h/iqn/0?target_password=secret", "iscsi://h/iqn/0?..."),
        ("nbd+unix:///export?socket=/run/x", "nbd+unix:///export?socket=/run/x"),
        ("http://u:secret@ho st/", "http://..."),
    ]) func secretsAreNotShown(_ address: String, _ shown: String) {
        #expect(AddressRules.shownName(address) == shown)
        #expect(AddressRules.recognizes(address))
    }

    @Test(arguments: [
        "disk.vmdk", "/http://x/y", "ftp://h/x", "file:///etc/passwd", "http:/x", "http://", "json:{}", "C:\\x",
        "nbd:h:1",
    ]) func whatIsNoAddress(_ name: String) { #expect(!AddressRules.recognizes(name)) }

    @Test(arguments: [
        "http://h/images/x", "http://H/images/sub/x", "http://h:80/images/x", "http://h/images/x?y",
    ]) func whatLiesBelow(_ address: String) throws {
        let rules = try AddressRules(["http://h/images/"])
        #expect(rules.permits(address))
    }

    /// Neither another server nor a way back up.
    @Test(arguments: [
        "http://h/", "http://h/imagesx", "http://h/images/../x", "http://h/images/%2e%2E/x", "http://h/images/.%2e/x",
        "http://h/images/..%2fx", "http://h/images/a\\..\\x", "https://h/images/x", "http://h.evil/images/x",
        "http://h@evil/images/x", "http://u:p@h/images/x", "http://h:81/images/x", "http://evil/http://h/images/x",
        "http://h/images/ x", "http://h/images/x\r\nHost: y", "nbd://h/images/x", "http://h/images/./x", "disk.vmdk",
        "",
    ]) func whatDoesNotLieBelow(_ address: String) throws {
        let rules = try AddressRules(["http://h/images/"])
        #expect(!rules.permits(address))
    }

    @Test func aPrefixEndsAtAStep() throws {
        let rules = try AddressRules(["http://h/images", "nbd://h/base"])
        #expect(rules.permits("http://h/images"))
        #expect(rules.permits("http://h/images/x"))
        #expect(!rules.permits("http://h/images2"))
        #expect(rules.permits("nbd://h/base"))
        #expect(!rules.permits("nbd://h/base?tls-certificates=/etc"))
        #expect(!rules.permits("nbd://h/base2"))
        #expect(throws: DiskError.self) { try AddressRules(["h/images"]) }
    }

    @Test func neighbours() throws {
        let base = "http://u:p@h/a/b/child.vmdk?token"
        func meant(_ name: String) -> String? { AddressRules.address(of: name, namedBy: base) }
        #expect(meant("base.vmdk") == "http://h/a/b/base.vmdk")
        #expect(meant("../base.vmdk") == "http://h/a/base.vmdk")
        #expect(meant("../../../base.vmdk") == nil)
        #expect(meant("C:\\x\\a b?#.vmdk") == "http://h/a/b/C%3A/x/a%20b%3F%23.vmdk")
        #expect(meant("/x.vmdk") == "http://h/x.vmdk")
        #expect(meant("https://other/x") == "https://other/x")
        #expect(meant("file:///etc/passwd") == nil)
        #expect(meant("") == nil)
        #expect(AddressRules.address(of: "x", namedBy: "/a/b") == nil)
        #expect(AddressRules.address(of: "x", namedBy: "nbd://h/b") == nil)
    }

    @Test func optionsAreTyped() throws {
        let settings = try StorageSettings(["timeout=7", "insecure=yes", "header=X-A: b", "cache=2M", "user=me"])
        #expect(settings.timeout == 7 && settings.isInsecure && settings.headers == ["X-A: b"])
        #expect(settings.cacheSize == 2 << 20 && settings.user == "me")
        for wrong in [
            "timeout", "timeout=", "timeout=0", "timeout=x", "retries=-1", "insecure=maybe", "header=X", "header=: x",
            "header=Range: bytes=0-1", "header=A: b\r\nC: d", "what=1", "cache=9999999M", "password-file=/nowhere/x",
        ] { #expect(throws: DiskError.self, "\(wrong)") { try StorageSettings([wrong]) } }
        // Secrets are not in messages.
        #expect { try StorageSettings(["header=Authorization\u{1}: secret"]) } throws: { !"\($0)".contains("secret") }
    }

    @Test(arguments: [
        ("bytes 0-9/10", 0 as UInt64, 9 as UInt64, 10 as UInt64?), ("bytes 5-5/*", 5, 5, nil),
    ]) func contentRange(_ text: String, _ first: UInt64, _ last: UInt64, _ total: UInt64?) {
        #expect(HTTPResponse.parse(range: text) == .init(bytes: first...last, total: total))
    }

    @Test(arguments: [
        "", "bytes", "bytes 1-0/5", "bytes 0-9/9", "bytes -1-2/5", "bytes 0-99999999999999999999/*", "items 0-1/5",
        "bytes 0-1", "bytes 0-1/5/6", "bytes 0-1/-5", "bytes a-b/c",
        // No file is so long: offsets in it would not be numbers that others can take.
        "bytes 0-1/9223372036854775808", "bytes 0-1/18446744073709551615", "bytes */18446744073709551615",
    ]) func wrongContentRange(_ text: String) { #expect(HTTPResponse.parse(range: text) == nil) }

    /// A header without an end takes no more memory than its limit.
    @Test func headersAreLimited() {
        var response = HTTPResponse()
        var count = 0
        while response.take("X: " + String(repeating: "y", count: 997)), count < 1000 { count += 1 }
        #expect(count == 65)
    }
}
