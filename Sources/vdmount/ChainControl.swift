import CommandSupport
import DiskStorage
import Dispatch
import FuseHost
import Glibc
import Logging
import VirtualDisk

/// Changes the chain of the mounted disk for `vdimg`, which asks for it over the control socket and passes the files
/// that it takes (``ChainDescription``): this process opens none any more.
///
/// One change at a time, on a thread of its own, so that questions are answered meanwhile.
// Sendable: constants and what is behind the lock.
final class ChainControl: Sendable {
    /// How long the next line of an order may take, in milliseconds.
    private static let patience = 5_000
    /// How long `vdimg` may take to make a new image, while requests wait.
    private static let creationPatience = 15_000

    private struct State {
        var generation = 0
        var isEnding = false
        /// What is being done.
        var connection: ControlConnection?
        var control: OperationControl?
        var leftovers: [Leftover] = []
    }

    /// Files of a merge that may still be there. They are kept open, so that no other file gets their identity.
    private struct Leftover {
        let number: Int
        let files: [FileIdentity]
        let descriptors: [Int32]
    }

    private let disk: Disk
    private let passed: PassedFiles
    private let logger: Logger
    private let state = Locked(State())
    private let session = Locked<MountSession?>(nil)
    private let queue = DispatchQueue(label: "vdmount.chain", qos: .utility)

    init(_ disk: Disk, _ passed: PassedFiles, _ logger: Logger) {
        self.disk = disk
        self.passed = passed
        self.logger = logger
    }

    /// The mount whose record says which image is on top.
    func begin(_ session: MountSession) { self.session.withLock { $0 = session } }

    /// Stops what is being done, and waits for that; nothing is begun any more.
    func end() {
        let current = state.withLock { state in
            state.isEnding = true
            return (state.connection, state.control)
        }
        current.1?.cancel()
        current.0?.end()
        queue.sync {}
        session.withLock { $0 = nil }
    }

    // MARK: - Questions and orders

    func answer(_ line: String, _ connection: ControlConnection) -> ControlAnswer {
        let words = line.split(separator: " ").map(String.init)
        switch words.first {
        case "chain": return (try? jsonText(description)).map { .text($0) } ?? .unknown
        case "forget":
            forget(words)
            return .text("")
        case "merge": return take(connection) { () throws(DiskError) in try self.merge(words, connection) }
        case "snapshot": return take(connection) { () throws(DiskError) in try self.snapshot(words, connection) }
        default: return .unknown
        }
    }

    private var description: ChainDescription {
        func file(_ identity: FileIdentity) -> ChainDescription.File {
            .init(device: identity.device, inode: identity.inode)
        }
        func image(_ image: Disk.OpenImage) -> ChainDescription.Image {
            .init(path: image.path, format: image.format, file: image.files.first.map(file))
        }
        let (generation, leftovers) = state.withLock { ($0.generation, $0.leftovers) }
        var obstacle: String?
        do throws(DiskError) { try disk.expectChangeable() } catch { obstacle = error.message }
        return ChainDescription(
            generation: generation, isWritable: disk.isWritable, size: disk.size,
            images: disk.openImages.map(image), overlay: disk.openOverlay.map(image),
            leftovers: leftovers.map { .init(number: $0.number, files: $0.files.map(file)) }, obstacle: obstacle)
    }

    private func forget(_ words: [String]) {
        guard words.count == 2, let number = Int(words[1]) else { return }
        let gone = state.withLock { state in
            defer { state.leftovers.removeAll { $0.number == number } }
            return state.leftovers.filter { $0.number == number }
        }
        for descriptor in gone.flatMap(\.descriptors) { close(descriptor) }
    }

    /// Has an order carried out on the thread for that, unless there is one already.
    private func take(
        _ connection: ControlConnection, _ body: @escaping @Sendable () throws(DiskError) -> Void
    ) -> ControlAnswer {
        let isFree = state.withLock { state in
            guard !state.isEnding, state.connection == nil else { return false }
            state.connection = connection
            return true
        }
        guard isFree else {
            report(DiskError(.locked, "another change of the mounted disk is under way: try again"), to: connection)
            return .taken
        }
        queue.async { [self] in
            do throws(DiskError) { try body() } catch {
                logger.warning("not done: \(error)")
                report(error, to: connection)
            }
            passed.forget()
            state.withLock { state in
                state.connection = nil
                state.control = nil
            }
        }
        return .taken
    }

    private func report(_ error: DiskError, to connection: ControlConnection) {
        let words = [error.kind.rawValue, error.image ?? "", error.message].map { text in
            text.isEmpty ? "-" : OctalText.encode(text)
        }
        connection.send("error \(words.joined(separator: " "))\n")
    }

    // MARK: - Files

    /// What came with an order.
    private struct Received {
        /// The new image.
        var image: (format: String, path: String)?
        /// Files that are not needed afterwards.
        var gone: [(identity: FileIdentity, descriptor: Int32)] = []

        func close() { for file in gone { Glibc.close(file.descriptor) } }
    }

