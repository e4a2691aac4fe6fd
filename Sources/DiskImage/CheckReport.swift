/// What a check of an image's structure found.
public struct CheckReport: Sendable {
    /// How bad one finding is.
    public enum Severity: String, Sendable {
        /// Worth knowing; nothing to repair.
        case note
        /// Space is lost, no data.
        case leak
        /// Wrong, and repair puts it right without loss.
        case repairable
        /// Wrong, and data is lost with it.
        case loss
    }

    /// One thing that was found.
    public struct Finding: Sendable {
        public let severity: Severity
        /// The file it is in.
        public let file: String
        /// What is wrong, with the numbers.
        public let message: String
        /// Whether this run repaired it.
        public var isRepaired: Bool

        public init(_ severity: Severity, file: String, _ message: String, isRepaired: Bool = false) {
            self.severity = severity
            self.file = file
            self.message = message
            self.isRepaired = isRepaired
        }
    }

    /// At most ``limit`` findings, in the order of the file.
    public private(set) var findings: [Finding] = []
    /// All findings, counted by severity, the ones not kept included.
    public private(set) var counts: [Severity: Int] = [:]
    /// Those of them that are repaired.
    public private(set) var repairedCounts: [Severity: Int] = [:]
    /// Blocks that the image allocates.
    public var allocatedBlocks: UInt64 = 0
    /// Blocks that the disk has.
    public var totalBlocks: UInt64 = 0

    /// The most findings that are kept in full.
    public static let limit = 200

    public init() {}

    /// Adds a finding.
    public mutating func add(_ finding: Finding) {
        counts[finding.severity, default: 0] += 1
        if finding.isRepaired { repairedCounts[finding.severity, default: 0] += 1 }
        if findings.count < Self.limit { findings.append(finding) }
    }

    /// How many findings of a severity are still there.
    public func remaining(_ severity: Severity) -> Int {
        (counts[severity] ?? 0) - (repairedCounts[severity] ?? 0)
    }

    /// All findings of these severities have been repaired after they were found.
    public mutating func markRepaired(_ severities: [Severity]) {
        for index in findings.indices where severities.contains(findings[index].severity) {
            findings[index].isRepaired = true
        }
        for severity in severities {
            if let count = counts[severity] { repairedCounts[severity] = count }
        }
    }

    /// Adds all findings of another report.
    public mutating func merge(_ other: CheckReport) {
        for finding in other.findings where findings.count < Self.limit { findings.append(finding) }
        counts.merge(other.counts, uniquingKeysWith: +)
        repairedCounts.merge(other.repairedCounts, uniquingKeysWith: +)
        allocatedBlocks += other.allocatedBlocks
        totalBlocks += other.totalBlocks
    }
}
