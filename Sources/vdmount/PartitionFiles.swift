import DiskPartitions
import DiskStorage
import Dispatch
import FuseHost
import Glibc
import Logging
import VirtualDisk

/// Keeps the files beside `disk.raw` as the partition table says: `part1.raw`, … and `info.json`.
// Sendable: what changes does so on the queue alone.
final class PartitionFiles: @unchecked Sendable {
    private let disk: Disk
    private let request: MountRequest
    private let logger: Logger
    private let queue = DispatchQueue(label: "vdmount.partitions", qos: .utility)
    private let report: @Sendable (String, DiskError) -> Void
    private var views: DiskViews?
    private var session: MountSession?
    private var files: [DiskFile] = []
    private var table: PartitionTable?
    private var information: InformationFile?

    /// `disk.raw`.
    private(set) var whole: DiskFile?

    init(_ disk: Disk, _ request: MountRequest, _ logger: Logger) {
        self.disk = disk
        self.request = request
        self.logger = logger
        report = { [logger] doing, error in logger.error("\(doing): \(error)") }
    }

    /// The file of the whole disk, to be mounted.
    func makeWhole() -> DiskFile {
        let views = DiskViews(
            size: disk.size, say: { [logger] in logger.warning("\($0)") },
            tableChanged: { [weak self] in self?.readAgain() })
        let file = makeFile(nil, views)
        self.views = views
        whole = file
        return file
    }

    private func makeFile(_ partition: Partition?, _ views: DiskViews) -> DiskFile {
        DiskFile(
            disk, partition: partition, of: whole, views: views, mode: request.mode, owner: request.owner ?? geteuid(),
            group: request.group ?? getegid(), report: report)
    }

    /// Reads the table for the first time and lists its partitions in the mounted folder; a warning for the user.
    func begin(_ session: MountSession) -> String? {
        queue.sync {
            self.session = session
            return read()
        }
    }

    /// No file comes or goes any more.
    func end() { queue.sync { session = nil } }

    /// When fsync(2) or close(2) of what wrote the table returns, its files are there.
    private func readAgain() {
        queue.sync {
            if let warning = read() { logger.warning("\(warning)") }
        }
    }

    /// Reads the table, and if it is another one than before changes the files: a warning, if it is new.
    private func read() -> String? {
        guard let session, let views, let whole else { return nil }
        let found: PartitionTable
        do throws(DiskError) {
            found = try PartitionTable.read(from: disk)
        } catch {
            return "the partition table cannot be read: \(error)"
        }
        // A chain of boot records lies anywhere: then every write counts.
        views.watchesEverything = found.areas.contains { $0.lowerBound > DiskViews.margin }
        guard table.map({ $0 != found }) ?? true else { return nil }
        let warning = found.warning == table?.warning ? nil : found.warning
        table = found
        files = found.partitions.map { partition in
            files.first { $0.partition == partition } ?? makeFile(partition, views)
        }
        let information = self.information ?? InformationFile(disk, found, like: whole)
        information.table = found
        self.information = information
        session.list([whole] + files + [information])
        return warning
    }
}
