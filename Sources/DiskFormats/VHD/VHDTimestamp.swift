internal import Glibc

/// A moment as VHDs store it: seconds since 2000-01-01 00:00:00 UTC.
struct VHDTimestamp: Sendable, Equatable, CustomStringConvertible {
    let seconds: UInt32

    /// 2000-01-01 in seconds since 1970.
    private static let epoch: Int64 = 946_684_800

    init(seconds: UInt32) { self.seconds = seconds }

    /// From nanoseconds since 1970; what lies outside becomes the nearest that does not.
    init(nanosecondsSince1970 time: Int64) { seconds = UInt32(clamping: time / 1_000_000_000 - Self.epoch) }

    static var now: VHDTimestamp { VHDTimestamp(seconds: UInt32(clamping: Int64(time(nil)) - epoch)) }

    /// `2026-11-21 14:50:09 UTC`.
    var description: String {
        let days = Int(seconds / 86_400)
        let inDay = Int(seconds % 86_400)
        // Whole periods of 400 years have 146,097 days; years are counted from March on, so that leap days end them.
        let fromMarch = days + 146_097 - 60
        let era = fromMarch / 146_097
        let inEra = fromMarch % 146_097
        let yearInEra = (inEra - inEra / 1460 + inEra / 36_524 - inEra / 146_096) / 365
        let inYear = inEra - (365 * yearInEra + yearInEra / 4 - yearInEra / 100)
        let monthFromMarch = (5 * inYear + 2) / 153
        let day = inYear - (153 * monthFromMarch + 2) / 5 + 1
        let month = monthFromMarch < 10 ? monthFromMarch + 3 : monthFromMarch - 9
        let year = 1600 + era * 400 + yearInEra + (month <= 2 ? 1 : 0)
        func two(_ number: Int) -> String { number < 10 ? "0\(number)" : String(number) }
        return "\(year)-\(two(month))-\(two(day)) "
            + "\(two(inDay / 3600)):\(two(inDay / 60 % 60)):\(two(inDay % 60)) UTC"
    }
}
