import CommandSupport
import DiskStorage
import FuseHost
import Glibc
import VirtualDisk

/// `vdimg merge` of images that `vdmount` has open: the daemon merges, with files that are opened here.
struct MountedMerge {
    let mounted: MountedChain
    let merge: ChainMerge

    /// Merges; answers what was done.
    func run(_ control: OperationControl) throws(DiskError) -> ChainMerge.Outcome {
        try mounted.expectChangeable()
        try mounted.becomeOwner()
        let overlay = mounted.chain.overlay?.file.map { FileIdentity(device: $0.device, inode: $0.inode) }
        guard let plan = try DelegatedMerge(merge, below: overlay) else { return try finish() }
        try mounted.expectSame(plan.images)
        let files = (
            changing: try plan.openChangingFiles(),
            obsolete: try plan.openObsoleteFiles(
                isWritable: mounted.chain.isWritable && mounted.chain.overlay == nil && plan.source == 0)
        )
        let order = "merge \(mounted.chain.generation) \(plan.source) \(plan.target) "
        let connection = try mounted.begin(order + (merge.keepsFiles ? "keep" : "remove"))
        // What cannot be sent was refused; why, the daemon says.
        var isHeard = files.changing.allSatisfy { connection.send("file\n", descriptors: $0.descriptors) }
        isHeard = isHeard && files.obsolete.allSatisfy { connection.send("gone\n", descriptors: $0.descriptors) }
        if isHeard { connection.send("go\n") }
        let answer = try mounted.wait(for: "done", connection, control) {
            (file, bytes, isLocked) throws(DiskError) in
            try plan.replace(file, with: bytes, isLocked: isLocked)
        }
        if !merge.keepsFiles {
            try plan.removeObsoleteFiles()
            if let number = answer.first.flatMap({ Int($0) }) { mounted.forget(number) }
        }
        return ChainMerge.Outcome(
            source: plan.sourcePath, target: plan.targetPath, obsoleteFiles: plan.obsoleteFiles)
    }

    /// The image that is to be merged is none of the disk's: if a merge has made it superfluous, and was ended before
    /// it had removed the file, that is done now.
    private func finish() throws(DiskError) -> ChainMerge.Outcome {
        let path: String
        switch merge.source {
        case .path(let source): path = source
        case .number: path = merge.top
        }
        return try Self.finish(path, mounted, keepsFiles: merge.keepsFiles)
    }

    /// The mounted disk from whose chain an image was merged away, with its file left; nil: there is none.
    static func whereLeft(_ path: String) throws(DiskError) -> MountedChain? {
        try MountedChain.all(with: path).first { $0.number(of: path) == nil }
    }

    /// Removes the file of such an image.
    static func finish(
        _ path: String, _ mounted: MountedChain, keepsFiles: Bool
    ) throws(DiskError) -> ChainMerge.Outcome {
        guard let file = MountedChain.file(at: path),
            let leftover = mounted.chain.leftovers.first(where: { $0.files.contains(file) })
        else {
            throw DiskError(
                .invalidArgument, "is none of the images of the disk at \(mounted.daemon.mountpoint)", image: path)
        }
        try mounted.becomeOwner()
        try remove(path, leftover, mounted, keepsFiles: keepsFiles)
        return ChainMerge.Outcome(source: path, target: mounted.chain.images[0].path, obsoleteFiles: [path])
    }

    private static func remove(
        _ path: String, _ leftover: ChainDescription.Leftover, _ mounted: MountedChain, keepsFiles: Bool
    ) throws(DiskError) {
        guard !keepsFiles else { return }
        // What is named may be a link to it.
        guard let real = unsafe realpath(path, nil) else { throw .system(errno, "find the file", image: path) }
        defer { unsafe free(real) }
        guard unsafe unlink(real) == 0 else { throw .system(errno, "remove the file", image: path) }
        // The others are still to be named, each; so they are remembered until all are gone.
        if leftover.files.count == 1 { mounted.forget(leftover.number) }
    }
}
