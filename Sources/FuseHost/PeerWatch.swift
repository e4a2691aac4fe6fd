import Dispatch

/// Looks whether the other side of a connection ends while somebody works for it.
// Sendable: the Dispatch source may be used from any thread.
public final class PeerWatch: @unchecked Sendable {
    private let source: any DispatchSourceRead
    private let queue = DispatchQueue(label: "vdmount.peer", qos: .utility)

    init(_ descriptor: Int32, _ connection: ControlConnection, _ body: @escaping @Sendable () -> Void) {
        source = DispatchSource.makeReadSource(fileDescriptor: descriptor, queue: queue)
        source.setEventHandler { [source] in
            source.cancel()
            body()
        }
        // The descriptor stays open until the source has let go of it.
        source.setCancelHandler { _ = connection }
        source.activate()
    }

    /// Ends looking; `body` does not run any more when this returns.
    public func end() {
        source.cancel()
        queue.sync {}
    }
}
