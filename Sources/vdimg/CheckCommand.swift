import ArgumentParser
import CommandSupport
import DiskImage
import DiskStorage
import Glibc
import VirtualDisk

/// `vdimg check`: looks for damage in an image's structure, and repairs it.
struct CheckCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "check", abstract: "Look for damage in an image's structure.",
        discussion: """
            Without --repair nothing is changed. --repair makes copies of tables equal again, clears entries that \
            lead nowhere (what they should have led to is lost already) and the mark of an unclean end. It says \
            what it is going to do before it does; --repair --dry-run says so and does nothing.

            EXIT STATUS
              0 nothing is wrong; 2 repair is needed; 3 data is lost that cannot be repaired.
            """)

    @OptionGroup var image: ImageOptions
    @Flag(help: "Repair what can be repaired.") var repair = false
    @Flag(help: "With --repair: say what it would do, and change nothing.") var dryRun = false
    @Flag(help: "Also check the parents (which are never repaired).") var chain = false
    @Flag(help: "Write JSON.") var json = false
    @Argument(help: "The image.", completion: .file()) var path: String

    func validate() throws {
        if dryRun, !repair { throw ValidationError("--dry-run goes with --repair; without, nothing is changed anyway") }
    }

    func run() throws {
        var reports: [(String, CheckReport)] = []
        try reportingErrors { () throws(DiskError) in
            reports.append((path, try checkImage()))
            guard chain else { return }
            let readOnly = image.diskOptions()
            for parent in try ImageInformation.read(path, options: readOnly, wholeChain: true).dropFirst() {
                var options = readOnly
                options.format = parent.format
                reports.append((parent.path, try ImageCheck.run(parent.path, options: options)))
            }
        }
        if json {
            try print(jsonText(reports.map { CheckRecord($0.0, $0.1, isDryRun: dryRun) }))
        } else {
            for (path, report) in reports { show(path, report) }
        }
        let loss = reports.reduce(0) { $0 + ($1.1.counts[.loss] ?? 0) }
        let needed = reports.reduce(0) { $0 + (dryRun ? $1.1.counts[.repairable] ?? 0 : $1.1.remaining(.repairable)) }
        if loss > 0 { throw ExitCode(3) }
        if needed > 0 { throw ExitCode(2) }
    }

    /// Checks the image itself; before a repair comes the same without a change.
    private func checkImage() throws(DiskError) -> CheckReport {
        guard repair else { return try ImageCheck.run(path, options: image.diskOptions()) }
        let folder = unsafe getenv("TMPDIR").map { unsafe String(cString: $0) } ?? "/tmp"
        let planned = try ImageCheck.dryRun(path, options: image.diskOptions(), folder: folder)
        // What needs no repair is not opened for one.
        guard !dryRun, planned.repairedCounts.values.contains(where: { $0 > 0 }) else { return planned }
        if !json {
            for finding in planned.findings where finding.isRepaired {
                print("\(finding.file): to be repaired: \(finding.message)".printable())
            }
            fflush(nil)
        }
        return try ImageCheck.run(path, options: image.diskOptions(isWritable: true), repair: true)
    }

    private func show(_ path: String, _ report: CheckReport) {
        for finding in report.findings {
            let mark = finding.isRepaired ? dryRun ? " (would be repaired)" : " (repaired)" : ""
            print("\(finding.file): \(finding.severity.rawValue): \(finding.message)\(mark)".printable())
        }
        let kept = report.findings.count
        let all = report.counts.values.reduce(0, +)
        if all > kept { print("… and \(all - kept) more") }
        let problems = report.remaining(.repairable) + report.remaining(.loss)
        let blocks =
            report.totalBlocks > 0 ? "; \(report.allocatedBlocks) of \(report.totalBlocks) blocks allocated" : ""
        let summary: String
        let repaired = report.repairedCounts.values.reduce(0, +)
        if dryRun, repaired > 0 {
            summary = "a repair would put right \(repaired) problems\(problems > 0 ? " of \(repaired + problems)" : "")"
        } else if problems > 0 {
            summary = "\(problems) problems\(repair ? "" : "; 'vdimg check --repair' puts right what can be")"
        } else {
            summary = report.repairedCounts.isEmpty ? "no problems" : "all problems repaired"
        }
        print("\(path): \(summary)\(blocks)")
    }
}

/// A report as JSON shows it.
private struct CheckRecord: Encodable {
    let image: String
    let findings: [Finding]
    let counts: [String: Int]
    let remaining: [String: Int]
    let allocatedBlocks: UInt64
    let totalBlocks: UInt64

    struct Finding: Encodable {
        let severity: String
        let file: String
        let message: String
        let repaired: Bool
        /// Of a dry run: whether it would be.
        let wouldBeRepaired: Bool?

        enum CodingKeys: String, CodingKey {
            case severity, file, message, repaired
            case wouldBeRepaired = "would-be-repaired"
        }
    }

    init(_ path: String, _ report: CheckReport, isDryRun: Bool) {
        image = path
        findings = report.findings.map {
            Finding(
                severity: $0.severity.rawValue, file: $0.file, message: $0.message,
                repaired: $0.isRepaired && !isDryRun, wouldBeRepaired: isDryRun ? $0.isRepaired : nil)
        }
        counts = Dictionary(report.counts.map { ($0.key.rawValue, $0.value) }) { first, _ in first }
        remaining = Dictionary(
            report.counts.keys.map { ($0.rawValue, isDryRun ? report.counts[$0] ?? 0 : report.remaining($0)) }
        ) { first, _ in first }
        allocatedBlocks = report.allocatedBlocks
        totalBlocks = report.totalBlocks
    }

    enum CodingKeys: String, CodingKey {
        case image, findings, counts, remaining
        case allocatedBlocks = "allocated-blocks"
        case totalBlocks = "total-blocks"
    }
}
