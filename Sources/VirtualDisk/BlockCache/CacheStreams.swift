/// Tells large sequential reads from others. Several may go on at the same time, and requests of one may overtake each
/// other a little.
struct CacheStreams {
    private struct Stream {
        /// Where it has come to.
        var end: UInt64 = 0
        /// How much it has read.
        var bytes: UInt64 = 0
        /// When it read last, in requests.
        var time: UInt64 = 0
    }

    private static let count = 8

    private var streams = InlineArray<8, Stream>(repeating: Stream())
    private var time: UInt64 = 0
    private let limit: UInt64
    /// How far from where a stream has come to its next request may begin.
    private let slack: UInt64

    /// - Parameter limit: From so many bytes on a stream is a large one.
    init(limit: UInt64) {
        self.limit = limit
        slack = min(1 << 20, limit / 4)
    }

    /// Notes a request; answers whether it belongs to a large stream.
    @inline(__always)
    mutating func note(_ offset: UInt64, _ length: UInt64) -> Bool {
        time &+= 1
        var oldest = 0
        for index in 0..<Self.count {
            let stream = streams[index]
            if stream.bytes > 0, offset &+ slack >= stream.end, offset <= stream.end &+ slack {
                let end = max(stream.end, offset &+ length)
                // What was read once more does not count, nor what was left out.
                let bytes = stream.bytes &+ min(length, end &- stream.end)
                streams[index] = Stream(end: end, bytes: bytes, time: time)
                return bytes > limit
            }
            if stream.time < streams[oldest].time { oldest = index }
        }
        streams[oldest] = Stream(end: offset &+ length, bytes: length, time: time)
        return length > limit
    }
}
