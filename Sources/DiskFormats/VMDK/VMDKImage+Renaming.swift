internal import DiskImage
internal import DiskStorage

extension VMDKImage: MultipleFileBackend {
    func companions(whenNamed name: String) throws(DiskError) -> [CompanionFile] {
        let file = descriptor.withLock { $0 }
        if file.isMissing { return [] }
        let oldBase = VMDKCreator.baseName(of: files[0])
        let newBase = VMDKCreator.baseName(of: name)
        let ownName = VMDKCreator.fileName(of: files[0])
        var result: [CompanionFile] = []
        var number = 0
        for line in file.text.extents where line.type != .zero {
            guard let old = line.fileName, !old.utf8.contains(UInt8(ascii: "/")) else { continue }
            // An embedded descriptor's first extent is the file itself, whatever it says.
            number += 1
            if file.room != nil {
                guard number == 1 else {
                    throw DiskError(
                        .unsupported, "an image whose descriptor lies in one of several extents cannot be renamed",
                        image: files[0])
                }
                continue
            }
            guard old != ownName, !result.contains(where: { $0.name == old }) else { continue }
            let new: String
            if old.hasPrefix(oldBase), old.dropFirst(oldBase.count).first.map({ "-.".contains($0) }) ?? false {
                new = newBase + old.dropFirst(oldBase.count)
            } else {
                new = conventionalName(line, number: number, newBase, file.text)
            }
            result.append(CompanionFile(name: old, newName: new))
        }
        guard Set(result.map(\.newName)).count == result.count, !result.contains(where: { $0.newName == name }) else {
            throw DiskError(
                .unsupported, "two files of the image would have the same name after '\(clipped(newBase))'",
                image: files[0])
        }
        return result
    }

    /// What creation calls the file of an extent.
    private func conventionalName(
        _ line: VMDKExtentDescription, number: Int, _ base: String, _ text: VMDKDescriptor
    ) -> String {
        let digits = String(repeating: "0", count: max(0, 3 - String(number).utf8.count)) + String(number)
        return switch text.createType {
        case .partitionedDevice: base + "-pt.vmdk"
        case .twoGbMaxExtentFlat: "\(base)-f\(digits).vmdk"
        case .twoGbMaxExtentSparse: "\(base)-s\(digits).vmdk"
        default:
            if text.extents.count(where: { $0.fileName != nil }) > 1 {
                "\(base)-\(line.type.isFlat ? "f" : "s")\(digits).vmdk"
            } else {
                base + (line.type.isFlat ? "-flat.vmdk" : line.type == .vmfsSparse ? "-delta.vmdk" : "-s001.vmdk")
            }
        }
    }

    /// An embedded descriptor names the file that it lies in.
    func noteName(_ name: String) throws(DiskError) {
        try descriptor.withLock { (file) throws(DiskError) in
            guard !file.isMissing, file.room != nil,
                let index = file.text.extents.firstIndex(where: { $0.type.isSparse && $0.fileName != nil }),
                file.text.extents[index].fileName != name
            else { return }
            var text = file.text
            text.extents[index].fileName = name
            try file.replaceAtomically(with: text)
        }
    }

    func firstFile(
        whenNamed name: String, _ companions: [CompanionFile], parent: CreateRequest.ParentDescription?
    ) throws(DiskError) -> [UInt8]? {
        let file = descriptor.withLock { $0 }
        guard !file.isMissing, file.room == nil else { return nil }
        var text = file.text
        for index in text.extents.indices {
            if let other = companions.first(where: { $0.name == text.extents[index].fileName }) {
                text.extents[index].fileName = other.newName
            }
        }
        if let parent { text.parentFileNameHint = parent.path }
        do throws(DiskError) {
            return try text.encoded()
        } catch {
            throw DiskError(.unsupported, error.message, image: files[0])
        }
    }
}
