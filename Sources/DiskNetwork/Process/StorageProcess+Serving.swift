internal import DiskStorage
internal import Glibc

extension StorageProcess {
    /// Whether a command line is the one by which ``start(options:allowedAddresses:channels:)`` runs its program.
    public static func isMeant(by arguments: [String]) -> Bool { arguments.dropFirst().first == word }

    /// Opens storages for the process that started this one, until that has ended.
    ///
    /// - Parameters:
    ///   - arguments: The command line.
    ///   - confine: Called once, before there are threads, with the files that storages may have to read: gives up what
    ///     is not needed.
    public static func serve(_ arguments: [String], confine: (_ files: [String]) -> Void) -> Never {
        guard arguments.count == 3, let count = Int(arguments[2]), (1...mostChannels).contains(count) else { _exit(64) }
        signal(SIGPIPE, SIG_IGN)
        closeOthers(from: firstChannel + Int32(count))
        let server = StorageServer()
        guard server.configure(from: firstChannel, confine) else { _exit(1) }
        try? WorkerThreads.run(count) { (number, _) throws(DiskError) in
            server.serve(firstChannel + Int32(number))
            // The other process is gone. What still waits for a server does not wait long.
            alarm(20)
        }
        server.close()
        _exit(0)
    }
}

/// Closes what the other process has open for its own use: a lock or a pipe that is kept here would not end with it.
private func closeOthers(from first: Int32) {
    var open: [Int32] = []
    if let folder = unsafe opendir("/proc/self/fd") {
        while let entry = unsafe readdir(folder) {
            let name = unsafe withUnsafeBytes(of: &entry.pointee.d_name) { bytes in
                unsafe String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
            }
            if let number = Int32(name), number >= first { open.append(number) }
        }
        unsafe closedir(folder)
    }
    for descriptor in open { close(descriptor) }
}

/// Answers on all channels.
private final class StorageServer: Sendable {
    private struct State {
        var provider: NetworkStorages?
        var storages: [any Storage] = []
    }

    private let state = Locked(State())

    /// Takes the first message; false if it is none.
    func configure(from socket: Int32, _ confine: ([String]) -> Void) -> Bool {
        guard let message = StorageMessage(from: socket), message.code == StorageMessage.Request.configure.rawValue,
            let bytes = message.bytes(from: socket)
        else { return false }
        let options = StorageMessage.words(bytes, atMost: .max).filter { !$0.isEmpty }
        do throws(DiskError) {
            let provider = try NetworkStorages(options: options)
            let settings = try StorageSettings(options)
            state.withLock { $0.provider = provider }
            confine([settings.certificateFile, settings.certificateFolder, settings.sharedKeyFile].compactMap { $0 })
            return answer(StorageMessage(), [], to: socket)
        } catch {
            _ = answer(error, to: socket)
            return false
        }
    }

    /// Ends all connections.
    func close() {
        state.withLock { state in
            state.storages = []
            state.provider = nil
        }
    }

    /// Answers what comes on a socket, until the other side closes it.
    func serve(_ socket: Int32) {
        // Says that somebody is here.
        guard StorageMessage().send(nil, to: socket) else { return }
        var memory = [UInt8](repeating: 0, count: StorageMessage.limit)
        while let message = StorageMessage(from: socket) {
            guard let request = StorageMessage.Request(rawValue: message.code) else { return }
            let isAnswered: Bool
            do throws(DiskError) {
                isAnswered = try memory.withIOBuffer { (buffer) throws(DiskError) in
                    let input = buffer.slice(0, message.byteCount)
                    guard StorageMessage.receive(input, from: socket) else { return false }
                    return try answer(request, message, buffer, to: socket)
                }
            } catch {
                isAnswered = answer(error, to: socket)
            }
            guard isAnswered else { return }
        }
    }

    private func answer(_ error: DiskError, to socket: Int32) -> Bool {
        var message = StorageMessage()
        message.code = 1
        return answer(message, StorageMessage.bytes(error), to: socket)
    }

    private func answer(_ message: StorageMessage, _ bytes: [UInt8], to socket: Int32) -> Bool {
        var message = message
        message.byteCount = bytes.count
        return (try? bytes.withIOBytes { (bytes) throws(DiskError) in message.send(bytes, to: socket) }) == true
    }

    private func storage(_ number: UInt32) throws(DiskError) -> any Storage {
        let found = state.withLock { $0.storages.indices.contains(Int(number)) ? $0.storages[Int(number)] : nil }
        guard let found else { throw DiskError(.invalidArgument, "there is no storage \(number)") }
        return found
    }

    /// Does what is asked; `buffer` holds the bytes of the question at its front.
    private func answer(
        _ request: StorageMessage.Request, _ message: StorageMessage, _ buffer: IOBuffer, to socket: Int32
    ) throws(DiskError) -> Bool {
        let input = buffer.slice(0, message.byteCount)
        let range =
            message
            .offset..<(message.offset.addingReportingOverflow(message.length).overflow
            ? .max : message.offset + message.length)
        switch request {
        case .configure: throw DiskError(.invalidArgument, "the storages are set up already")
        case .open:
            return answer(
                StorageMessage(), try open(String(decoding: input.readOnly.array, as: UTF8.self), message.flag),
                to: socket)
        case .seal:
            state.withLock { $0.provider = nil }
            unsafe _ = chdir("/")
        case .read:
            let wanted = buffer.slice(0, Int(clamping: min(message.length, UInt64(buffer.count))))
            let count = try storage(message.storage).read(into: wanted, at: message.offset, for: .guestData)
            var reply = StorageMessage()
            reply.byteCount = count
            return reply.send(buffer.slice(0, count).readOnly, to: socket)
        case .write: try storage(message.storage).write(input.readOnly, at: message.offset, for: .guestData)
        case .discard: try storage(message.storage).discard(range, mustZero: message.flag, for: .guestData)
        case .flush: try storage(message.storage).flush()
        case .setLength: try storage(message.storage).setLength(message.length)
        case .nextData:
            var reply = StorageMessage()
            if let data = try storage(message.storage).nextData(from: message.offset) {
                reply.flag = true
                (reply.offset, reply.length) = (data.lowerBound, data.upperBound - data.lowerBound)
            }
            return reply.send(nil, to: socket)
        }
        return StorageMessage().send(nil, to: socket)
    }

    /// Opens an address; the answer's words.
    private func open(_ address: String, _ isWritable: Bool) throws(DiskError) -> [UInt8] {
        guard let provider = state.withLock({ $0.provider }) else {
            throw DiskError(.refused, "no more storages are opened: the disk is served already")
        }
        let provided = try provider.open(address, isWritable: isWritable)
        let storage = provided.storage
        let number = state.withLock { state in
            state.storages.append(storage)
            return state.storages.count - 1
        }
        let traits = storage.traits
        return StorageMessage.bytes([
            String(number), String(try storage.length()), traits.isWritable ? "w" : "r", traits.canDiscard ? "d" : "-",
            traits.hasFixedLength ? "f" : "-", storage.name, provided.version ?? "",
        ])
    }
}
