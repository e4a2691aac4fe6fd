/// How often clusters of a file are pointed to, in bounded memory: pages of counts for the parts of the file in which
/// there is something, the first so many of a window. Where there are more, the window gets smaller, and the rest is
/// for another pass.
struct QCOW2ReferenceCounts {
    /// log2 of the clusters of a page.
    private static let pageBits: UInt64 = 12
    /// Pages at once: 16 MiB of counts.
    static let usualPageLimit = 1024

    /// The clusters that are counted.
    private(set) var window: Range<UInt64>
    private var numbers: [UInt64: Int] = [:]
    private var pages: [[UInt32]] = []
    private var lastNumber = UInt64.max
    private var lastPage = 0
    private let pageLimit: Int

    /// Counts from cluster `first` on.
    init(from first: UInt64, pageLimit: Int = Self.usualPageLimit) {
        window = first..<UInt64.max
        self.pageLimit = pageLimit
    }

    /// The first clusters of the pages with something in them, in order.
    var occupiedPages: [UInt64] { numbers.keys.sorted().map { $0 << Self.pageBits } }

    /// How often a cluster in the window is pointed to.
    subscript(cluster: UInt64) -> UInt32 {
        guard let page = numbers[cluster >> Self.pageBits] else { return 0 }
        return pages[page][Int(cluster & (1 << Self.pageBits - 1))]
    }

    /// Whether nothing is counted in the page of a cluster.
    func isVacant(_ cluster: UInt64) -> Bool { numbers[cluster >> Self.pageBits] == nil }

    /// Notes that something points to a cluster.
    mutating func add(_ cluster: UInt64) {
        guard window.contains(cluster) else { return }
        let number = cluster >> Self.pageBits
        if number != lastNumber {
            guard let page = numbers[number] ?? makePage(number) else { return }
            (lastNumber, lastPage) = (number, page)
        }
        let index = Int(cluster & (1 << Self.pageBits - 1))
        if pages[lastPage][index] < .max { pages[lastPage][index] += 1 }
    }

    /// Makes a page, for which the last one goes if there are too many; nil: it would be the last one itself.
    private mutating func makePage(_ number: UInt64) -> Int? {
        let empty = [UInt32](repeating: 0, count: 1 << Self.pageBits)
        if pages.count < pageLimit {
            pages.append(empty)
            numbers[number] = pages.count - 1
            return pages.count - 1
        }
        let last = numbers.keys.max() ?? 0
        window = window.lowerBound..<max(window.lowerBound, max(last, number) << Self.pageBits)
        guard number < last, let page = numbers.removeValue(forKey: last) else { return nil }
        lastNumber = .max
        pages[page] = empty
        numbers[number] = page
        return page
    }
}
