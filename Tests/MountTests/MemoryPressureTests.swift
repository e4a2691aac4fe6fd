import DiskTesting
import Glibc
import Testing

/// A machine short of memory: Tests/System/memory.sh in a control group, for seconds, or two minutes in `make torture`
/// and `make test-memory`.
extension MountTests {
    @Suite struct MemoryPressureTests {
        private static let script: String = {
            let path: String = #filePath
            let tests = path.split(separator: "/", omittingEmptySubsequences: false).dropLast(2)
            return tests.joined(separator: "/") + "/System/memory.sh"
        }()

        /// Why no control group with a limit can be made here; nil if one can.
        static let obstacle: String? = {
            guard let result = try? attempt(script, "--possible") else { return "its script cannot be run" }
            return result.status == 0 ? nil : result.outputText + result.errorText
        }()

        @Test(.enabled(if: obstacle == nil, "no control group of 256 MiB can be made: \(obstacle ?? "")"))
        func loopOverTheDisk() throws {
            try Machine.requireAll()
            let seconds = unsafe getenv("VDMOUNT_TORTURE") != nil ? "120" : "10"
            // The script knows itself how long is too long.
            let result = try Subprocess.run([Self.script, Programs.folder, seconds])
            #expect(result.status == 0, "\(result.outputText)\(result.errorText)")
            print(result.errorText + result.outputText)
        }
    }
}
