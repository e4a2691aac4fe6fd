import DiskStorage
import DiskTesting
import Testing

/// A reader of these tests that shares nothing with the library: a script in `Tests/Readers`, written from the format's
/// description alone.
struct SecondReader: Sendable {
    private let script: String

    static let vhd = SecondReader("vhd.py")
    static let vhdx = SecondReader("vhdx.py")

    private init(_ name: String) {
        script = #filePath.replacing("VirtualDiskTests/SecondReader.swift", with: "Readers/" + name)
    }

    /// What it finds wrong with images; nil: nothing.
    func mistakes(in paths: [String], isClosed: Bool = true) throws -> String? {
        let result = try Subprocess.run(["python3", script, "check"] + (isClosed ? ["--closed"] : []) + paths)
        return result.status == 0 ? nil : result.outputText + result.errorText
    }

    /// It finds the images sound.
    func expectSound(_ paths: [String], isClosed: Bool = true, _ context: String = "") throws {
        if let mistakes = try mistakes(in: paths, isClosed: isClosed) { Issue.record("\(context): \(mistakes)") }
    }

    /// It reads in a chain what `model` holds. `base` stands for a base of another format.
    func expectAgreement(
        _ path: String, _ model: DiskModel, base: String? = nil, _ context: String = ""
    ) throws {
        let copy = path + ".flat"
        let result = try Subprocess.run(
            ["python3", script, "flatten", path, copy] + (base.map { ["--base", $0] } ?? []))
        try #require(result.status == 0, "\(context): \(result.outputText)\(result.errorText)")
        let file = try FileStorage(path: copy, isWritable: false)
        let bytes = try file.availableBytes(at: 0, count: Int(file.length()), for: .guestData)
        #expect(bytes.count == model.size, "\(context)")
        if bytes.count == model.size, let mistake = model.mistake(in: bytes, at: 0) {
            Issue.record("\(context): the second reader: \(mistake)")
        }
    }
}