    /// Takes files until `go` comes: those of the chain, of a new image if there may be one, and the superfluous ones.
    private func receive(
        _ connection: ControlConnection, takesImage: Bool, superfluous: Set<FileIdentity>
    ) throws(DiskError) -> Received {
        let own = Set(disk.openImages.flatMap(\.files))
        var received = Received()
        var patience = takesImage ? Self.creationPatience : Self.patience
        let end = ContinuousClock.now + .milliseconds(Self.creationPatience + Self.patience)
        do throws(DiskError) {
            while true {
                guard ContinuousClock.now < end else { throw DiskError(.cancelled, "vdimg takes too long") }
                guard case .text(let line) = connection.line(within: patience) else {
                    throw DiskError(.cancelled, "vdimg ended before it had said all")
                }
                patience = Self.patience
                let words = line.split(separator: " ").map(String.init)
                switch (words.first, words.count) {
                case ("file", 1): try takeFiles(connection, of: own)
                case ("gone", 1): try takeGone(connection, superfluous, &received)
                case ("image", 3) where takesImage && received.image == nil:
                    let path = OctalText.decode(words[2].utf8)
                    received.image = (OctalText.decode(words[1].utf8), path)
                    try takeNewFile(connection, at: path, nil, of: nil, own)
                case ("companion", 3):
                    guard let image = received.image else { throw Self.misunderstood(line) }
                    let name = OctalText.decode(words[1].utf8)
                    try takeNewFile(
                        connection, at: OctalText.decode(words[2].utf8), name, of: image.path, own)
                case ("go", 1):
                    try expectNoDescriptors(connection)
                    return received
                default: throw Self.misunderstood(line)
                }
            }
        } catch {
            received.close()
            throw error
        }
    }

    private static func misunderstood(_ line: String) -> DiskError {
        DiskError(.invalidArgument, "the mounted disk's process does not understand '\(line.printable(limit: 100))'")
    }

    /// Descriptors that no line is for.
    private func expectNoDescriptors(_ connection: ControlConnection) throws(DiskError) {
        let left = connection.takeDescriptors()
        for descriptor in left { close(descriptor) }
        guard left.isEmpty else { throw DiskError(.invalidArgument, "\(left.count) files too many were passed") }
    }

    /// Takes the descriptors that came with a line; all of them must be of one of these files.
    private func takeFiles(_ connection: ControlConnection, of files: Set<FileIdentity>) throws(DiskError) {
        var left = connection.takeDescriptors()
        defer { for descriptor in left { close(descriptor) } }
        guard (1...2 * PassedFiles.openings).contains(left.count) else {
            throw DiskError(.invalidArgument, "a file is not passed by \(left.count) descriptors")
        }
        while let descriptor = left.first {
            guard files.contains(try PassedFiles.examine(descriptor).identity) else {
                throw DiskError(.refused, "a file was passed that is none of the mounted disk's")
            }
            left.removeFirst()
            try passed.take(descriptor)
        }
    }

    private func takeGone(
        _ connection: ControlConnection, _ superfluous: Set<FileIdentity>, _ received: inout Received
    ) throws(DiskError) {
        let descriptors = connection.takeDescriptors()
        guard descriptors.count == 1, let identity = try? PassedFiles.examine(descriptors[0]).identity,
            superfluous.contains(identity), !received.gone.contains(where: { $0.identity == identity })
        else {
            for descriptor in descriptors { close(descriptor) }
            throw DiskError(.refused, "a file was passed that the merge does not make superfluous")
        }
        received.gone.append((identity, descriptors[0]))
    }

    /// Takes a file of a new image: the descriptors come with the next line.
    private func takeNewFile(
        _ connection: ControlConnection, at path: String, _ name: String?, of image: String?, _ own: Set<FileIdentity>
    ) throws(DiskError) {
        guard case .text("file") = connection.line(within: Self.patience) else {
            throw DiskError(.invalidArgument, "a file of the new image was not passed", image: path)
        }
        var left = connection.takeDescriptors()
        defer { for descriptor in left { close(descriptor) } }
        guard let first = left.first else {
            throw DiskError(.invalidArgument, "a file of the new image was not passed", image: path)
        }
        let identity = try PassedFiles.examine(first).identity
        for descriptor in left {
            guard try PassedFiles.examine(descriptor).identity == identity else {
                throw DiskError(.refused, "several files were passed in the place of one", image: path)
            }
        }
        guard !own.contains(identity), !passed.hasOpen(identity), passed.identity(of: path) == nil else {
            throw DiskError(.refused, "is no new file", image: path)
        }
        while let descriptor = left.popLast() { try passed.take(descriptor) }
        passed.introduce(identity, at: path, as: name, of: image)
    }

    // MARK: - Changes

    private func expectGeneration(_ word: String) throws(DiskError) {
        guard Int(word) == state.withLock({ $0.generation }) else {
            throw DiskError(.brokenLink, "the mounted disk's images were changed meanwhile: try again")
        }
    }

