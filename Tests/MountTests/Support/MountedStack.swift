import DiskTesting
import Glibc
import Testing

/// A chain of images, each with content of its own, and what the disk of each shows.
struct MountedStack {
    /// Writes random bytes, and zeros, to a disk and to a file.
    private static let program = """
        import os, random, sys
        path, model, seed, steps = sys.argv[1:]
        choice = random.Random(int(seed))
        pool = choice.randbytes(1 << 20)
        files = [os.open(name, os.O_RDWR) for name in (path, model)]
        size = os.fstat(files[1]).st_size
        for step in range(int(steps)):
            length = choice.choice((512, 4096, 12288, 65536, 200704, 1 << 20))
            offset = choice.randrange((size - length) // 512 + 1) * 512
            for file in files:
                os.pwrite(file, bytes(length) if step % 4 == 3 else pool[:length], offset)
            pool = pool[512:] + pool[:512]
        os.fsync(files[0])
        """

    let kind: MountedKind
    /// The top one first.
    let images: [String]
    /// For each image, a file that holds what its disk shows.
    let models: [String]

    /// - Parameter sizes: Of the disks, the top one's first.
    init(_ stage: Stage, _ kind: MountedKind, _ sizes: [Int], in folder: String) throws {
        self.kind = kind
        let place = try stage.makeMountpoint()
        let folder = try stage.makeFolder(folder)
        var images: [String] = []
        var models: [String] = []
        for (number, size) in sizes.reversed().enumerated() {
            let image = "\(folder)/\(kind.file("image\(number)"))"
            let model = "\(folder)/model\(number)"
            let making = images.first.map { ["--parent", $0] } ?? kind.options
            try tool([Programs.vdimg, "create", "--quiet", "--size", "\(size)"] + making + [image])
            if let below = models.first { try tool("cp", "--sparse=always", below, model) }
            try tool("truncate", "-s", "\(size)", model)
            let disk = try stage.mount(image, at: place, options: ["--rw"])
            // Much in the base, and something in each of the others, whose blocks may be large.
            try tool("python3", "-c", Self.program, disk.file, model, "\(number)", number == 0 ? "60" : "8")
            try disk.unmount()
            images.insert(image, at: 0)
            models.insert(model, at: 0)
        }
        (self.images, self.models) = (images, models)
    }

    /// The numbers of the images that a merge leaves.
    func left(merging source: Int, into target: Int) -> [Int] {
        var numbers = Array(images.indices)
        numbers.removeSubrange(source < target ? source..<target : target + 1..<source + 1)
        return numbers
    }
}
