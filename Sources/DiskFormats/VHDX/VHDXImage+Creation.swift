internal import DiskImage
internal import DiskStorage

extension VHDXImage {
    func creationSettings() throws(DiskError) -> CreationSettings {
        guard !structure.metadata.leavesBlocksAllocated else {
            throw DiskError(.unsupported, "a fixed image has all its space, and keeps it", image: files.first)
        }
        return CreationSettings(options: [
            "logical-sector-size": String(structure.metadata.logicalSectorSize),
            "physical-sector-size": String(structure.metadata.physicalSectorSize),
        ])
    }
}
