import DiskTesting
import Glibc
import Testing

extension MountTests {
    /// Merges of mounted disks whose images have disks of several sizes.
    @Suite struct MountedSizeTests {
        private static let kinds = MountedKind.all.filter { $0.options.isEmpty }
        private static let (size, mebibyte) = (16 << 20, 1 << 20)

        /// As in LiveChainTests; sizes of the top image first.
        private static let cases: [(sizes: [Int], source: Int, target: Int)] = [
            // A lower image becomes as large as what is merged into it, and does not show what lies below it.
            ([size, size, size - 3 * mebibyte, size], 1, 2), ([size, size, size - 3 * mebibyte, size], 0, 2),
            // One that ends before what it is merged into hides the rest.
            ([size, size - mebibyte, size + 2 * mebibyte, size], 1, 2),
            ([size, size, size + 2 * mebibyte, size], 0, 2),
            // Upwards, what lies between or below may have any size.
            ([size, size, size - mebibyte, size], 2, 1), ([size, size, size - mebibyte, size + mebibyte], 3, 0),
        ]

        /// An image over others is in order, and shows that to us, and to QEMU where it reads images over others.
        private func expectShown(_ stage: Stage, _ kind: MountedKind, _ image: String, _ model: String) throws {
            if ["vmdk", "qcow2", "qed"].contains(kind.format) { return try kind.expect(image, model) }
            try vdimg("check", image)
            let disk = try stage.mount(image)
            // One that was larger than what was merged into it stays so, and has zeros behind that.
            try tool("truncate", "-s", "\(FileStatus(disk.file).size)", model)
            try expectSameBytes(disk.file, model)
            try disk.unmount()
        }

        @Test(arguments: kinds) func underAGuest(_ kind: MountedKind) throws {
            for (number, test) in Self.cases.enumerated() {
                try Stage.use { stage in
                    let stack = try MountedStack(stage, kind, test.sizes, in: "images")
                    let left = stack.left(merging: test.source, into: test.target)
                    let disk = try stage.mount(stack.images[0], "--rw")
                    let guest = try Guest(stage, on: disk, model: stack.models[0], isWriting: true, seed: number)
                    usleep(50_000)
                    try vdimg(
                        "merge", "--quiet", stack.images[0], "--from", "\(test.source)", "--to", "\(test.target)")
                    usleep(50_000)
                    try guest.end()
                    #expect(try disk.images() == left.map { stack.images[$0] })
                    try expectSameBytes(disk.file, stack.models[0])
                    try disk.unmount()
                    try expectShown(stage, kind, stack.images[left[0]], stack.models[0])
                    guard test.source < test.target, test.source > 0 else { return }
                    // The lower image shows what the one that was merged into it did.
                    try expectShown(stage, kind, stack.images[test.target], stack.models[test.source])
                }
            }
        }

        /// The image that comes to the top gets the size of the one that went, whoever reads it, and also where an
        /// overlay hides what it has behind that.
        @Test(arguments: kinds, [[], ["--overlay"]]) func aSmallerTopImage(
            _ kind: MountedKind, _ options: [String]
        ) throws {
            for target in [Self.size + 2 * Self.mebibyte, Self.size - 2 * Self.mebibyte] {
                try Stage.use { stage in
                    let stack = try MountedStack(stage, kind, [Self.size, target, Self.size], in: "images")
                    let shown = stage.file("shown")
                    try tool("cp", stack.models[0], shown)
                    let disk = try stage.mount(stack.images[0], at: stage.makeMountpoint(), options: options)
                    let guest = try Guest(stage, on: disk, model: shown, isWriting: !options.isEmpty)
                    try vdimg("merge", "--quiet", stack.images[0])
                    usleep(50_000)
                    try guest.end()
                    #expect(try disk.images().suffix(2) == stack.images[1...])
                    try expectSameBytes(disk.file, shown)
                    try disk.unmount()
                    try expectShown(stage, kind, stack.images[1], stack.models[0])
                }
            }
        }
    }
}
