import DiskTesting
import Testing

/// The pages that say how a task is done are done as they say: each command, in its order, in an empty folder.
struct DocumentationTests {
    /// A page with what it takes for granted.
    struct Page: Sendable, CustomTestStringConvertible {
        let name: String
        /// What makes the files that it speaks of: a comment that readers do not see.
        let preparation: String
        /// Its commands: what is set in by four blanks.
        let commands: String
        var testDescription: String { name }
    }

    /// All pages that can be followed without a mount.
    static let pages: [Page] = {
        let folder = root + "docs"
        let names = (try? Subprocess.run(["ls", folder]).outputText) ?? ""
        return names.split(separator: "\n").filter { $0.hasSuffix(".md") }.compactMap { page("\(folder)/\($0)") }
    }()

    private static let root: String = {
        var path = String(#filePath)
        while !path.hasSuffix("/Tests/"), !path.isEmpty { path.removeLast() }
        return String(path.dropLast("Tests/".count))
    }()

    private static func page(_ path: String) -> Page? {
        guard let text = try? Subprocess.run(["cat", path]).outputText else { return nil }
        let opening = "<!-- tried with:\n"
        guard let start = text.range(of: opening), let end = text.range(of: "-->", after: start.upperBound) else {
            return nil
        }
        let preparation = String(text[start.upperBound..<end.lowerBound])
        let commands = text[end.upperBound...].split(separator: "\n").filter { $0.hasPrefix("    ") }
            .map { $0.dropFirst(4) }.joined(separator: "\n")
        return Page(name: String(path.split(separator: "/").last ?? ""), preparation: preparation, commands: commands)
    }

    @Test func thereArePages() {
        let names = Self.pages.map(\.name)
        for name in ["convert-an-image.md", "snapshots.md", "shrink-and-grow.md", "check-and-repair.md"] {
            #expect(names.contains(name), "\(name) is not tried")
        }
        for page in Self.pages { #expect(page.commands.contains("vdimg"), "\(page.name) has no commands") }
    }

    @Test(arguments: pages) func commandsDoWhatThePageSays(_ page: Page) throws {
        try Machine.requireAll()
        let folder = try TemporaryFolder()
        let script = """
            set -euo pipefail
            export PATH='\(Programs.folder)':$PATH
            cd '\(folder.path)'
            \(page.preparation)
            set -x
            \(page.commands)
            """
        let result = try Subprocess.run(["bash"], input: Array(script.utf8))
        #expect(result.status == 0, "\(page.name):\n\(result.errorText)")
    }
}

extension String {
    /// Where `text` is first found from `start` on.
    fileprivate func range(of text: String, after start: Index? = nil) -> Range<Index>? {
        var position = start ?? startIndex
        while position < endIndex {
            if self[position...].hasPrefix(text) { return position..<index(position, offsetBy: text.count) }
            position = index(after: position)
        }
        return nil
    }
}
