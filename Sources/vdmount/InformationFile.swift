import CommandSupport
import DiskPartitions
import FuseHost
import Synchronization
import VirtualDisk

/// `info.json`: says what is on the disk when it is opened. File systems come without a change of the partition table,
/// so its text is made anew each time; who has it open meanwhile keeps what is there.
// Sendable: what changes is behind the lock.
final class InformationFile: ExposedFile, @unchecked Sendable {
    private struct State {
        var table: PartitionTable
        var text: [UInt8]
        var readers = 0
    }

    private let disk: Disk
    private let state: Mutex<State>

    /// The partitions as they were read last.
    var table: PartitionTable {
        get { state.withLock { $0.table } }
        set { state.withLock { $0.table = newValue } }
    }

    /// With owner and readers of the disk's file.
    init(_ disk: Disk, _ table: PartitionTable, like whole: ExposedFile) {
        self.disk = disk
        let text = Self.text(disk, table)
        state = Mutex(State(table: table, text: text))
        super.init(
            name: "info.json", size: UInt64(text.count), isWritable: false, mode: whole.mode & 0o444,
            owner: whole.owner, group: whole.group, modified: whole.modified, isStable: false)
    }

    private static func text(_ disk: Disk, _ table: PartitionTable) -> [UInt8] {
        Array(((try? jsonText(DiskInformation(disk, table))) ?? "{}").utf8) + Array("\n".utf8)
    }

    override func opened(forWriting: Bool) -> OpenResult {
        // The disk is read without the lock.
        let text = Self.text(disk, table)
        state.withLock { state in
            if state.readers == 0 {
                state.text = text
                resize(to: UInt64(text.count))
            }
            state.readers += 1
        }
        return .opened(keepsCache: false)
    }

    override func closed(forWriting: Bool) { state.withLock { $0.readers -= 1 } }

    override func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) -> Int32 {
        // The range lies inside the file, whose size does not change while somebody has it open.
        state.withLock { state in
            unsafe buffer.copyBytes(from: state.text[Int(offset)..<Int(offset) + buffer.count])
        }
        return 0
    }
}
