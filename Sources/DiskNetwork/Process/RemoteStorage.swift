internal import DiskStorage
internal import Glibc

/// A storage that another process has opened; see ``StorageProcess``.
final class RemoteStorage: Storage {
    let traits: StorageTraits
    let name: String
    private let process: StorageProcess
    private let number: UInt32
    private let size: UInt64

    init(_ process: StorageProcess, number: UInt32, name: String, length: UInt64, _ traits: StorageTraits) {
        self.process = process
        self.number = number
        self.name = name
        size = length
        self.traits = traits
    }

    private func message(
        _ request: StorageMessage.Request, _ offset: UInt64 = 0, _ length: UInt64 = 0
    ) -> StorageMessage {
        var message = StorageMessage(request)
        message.storage = number
        message.offset = offset
        message.length = length
        return message
    }

    func length() -> UInt64 { size }

    func read(into buffer: IOBuffer, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) -> Int {
        guard offset < size else { return 0 }
        let wanted = Int(min(UInt64(buffer.count), size - offset))
        var done = 0
        while done < wanted {
            let piece = buffer.slice(done, min(wanted - done, StorageMessage.limit))
            let question = message(.read, offset + UInt64(done), UInt64(piece.count))
            var count = 0
            try process.exchange(question, buffer.slice(0, 0).readOnly) { (answer, socket) throws(DiskError) in
                guard answer.byteCount <= piece.count,
                    StorageMessage.receive(piece.slice(0, answer.byteCount), from: socket)
                else { throw StorageProcess.isGone }
                count = answer.byteCount
            }
            // What was asked for lies inside: bytes that are not there must not be taken for zeros.
            guard count == piece.count else {
                throw .system(EIO, "read \(piece.count) bytes: \(count) came", image: name, offset: question.offset)
            }
            done += count
        }
        return done
    }

    func write(_ bytes: IOBytes, at offset: UInt64, for purpose: StoragePurpose) throws(DiskError) {
        guard traits.isWritable else { throw .system(EROFS, "write", image: name) }
        guard !offset.addingReportingOverflow(UInt64(bytes.count)).overflow else {
            throw .system(EFBIG, "write \(bytes.count) bytes", image: name, offset: offset)
        }
        var done = 0
        while done < bytes.count {
            let piece = bytes.slice(done, min(bytes.count - done, StorageMessage.limit))
            try process.exchange(message(.write, offset + UInt64(done)), piece, ignoreAnswer)
            done += piece.count
        }
    }

    private func ignoreAnswer(_ answer: StorageMessage, _ socket: Int32) throws(DiskError) {
        guard answer.byteCount == 0 else { throw StorageProcess.isGone }
    }

    func discard(_ range: Range<UInt64>, mustZero: Bool, for purpose: StoragePurpose) throws(DiskError) {
        guard traits.isWritable else { throw .system(EROFS, "discard", image: name) }
        var question = message(.discard, range.lowerBound, range.upperBound - range.lowerBound)
        question.flag = mustZero
        _ = try process.ask(question, [])
    }

    func setLength(_ length: UInt64) throws(DiskError) { _ = try process.ask(message(.setLength, 0, length), []) }

    func flush() throws(DiskError) {
        guard traits.isWritable else { return }
        _ = try process.ask(message(.flush), [])
    }

    func allocatedBytes() -> UInt64 { size }

    func nextData(from offset: UInt64) throws(DiskError) -> Range<UInt64>? {
        guard offset < size else { return nil }
        let answer = try process.ask(message(.nextData, offset), []).0
        guard answer.flag else { return nil }
        // What makes no sense is no reason to miss data.
        guard answer.offset >= offset, answer.offset < size, answer.length > 0, answer.length <= size - answer.offset
        else { return offset..<size }
        return answer.offset..<answer.offset + answer.length
    }
}