    private func merge(_ words: [String], _ connection: ControlConnection) throws(DiskError) {
        let images = disk.openImages
        guard words.count == 5, let source = Int(words[2]), let target = Int(words[3]),
            images.indices.contains(source), images.indices.contains(target), source != target
        else { throw Self.misunderstood(words.joined(separator: " ")) }
        try expectGeneration(words[1])
        try disk.expectChangeable()
        let goers = source < target ? source..<target : target + 1..<source + 1
        let staying = Set((images[..<goers.lowerBound] + images[goers.upperBound...]).flatMap(\.files))
        let received = try receive(
            connection, takesImage: false, superfluous: Set(images[goers].flatMap(\.files)).subtracting(staying))
        let removes = words[4] == "remove"
        // The numbers are those of the images; an overlay is one more layer.
        let top = disk.topImage
        // Over a target that is written to from now on, these would show what the disk never did.
        let empties = removes && source == 0 && disk.isWritable && top == 0
        let progress = ProgressLines(connection)
        let control = OperationControl { progress.show($0) }
        let isEnding = state.withLock { state in
            state.control = control
            return state.isEnding
        }
        if isEnding { control.cancel() }
        let watch = connection.watch { control.cancel() }
        defer { watch.end() }
        passed.replacer = { (file, bytes, isLocked) throws(DiskError) in
            try Self.replace(file, bytes, isLocked, by: connection)
        }
        defer { passed.replacer = nil }
        logger.info("merging \(images[source].path) into \(images[target].path)")
        do throws(DiskError) {
            _ = try disk.merge(source + top, into: target + top, keepsFiles: true, control: control) {
                if empties { for file in received.gone { Self.empty(file.descriptor) } }
            }
        } catch {
            received.close()
            throw error
        }
        let number = noteChange(removes ? received : nil)
        if !removes { received.close() }
        connection.send("done \(number)\n")
        logger.notice("\(images[source].path) was merged into \(images[target].path)")
    }

    /// Has `vdimg` replace a file, while requests wait; the descriptors of the new one.
    private static func replace(
        _ file: FileIdentity, _ bytes: [UInt8], _ isLocked: Bool, by connection: ControlConnection
    ) throws(DiskError) -> [Int32] {
        var text = "replace \(file.device) \(file.inode) \(isLocked ? "locked" : "open") \(bytes.count)\n"
        for line in ChainDescription.hexLines(bytes) { text += line + "\n" }
        guard connection.send(text), case .text(let answer) = connection.line(within: patience) else {
            throw DiskError(.cancelled, "vdimg ended before a file was replaced")
        }
        let descriptors = connection.takeDescriptors()
        guard answer == "file" else {
            for descriptor in descriptors { close(descriptor) }
            let reason = answer.split(separator: " ").dropFirst().first.map { OctalText.decode($0.utf8) }
            throw DiskError(.system, reason ?? "a file was not replaced")
        }
        return descriptors
    }

    /// Makes a file that is about to be removed one that nobody takes for an image, durably; not if it has other names.
    private static func empty(_ descriptor: Int32) {
        var status = stat()
        guard unsafe fstat(descriptor, &status) == 0, status.st_mode & S_IFMT == S_IFREG, status.st_nlink == 1,
            ftruncate(descriptor, 0) == 0
        else { return }
        fsync(descriptor)
    }

    /// The chain is another one now; answers its number.
    private func noteChange(_ received: Received?) -> Int {
        if let top = disk.openImages.first?.path { session.withLock { $0?.note(image: top) } }
        return state.withLock { state in
            state.generation += 1
            if let received, !received.gone.isEmpty {
                state.leftovers.append(
                    Leftover(
                        number: state.generation, files: received.gone.map(\.identity),
                        descriptors: received.gone.map(\.descriptor)))
            }
            return state.generation
        }
    }

    private func snapshot(_ words: [String], _ connection: ControlConnection) throws(DiskError) {
        guard words.count == 2 else { throw Self.misunderstood(words.joined(separator: " ")) }
        try expectGeneration(words[1])
        try disk.expectChangeable(bySnapshot: true)
        var received = Received()
        try disk.whileWaiting { () throws(DiskError) in
            guard connection.send("ready\n") else { throw DiskError(.cancelled, "vdimg ended") }
            received = try receive(connection, takesImage: true, superfluous: [])
        }
        guard let image = received.image else { throw DiskError(.invalidArgument, "no new image was passed") }
        try disk.push(image.path, format: image.format)
        connection.send("done \(noteChange(nil))\n")
        logger.notice("\(image.path) is the disk's top image now")
    }
}

/// Tells who waits how far it is, a few times a second.
private final class ProgressLines: Sendable {
    private let connection: ControlConnection
    private let last = Locked((phase: "", time: ContinuousClock.now))

    init(_ connection: ControlConnection) { self.connection = connection }

    func show(_ progress: OperationProgress) {
        let isDue = last.withLock { last in
            let now = ContinuousClock.now
            guard progress.phase != last.phase || progress.done == progress.total || now - last.time > .milliseconds(50)
            else { return false }
            last = (progress.phase, now)
            return true
        }
        guard isDue else { return }
        // Who has gone is noticed elsewhere.
        _ = connection.offer("progress \(OctalText.encode(progress.phase)) \(progress.done) \(progress.total)\n")
    }
}
