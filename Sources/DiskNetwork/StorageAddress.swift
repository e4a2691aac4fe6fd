/// The address of a storage, taken apart (RFC 3986): `scheme://user:password@host:port/path?query`.
struct StorageAddress: Equatable {
    /// The kinds of storages.
    enum Kind {
        case http
        case nbd
        case iscsi
    }

    /// The most bytes of an address.
    static let limit = 8192

    let text: String
    /// In lower case.
    let scheme: String
    let kind: Kind
    /// What comes before the host, without `@`; nil if nothing does.
    let userInformation: Substring?
    /// Host and port, the host in lower case.
    let authority: String
    /// Begins with `/`, or is empty.
    let path: Substring
    /// Without `?`; nil if there is none.
    let query: Substring?

    /// Nil for anything but an address of a kind that is known here.
    init?(_ text: String) {
        guard text.utf8.count <= Self.limit, let colon = text.firstIndex(of: ":"),
            text[colon...].hasPrefix("://")
        else { return nil }
        scheme = text[..<colon].lowercased()
        switch scheme {
        case "http", "https": kind = .http
        case "nbd", "nbds", "nbd+unix", "nbds+unix": kind = .nbd
        case "iscsi": kind = .iscsi
        default: return nil
        }
        // Neither blanks nor control characters: nothing of an address can end a line of a request.
        guard text.utf8.allSatisfy({ $0 > 0x20 && $0 != 0x7f }) else { return nil }
        self.text = text
        var rest = text[text.index(colon, offsetBy: 3)...]
        if let fragment = rest.firstIndex(of: "#") { rest = rest[..<fragment] }
        let end = rest.firstIndex { $0 == "/" || $0 == "?" } ?? rest.endIndex
        let place = rest[..<end]
        if let at = place.lastIndex(of: "@") {
            userInformation = place[..<at]
            authority = place[place.index(after: at)...].lowercased()
        } else {
            userInformation = nil
            authority = place.lowercased()
        }
        let queryStart = rest[end...].firstIndex(of: "?")
        path = rest[end..<(queryStart ?? rest.endIndex)]
        query = queryStart.map { rest[rest.index(after: $0)...] }
        guard !authority.isEmpty || scheme.hasSuffix("+unix") else { return nil }
    }

    /// For messages and lists: without passwords and, where it could hold one, without the query.
    var shown: String {
        var user = ""
        if let userInformation {
            // iSCSI's addresses have `user%password` (libiscsi's README).
            let name = userInformation.prefix { $0 != ":" && (kind != .iscsi || $0 != "%") }
            user = name.count < userInformation.count ? "\(name):***@" : "\(name)@"
        }
        let end = query.map { kind == .nbd ? "?\($0)" : "?..." } ?? ""
        return "\(scheme)://\(user)\(authority)\(path)\(end)"
    }

    /// Scheme, host and port: what a server is known by.
    var origin: String {
        let standard = scheme == "https" ? ":443" : scheme == "http" ? ":80" : nil
        if let standard, authority.hasSuffix(standard) { return "\(scheme)://\(authority.dropLast(standard.count))" }
        return "\(scheme)://\(authority)"
    }

    /// What a name means that the image found here has. Only the paths of web servers have neighbours.
    func resolve(_ name: String) -> String? {
        guard kind == .http, !name.isEmpty, name.utf8.count < Self.limit / 4, !name.contains("://") else { return nil }
        let slashed = name.split(separator: "\\", omittingEmptySubsequences: false).joined(separator: "/")
        var steps = slashed.hasPrefix("/") ? [] : path.split(separator: "/").map(String.init).dropLast()
        for step in slashed.split(separator: "/") where step != "." {
            if step == ".." {
                guard !steps.isEmpty else { return nil }
                steps.removeLast()
            } else {
                steps.append(Self.escaped(step))
            }
        }
        return "\(scheme)://\(authority)/" + steps.joined(separator: "/")
    }

    /// A file's name as a part of a path.
    private static func escaped(_ name: Substring) -> String {
        let digits = Array("0123456789ABCDEF".unicodeScalars)
        var text = ""
        for byte in name.utf8 {
            switch byte {
            case UInt8(ascii: "a")...UInt8(ascii: "z"), UInt8(ascii: "A")...UInt8(ascii: "Z"),
                UInt8(ascii: "0")...UInt8(ascii: "9"), UInt8(ascii: "-"), UInt8(ascii: "."), UInt8(ascii: "_"),
                UInt8(ascii: "~"):
                text.unicodeScalars.append(Unicode.Scalar(byte))
            default:
                text += "%"
                text.unicodeScalars.append(digits[Int(byte >> 4)])
                text.unicodeScalars.append(digits[Int(byte & 15)])
            }
        }
        return text
    }

    /// Whether this is `prefix` or lies below it: the same server, and the path as far as it is given, whole steps.
    /// What leads back up, in any spelling, lies below nothing.
    func lies(below prefix: StorageAddress) -> Bool {
        guard origin == prefix.origin, userInformation == nil || userInformation == prefix.userInformation else {
            return false
        }
        let plain = path.lowercased()
        guard !plain.contains("\\"), !plain.contains("%2f"), !plain.contains("%5c"), !plain.contains("//") else {
            return false
        }
        let steps = plain.split(separator: "/").map { $0.split(separator: "%2e", omittingEmptySubsequences: false) }
        guard !steps.contains(where: { [".", ".."].contains($0.joined(separator: ".")) }) else { return false }
        if kind != .http, query != prefix.query { return false }
        let allowed = prefix.path
        guard path.hasPrefix(allowed) else { return false }
        return path.count == allowed.count || allowed.isEmpty || allowed.hasSuffix("/")
            || path.dropFirst(allowed.count).hasPrefix("/")
    }
}
