import DiskStorage
import Testing

@Suite struct PrintableTextTests {
    @Test func whatActsOnATerminalIsReplaced() {
        #expect("a\u{1b}[2Jb\nc\rd\u{7f}".printable() == "a?[2Jb?c?d?")
        // The C1 controls: U+009B is CSI by itself.
        #expect("\u{9b}31mred\u{85}".printable() == "?31mred?")
        #expect("snäpshot 雪 🌨".printable() == "snäpshot 雪 🌨")
        #expect("\r\n".printable() == "??")
    }

    @Test func longTextIsCut() {
        #expect("abcdef".printable(limit: 6) == "abcdef")
        #expect("abcdefg".printable(limit: 6) == "abcdef…")
        #expect("".printable(limit: 0) == "")
    }

    @Test func errorsAreOneLine() {
        let error = DiskError(.unsupported, "a snapshot named \u{1b}]0;owned\u{7}", image: "x\ny")
        let text = error.description
        let isClean = text.unicodeScalars.allSatisfy { $0.value >= 0x20 }
        #expect(isClean, "\(text)")
    }
}
