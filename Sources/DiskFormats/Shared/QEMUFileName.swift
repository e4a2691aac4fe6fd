internal import DiskImage
internal import DiskStorage

/// What QEMU makes of a backing file's name, and what that means here: names are relative to the folder of the image;
/// `json:{…}` and `protocol:…` are descriptions of something that is no file.
enum QEMUFileName {
    /// The path that a name stands for.
    static func path(_ name: String) -> String {
        name.hasPrefix("file:") ? String(name.dropFirst("file:".count)) : name
    }

    /// The name of a format here, by QEMU's.
    static func format(_ name: String) -> String {
        switch name {
        case "vpc": "vhd"
        case "file", "host_device": "raw"
        default: name
        }
    }

    /// What QEMU calls a format of ours.
    static func peerFormat(_ name: String) -> String { name == "vhd" ? "vpc" : name }

    /// The protocol that a name begins with, as QEMU sees it: what stands before the first colon, if no slash comes
    /// first. One letter is a drive of another system.
    static func protocolName(_ name: String) -> String? {
        let units = Array(name.utf8)
        guard let colon = units.firstIndex(of: UInt8(ascii: ":")), colon > 1 else { return nil }
        guard !units[..<colon].contains(UInt8(ascii: "/")) else { return nil }
        return String(decoding: units[..<colon], as: UTF8.self)
    }

    /// Throws where a name is none of a file, nor of another storage that `companions` opens.
    static func check(_ name: String, image: String, _ companions: any CompanionOpener) throws(DiskError) {
        guard let scheme = protocolName(name), scheme != "file", !companions.isAddress(name) else { return }
        let reason =
            scheme == "json"
            ? "a description in JSON" : "something that is reached by the protocol '\(scheme.prefix(20))'"
        throw DiskError(
            .unsupported,
            "its backing file '\(name.printable(limit: 100))' is \(reason), not a file: "
                + "'qemu-img rebase -u' can name a file instead",
            image: image)
    }

    /// A path in the form in which nobody takes it for a protocol.
    static func stored(_ path: String) -> String {
        protocolName(path) == nil && !path.hasPrefix("file:") ? path : "./\(path)"
    }
}
