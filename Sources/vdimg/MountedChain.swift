import CommandSupport
import DiskStorage
import FuseHost
import Glibc
import VirtualDisk

/// A chain of images that a daemon of `vdmount` serves, and changes when it is asked to.
struct MountedChain {
    let daemon: DaemonAddress
    let chain: ChainDescription

    // MARK: - Finding

    /// The mounted disks that a file is an image of, or was until a merge made it superfluous. Names do not count.
    ///
    /// ``DiskError/Kind/unsupported`` if one of them is served by a version that changes no chains.
    static func all(with path: String) throws(DiskError) -> [MountedChain] {
        guard let file = file(at: path) else { return [] }
        var found: [MountedChain] = []
        for daemon in DaemonAddress.all() {
            switch daemon.ask("chain") {
            case .none: continue
            case .text(let text):
                guard let chain = jsonValue(ChainDescription.self, from: text) else { continue }
                let isIn =
                    chain.images.contains { $0.file == file } || chain.overlay?.file == file
                    || chain.leftovers.contains { $0.files.contains(file) }
                if isIn { found.append(MountedChain(daemon: daemon, chain: chain)) }
            case .unknown:
                guard serves(daemon, file) else { continue }
                throw DiskError(
                    .unsupported,
                    "is mounted at \(daemon.mountpoint) by another version of vdmount, which does not change its "
                        + "images: unmount it first ('vdumount \(daemon.mountpoint)')", image: path)
            }
        }
        return found
    }

    /// The mounted disk that has the image on top; nil: the image is in no mounted disk's chain.
    ///
    /// ``DiskError/Kind/locked`` where it is not the top one, or several have it; ``DiskError/Kind/unsupported`` where
    /// it is an overlay.
    static func withTop(_ path: String) throws(DiskError) -> MountedChain? {
        let all = try all(with: path)
        if let mounted = all.first(where: { $0.isOverlay(path) }) {
            throw DiskError(
                .unsupported,
                "is the overlay of the disk that is mounted at \(mounted.daemon.mountpoint), and keeps the images "
                    + "below it as they are: those can be merged with one another (name their top image, "
                    + "\(mounted.chain.images[0].path)), the overlay when it is unmounted "
                    + "('vdumount \(mounted.daemon.mountpoint)')", image: path)
        }
        return try theOnlyOne(all.filter { $0.number(of: path) != nil }, path)
    }

    private static func theOnlyOne(_ all: [MountedChain], _ path: String) throws(DiskError) -> MountedChain? {
        guard let first = all.first else { return nil }
        guard all.count == 1 else {
            let places = all.map(\.daemon.mountpoint).joined(separator: ", ")
            throw DiskError(.locked, "is mounted more than once, at \(places): unmount all but one", image: path)
        }
        if let number = first.number(of: path), number > 0 {
            throw DiskError(
                .locked,
                "is image \(number) of the disk that is mounted at \(first.daemon.mountpoint): name its top image, "
                    + first.chain.images[0].path, image: path)
        }
        return first
    }

    /// The number of a file among the images.
    func number(of path: String) -> Int? {
        guard let file = Self.file(at: path) else { return nil }
        return chain.images.firstIndex { $0.file == file }
    }

    /// Whether a file is the overlay.
    func isOverlay(_ path: String) -> Bool {
        guard let file = Self.file(at: path) else { return false }
        return chain.overlay?.file == file
    }

    /// Which file is at a path.
    static func file(at path: String) -> ChainDescription.File? {
        var status = stat()
        guard unsafe stat(path, &status) == 0 else { return nil }
        return .init(device: UInt64(status.st_dev), inode: UInt64(status.st_ino))
    }

    /// What every version says of its images.
    private struct Status: Decodable {
        struct Image: Decodable { var path: String }
        var images: [Image]
    }

    private static func serves(_ daemon: DaemonAddress, _ file: ChainDescription.File) -> Bool {
        guard case .text(let text) = daemon.ask("status"), let status = jsonValue(Status.self, from: text) else {
            return false
        }
        return status.images.contains { Self.file(at: $0.path) == file }
    }

    // MARK: - Preparing

    /// Throws why the chain cannot be changed while it is mounted.
    func expectChangeable() throws(DiskError) {
        guard let obstacle = chain.obstacle else { return }
        throw inUse(obstacle)
    }

    /// Throws where no image can be put on top: an overlay is there.
    func expectNoOverlay() throws(DiskError) {
        guard let overlay = chain.overlay else { return }
        throw inUse(
            "what is written there goes to an overlay (\(overlay.path)), which a snapshot of its image would not hold: "
                + "unmount it; 'vdimg create --parent' makes an image over this one without that")
    }

    private func inUse(_ reason: String) -> DiskError {
        DiskError(
            .unsupported,
            "is mounted at \(daemon.mountpoint), and \(reason) ('vdumount \(daemon.mountpoint)')",
            image: chain.images.first?.path ?? daemon.image)
    }

