import ArgumentParser
import CommandSupport
import DiskImage
import DiskStorage
import VirtualDisk

/// `vdimg check`: looks for damage in an image's structure, and repairs it.
struct CheckCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "check", abstract: "Look for damage in an image's structure.",
        discussion: """
            Without --repair nothing is changed. --repair makes copies of tables equal again, clears entries that \
            lead nowhere (what they should have led to is lost already) and the mark of an unclean end.

            EXIT STATUS
              0 nothing is wrong; 2 repair is needed; 3 data is lost that cannot be repaired.
            """)

    @OptionGroup var image: ImageOptions
    @Flag(help: "Repair what can be repaired.") var repair = false
    @Flag(help: "Also check the parents (which are never repaired).") var chain = false
    @Flag(help: "Write JSON.") var json = false
    @Argument(help: "The image.", completion: .file()) var path: String

    func run() throws {
        var reports: [(String, CheckReport)] = []
        try reportingErrors { () throws(DiskError) in
            let options = image.diskOptions(isWritable: repair)
            reports.append((path, try ImageCheck.run(path, options: options, repair: repair)))
            guard chain else { return }
            let readOnly = image.diskOptions()
            for parent in try ImageInformation.read(path, options: readOnly, wholeChain: true).dropFirst() {
                var options = readOnly
                options.format = parent.format
                reports.append((parent.path, try ImageCheck.run(parent.path, options: options)))
            }
        }
        if json {
            try print(jsonText(reports.map { CheckRecord($0.0, $0.1) }))
        } else {
            for (path, report) in reports { show(path, report) }
        }
        let loss = reports.reduce(0) { $0 + ($1.1.counts[.loss] ?? 0) }
        let needed = reports.reduce(0) { $0 + $1.1.remaining(.repairable) }
        if loss > 0 { throw ExitCode(3) }
        if needed > 0 { throw ExitCode(2) }
    }

    private func show(_ path: String, _ report: CheckReport) {
        for finding in report.findings {
            let mark = finding.isRepaired ? " (repaired)" : ""
            print("\(finding.file): \(finding.severity.rawValue): \(finding.message)\(mark)".printable())
        }
        let kept = report.findings.count
        let all = report.counts.values.reduce(0, +)
        if all > kept { print("… and \(all - kept) more") }
        let problems = report.remaining(.repairable) + report.remaining(.loss)
        let blocks =
            report.totalBlocks > 0 ? "; \(report.allocatedBlocks) of \(report.totalBlocks) blocks allocated" : ""
        let summary: String
        if problems > 0 {
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
    }

    init(_ path: String, _ report: CheckReport) {
        image = path
        findings = report.findings.map {
            Finding(severity: $0.severity.rawValue, file: $0.file, message: $0.message, repaired: $0.isRepaired)
        }
        counts = Dictionary(report.counts.map { ($0.key.rawValue, $0.value) }) { first, _ in first }
        remaining = Dictionary(report.counts.keys.map { ($0.rawValue, report.remaining($0)) }) { first, _ in first }
        allocatedBlocks = report.allocatedBlocks
        totalBlocks = report.totalBlocks
    }

    enum CodingKeys: String, CodingKey {
        case image, findings, counts, remaining
        case allocatedBlocks = "allocated-blocks"
        case totalBlocks = "total-blocks"
    }
}
