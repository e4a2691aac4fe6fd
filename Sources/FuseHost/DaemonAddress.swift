import Glibc

/// Where a living daemon is reached.
public struct DaemonAddress: Sendable {
    public let pid: Int32
    /// Where it was mounted.
    public let mountpoint: String
    /// The image that it was mounted with, or has on top now.
    public let image: String
    /// Whose process it is.
    public let owner: UInt32
    let socket: String

    /// All living daemons that this user may ask: his own, and for root everybody's.
    public static func all() -> [DaemonAddress] {
        let user = geteuid()
        var owners = [user]
        guard user == 0 else { return MountWatch.daemons(of: owners) }
        for owner in MountTable.current().ours.compactMap(\.owner) where !owners.contains(owner) {
            owners.append(owner)
        }
        return MountWatch.daemons(of: owners)
    }

    /// Asks a question; for who cannot go on without the answer, and waits for it on a busy machine too.
    public func ask(_ question: String) -> DaemonAnswer {
        ControlSocket.ask(question, at: socket, of: owner, within: 20_000)
    }

    /// Asks what is answered over a connection that stays; nil if there is nobody.
    public func begin(_ order: String) -> ControlConnection? {
        guard let connection = ControlSocket.connect(to: socket, of: owner), connection.send(order + "\n") else {
            return nil
        }
        return connection
    }
}
