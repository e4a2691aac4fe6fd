public import DiskStorage

/// Everything that was done to a set of files, in order, so that any moment of it can be brought back.
public final class CrashLog: Sendable {
    /// One change of one file, or the promise that those before it are on stable storage.
    enum Event: Sendable {
        case write(file: Int, offset: UInt64, bytes: [UInt8])
        case setLength(file: Int, length: UInt64)
        case discard(file: Int, range: Range<UInt64>)
        case flush(file: Int)
        /// All bytes become others, in one step.
        case replace(file: Int, bytes: [UInt8])

        var file: Int {
            switch self {
            case .write(let file, _, _), .setLength(let file, _), .discard(let file, _), .flush(let file),
                .replace(let file, _):
                file
            }
        }
    }

    private struct State {
        var names: [String] = []
        var initial: [[UInt8]] = []
        var events: [Event] = []
    }

    private let state = Locked(State())

    public init() {}

    /// How many events there were so far.
    public var count: Int { state.withLock { $0.events.count } }

    /// Wraps a storage so that what is done to it is recorded. A file that was recorded before goes on as it was left.
    public func record(_ storage: any Storage) -> any Storage {
        if let known = state.withLock({ $0.names.firstIndex(of: storage.name) }) {
            return observed(storage, file: known)
        }
        let bytes = (try? storage.length()).flatMap {
            try? storage.availableBytes(at: 0, count: Int($0), for: .header)
        }
        let file = state.withLock { state in
            state.names.append(storage.name)
            state.initial.append(bytes ?? [])
            return state.names.count - 1
        }
        return observed(storage, file: file)
    }

    private func observed(_ storage: any Storage, file: Int) -> any Storage {
        ObservedStorage(
            storage,
            after: { [self] (access) throws(DiskError) in
                if case .flush = access { add(.flush(file: file)) }
                if case .replaceContents = access { add(.flush(file: file)) }
            },
            before: { [self] (access) throws(DiskError) in
                switch access {
                case .write(let offset, let bytes, _): add(.write(file: file, offset: offset, bytes: bytes.array))
                case .discard(let range): add(.discard(file: file, range: range))
                case .setLength(let length): add(.setLength(file: file, length: length))
                case .replaceContents(let bytes): add(.replace(file: file, bytes: bytes))
                case .read, .flush, .startWriteback: break
                }
            })
    }

    private func add(_ event: Event) { state.withLock { $0.events.append(event) } }

    /// The way to bring moments back.
    public func replay() -> CrashReplay {
        state.withLock { CrashReplay(names: $0.names, initial: $0.initial, events: $0.events) }
    }
}

/// Brings back the files of a ``CrashLog`` as a power cut left them, for later and later cuts.
public struct CrashReplay {
    private let names: [String]
    private let events: [CrashLog.Event]
    /// What is on stable storage for certain, and since then by file.
    private var durable: [[UInt8]]
    private var pending: [[CrashLog.Event]]
    private var position = 0

    init(names: [String], initial: [[UInt8]], events: [CrashLog.Event]) {
        self.names = names
        self.events = events
        durable = initial
        pending = Array(repeating: [], count: names.count)
    }

    /// What of the unflushed changes reached the disk.
    public enum CutMode: Sendable {
        case all
        case none
        /// Each sector with this chance in a hundred.
        case some(percent: Int)
    }

    /// The files as they may be found after the power failed just before event `cut`, which is not before the last one
    /// asked for: what was flushed is there; of what was done since, `mode` says what reached the disk.
    public mutating func files(
        at cut: Int, _ mode: CutMode, using generator: inout SeededGenerator
    ) -> [String: [UInt8]] {
        precondition(cut >= position)
        while position < cut {
            let event = events[position]
            if case .flush(let file) = event {
                for change in pending[file] { Self.apply(change, to: &durable[file], .all, &generator) }
                pending[file] = []
            } else {
                pending[event.file].append(event)
            }
            position += 1
        }
        var files = durable
        for file in files.indices {
            for change in pending[file] { Self.apply(change, to: &files[file], mode, &generator) }
        }
        return Dictionary(zip(names, files)) { first, _ in first }
    }

    private static func apply(
        _ event: CrashLog.Event, to file: inout [UInt8], _ mode: CutMode, _ generator: inout SeededGenerator
    ) {
        func happens() -> Bool {
            switch mode {
            case .all: true
            case .none: false
            case .some(let percent): Int(truncatingIfNeeded: generator.next() % 100) < percent
            }
        }
        switch event {
        case .flush: break
        case .replace(_, let bytes): if happens() { file = bytes }
        case .setLength(_, let length):
            if happens() { resize(&file, to: Int(length)) }
        case .discard(_, let range):
            let start = min(file.count, Int(range.lowerBound))
            let range = start..<max(start, min(file.count, Int(range.upperBound)))
            if happens() { file.replaceSubrange(range, with: repeatElement(0, count: range.count)) }
        case .write(_, let offset, let bytes):
            var start = 0
            while start < bytes.count {
                let place = Int(offset) + start
                let count = min(512 - place % 512, bytes.count - start)
                if happens() {
                    if file.count < place + count { resize(&file, to: place + count) }
                    unsafe file.withUnsafeMutableBytes { target in
                        unsafe bytes.withUnsafeBytes { source in
                            unsafe UnsafeMutableRawBufferPointer(rebasing: target[place..<place + count]).copyMemory(
                                from: UnsafeRawBufferPointer(rebasing: source[start..<start + count]))
                        }
                    }
                }
                start += count
            }
        }
    }

    private static func resize(_ file: inout [UInt8], to count: Int) {
        if count < file.count {
            file.removeLast(file.count - count)
        } else {
            file.append(contentsOf: repeatElement(0, count: count - file.count))
        }
    }
}