    /// Throws if the images that are found here are not those that are mounted, by identity and by path: what is
    /// recorded of a parent leads to where the daemon knows it.
    func expectSame(_ images: [(path: String, identity: FileIdentity)]) throws(DiskError) {
        for (number, image) in images.enumerated() where number < chain.images.count {
            let mounted = chain.images[number]
            let file = ChainDescription.File(device: image.identity.device, inode: image.identity.inode)
            guard mounted.file == file, mounted.path == image.path else {
                throw inUse(
                    "its image \(number) was \(mounted.path) when it was opened, and is \(image.path) now: unmount it")
            }
        }
        guard images.count == chain.images.count else {
            throw inUse("\(chain.images.count) images are open, where \(images.count) are found now: unmount it")
        }
    }

    /// Goes on as the user whose daemon it is: nothing is opened for it, or done in its name, that its user could not
    /// do himself.
    func becomeOwner() throws(DiskError) {
        let owner = daemon.owner
        guard owner != geteuid() else { return }
        guard let entry = unsafe getpwuid(owner) else {
            throw inUse("belongs to user \(owner), who is not known here: let that user do it, or unmount it")
        }
        let group = unsafe entry.pointee.pw_gid
        guard unsafe initgroups(entry.pointee.pw_name, group) == 0, setgid(group) == 0,
            setuid(owner) == 0
        else { throw .system(errno, "go on as user \(owner), who mounted it", image: daemon.mountpoint) }
    }

    // MARK: - Orders

    /// Gives an order; what belongs to it is sent and received over the connection.
    func begin(_ order: String) throws(DiskError) -> ControlConnection {
        guard let connection = daemon.begin(order) else { throw ended }
        return connection
    }

    /// That the daemon has ended without an answer: nobody knows whether it was done.
    var ended: DiskError {
        DiskError(
            .system,
            "process \(daemon.pid), which serves it, ended before it was done: unmount it, mount it again, and repeat "
                + "the command", image: daemon.mountpoint)
    }

    /// What came back for an order.
    enum Answer {
        /// The rest of the line that was waited for.
        case words([String])
        /// It was not done.
        case failed(DiskError)
        /// The daemon has ended.
        case ended
    }

    /// Replaces the content of a file for the daemon.
    typealias Replacement = (FileIdentity, [UInt8], Bool) throws(DiskError) -> PassableFile

    /// Waits for a line that begins so, and answers what follows.
    func wait(
        for word: String, _ connection: ControlConnection, _ control: OperationControl,
        replacement: Replacement? = nil
    ) throws(DiskError) -> [String] {
        switch answer(word, connection, control, replacement) {
        case .words(let words): return words
        case .failed(let error): throw error
        case .ended: throw ended
        }
    }

    /// The same; shows progress, and passes a cancellation on.
    func answer(
        _ word: String, _ connection: ControlConnection, _ control: OperationControl, _ replacement: Replacement? = nil
    ) -> Answer {
        var phase = ""
        var isTold = false
        while true {
            if control.isCancelled, !isTold {
                isTold = true
                connection.endSending()
            }
            let line: String
            switch connection.line(within: 100) {
            case .late: continue
            case .ended: return .ended
            case .text(let text): line = text
            }
            let words = line.split(separator: " ").map(String.init)
            switch (words.first, words.count) {
            case (word, _): return .words(Array(words.dropFirst()))
            case ("progress", 4):
                guard let done = UInt64(words[2]), let total = UInt64(words[3]) else { continue }
                if words[1] != phase {
                    phase = words[1]
                    control.begin(OctalText.decode(phase.utf8), total: total)
                }
                control.advance(to: done)
            case ("replace", 5):
                // After a cancellation nothing can be answered any more: the daemon gives up.
                guard !isTold else { continue }
                guard let replacement, replace(words, connection, replacement) else { return .ended }
            case ("error", 4): return .failed(error(words))
            default: if !isTold { return .ended }
            }
        }
    }

    private func replace(_ words: [String], _ connection: ControlConnection, _ replacement: Replacement) -> Bool {
        guard let device = UInt64(words[1]), let inode = UInt64(words[2]), let count = Int(words[4]),
            (0...4 << 20).contains(count)
        else { return false }
        var bytes: [UInt8] = []
        while bytes.count < count {
            guard case .text(let line) = connection.line(within: 5000),
                let part = ChainDescription.bytes(ofHexLine: line), !part.isEmpty
            else { return false }
            bytes += part
        }
        do throws(DiskError) {
            let file = try replacement(FileIdentity(device: device, inode: inode), bytes, words[3] == "locked")
            return connection.send("file\n", descriptors: file.descriptors)
        } catch {
            return connection.send("failed \(OctalText.encode("\(error)"))\n")
        }
    }

    private func error(_ words: [String]) -> DiskError {
        let image = words[2] == "-" ? chain.images.first?.path : OctalText.decode(words[2].utf8)
        let kind = DiskError.Kind(rawValue: words[1]) ?? .system
        let message = OctalText.decode(words[3].utf8)
        guard kind == .unsupported else { return DiskError(kind, message, image: image) }
        return DiskError(
            kind, "\(message) (mounted at \(daemon.mountpoint): 'vdumount \(daemon.mountpoint)')", image: image)
    }

    /// Says that the files of a merge are removed.
    func forget(_ number: Int) { _ = daemon.ask("forget \(number)") }
}
