import CommandSupport
import DiskStorage
import FuseHost
import Glibc
import VirtualDisk

/// `vdimg snapshot` of a disk that `vdmount` serves for writing: the image is made here, the daemon puts it on top.
struct MountedSnapshot {
    let mounted: MountedChain
    let snapshot: ImageSnapshot

    /// Makes it, and answers its path. What was not put on top is removed.
    func run() throws(DiskError) -> String {
        try mounted.expectNoOverlay()
        try mounted.expectChangeable()
        try mounted.becomeOwner()
        // It is over in a moment; a new image that is not on top would be left.
        for number in [SIGINT, SIGTERM, SIGHUP] { signal(number, SIG_IGN) }
        let control = OperationControl()
        let connection = try mounted.begin("snapshot \(mounted.chain.generation)")
        _ = try mounted.wait(for: "ready", connection, control)
        let made = try DelegatedSnapshot(snapshot, over: mounted.chain.images[0].format, size: mounted.chain.size)
        send(made, over: connection)
        switch mounted.answer("done", connection, control) {
        case .words: return made.path
        case .failed(let error):
            try? made.remove()  // the first failure is the one to be told
            throw error
        case .ended:
            // It may have been put on top, and written to.
            throw DiskError(
                .system,
                "was made, but process \(mounted.daemon.pid), which serves the disk, ended meanwhile: it is the "
                    + "disk's top image now; mount that one", image: made.path)
        }
    }

    /// What cannot be sent was refused; why, the daemon says.
    private func send(_ made: DelegatedSnapshot, over connection: ControlConnection) {
        for file in made.files {
            let path = OctalText.encode(file.file.path)
            let line = file.name.map { "companion \(OctalText.encode($0)) \(path)\n" }
            guard connection.send(line ?? "image \(made.format) \(path)\n"),
                connection.send("file\n", descriptors: file.file.descriptors)
            else { return }
        }
        for file in made.parentFiles {
            guard connection.send("file\n", descriptors: file.descriptors) else { return }
        }
        connection.send("go\n")
    }
}
