import ArgumentParser
import CommandSupport
import VirtualDisk

/// What is mounted, where and how: the command line after `-o` has been taken apart.
struct MountRequest {
    var isWritable = false
    var format: String?
    /// Which of a VHD's sizes counts: `chs` or `current`.
    var vhdSize: String?
    var snapshot: String?
    var allowedFolders: [String] = []
    /// What images may name of what is on servers, and how servers are reached.
    var allowedAddresses: [String] = []
    var storageOptions: [String] = []
    var isForeground = false
    /// Whether the daemon gives up what it does not need once it serves.
    var isConfined = true
    var logLevel: String?
    var logFile: String?
    var tableCacheSize: UInt64?
    var owner: UInt32?
    var group: UInt32?
    var umask: UInt32?
    var maximumLanes: Int?
    /// Whether a file system is mounted, and of which partition.
    var hasFileSystem = false
    var partition: Int?
    /// Whether writes go to an overlay, and to which file; without one, to one that goes with the mount.
    var hasOverlay = false
    var overlayFile: String?
    var overlayFolder: String?
    /// Where what is read from the images is kept, and how large that file is made.
    var cacheFile: String?
    var cacheSize: UInt64?
    /// Options for the kernel.
    var kernelOptions: [String] = []

    /// Options of mount(8) that say when or by whom to mount: nothing to do for us.
    private static let ignored: Set<String> = [
        "defaults", "auto", "noauto", "nofail", "_netdev", "user", "nouser", "users", "owner", "group", "allow_other",
        "async", "sync", "dirsync", "dev", "suid", "exec", "atime", "diratime", "relatime", "norelatime", "strictatime",
        "nostrictatime", "default_permissions", "loud", "silent", "mand", "nomand", "iversion", "noiversion", "remount",
    ]
    /// Options that the kernel takes as they are.
    private static let passedOn: Set<String> = ["nodev", "nosuid", "noexec", "noatime", "nodiratime"]

    /// Takes the comma list of `-o`: mount(8)'s words, and each long option of ours by its name.
    mutating func apply(optionList: String) throws {
        for option in optionList.split(separator: ",").map(String.init) { try apply(option) }
    }

    private mutating func apply(_ option: String) throws {
        let parts = option.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false).map(String.init)
        let name = parts[0]
        let value = parts.count == 2 ? parts[1] : nil
        switch name {
        case "ro": isWritable = false
        case "rw": isWritable = true
        case "foreground": isForeground = true
        case "no-sandbox": isConfined = false
        case "overlay":
            hasOverlay = true
            overlayFile = value ?? overlayFile
        case "fs":
            hasFileSystem = true
            if let value { partition = Int(try number(value, name, radix: 10)) }
        case "overlay-dir": overlayFolder = try required(value, name)
        case "format": format = try required(value, name)
        case "vhd-size": vhdSize = try required(value, name)
        case "snapshot": snapshot = try required(value, name)
        case "allow-dir": allowedFolders.append(try required(value, name))
        case "allow-url": allowedAddresses.append(try required(value, name))
        case "storage-option": storageOptions.append(try required(value, name))
        case "log-level": logLevel = try required(value, name)
        case "log-file": logFile = try required(value, name)
        case "uid": owner = try number(value, name, radix: 10)
        case "gid": group = try number(value, name, radix: 10)
        case "umask": umask = try number(value, name, radix: 8)
        case "lanes": maximumLanes = Int(try number(value, name, radix: 10))
        case "table-cache": tableCacheSize = try size(value, name)
        case "cache": cacheFile = try required(value, name)
        case "cache-size": cacheSize = try size(value, name)
        case _ where Self.passedOn.contains(name): kernelOptions.append(name)
        case _ where Self.ignored.contains(name) || name.hasPrefix("x-") || name.hasPrefix("comment"): break
        default: throw ValidationError("unknown option '-o \(option)'; 'vdmount --help' lists what there is")
        }
    }

    private func required(_ value: String?, _ name: String) throws -> String {
        guard let value, !value.isEmpty else { throw ValidationError("-o \(name) needs a value") }
        return value
    }

    private func size(_ value: String?, _ name: String) throws -> UInt64 {
        guard let size = ByteCount(argument: try required(value, name)) else {
            throw ValidationError("-o \(name) takes a size, not '\(value ?? "")'")
        }
        return size.bytes
    }

    private func number(_ value: String?, _ name: String, radix: Int) throws -> UInt32 {
        guard let number = UInt32(try required(value, name), radix: radix) else {
            throw ValidationError("-o \(name) takes a number, not '\(value ?? "")'")
        }
        return number
    }

    /// The same again as words of a command line, for the `vdmount` that only exposes the disk.
    var words: [String] {
        var words = isWritable && !hasOverlay ? ["--rw"] : []
        if !isConfined { words.append("--no-sandbox") }
        func add(_ name: String, _ value: String?) {
            if let value { words += ["--\(name)", value] }
        }
        add("format", format)
        add("vhd-size", vhdSize)
        add("snapshot", snapshot)
        for folder in allowedFolders { add("allow-dir", folder) }
        for address in allowedAddresses { add("allow-url", address) }
        for option in storageOptions { add("storage-option", option) }
        add("log-level", logLevel)
        add("log-file", logFile)
        add("table-cache", tableCacheSize.map(String.init))
        add("lanes", maximumLanes.map(String.init))
        add("cache", cacheFile)
        add("cache-size", cacheSize.map(String.init))
        if hasOverlay { words.append(overlayFile.map { "--overlay=\($0)" } ?? "--overlay") }
        add("overlay-dir", overlayFolder)
        return words
    }

    /// Where writes go if not to the image.
    var overlay: DiskOverlay? {
        guard hasOverlay else { return nil }
        if let overlayFile { return .file(overlayFile) }
        return .temporary(folder: overlayFolder ?? "/var/tmp")
    }

    /// The permission bits of `disk.raw`: the owner's alone, unless a umask says otherwise.
    var mode: UInt32 {
        guard let umask else { return isWritable ? 0o600 : 0o400 }
        return (isWritable ? 0o666 : 0o444) & ~umask
    }
}
