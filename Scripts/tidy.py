#!/usr/bin/env python3
"""House rules that a formatter does not know: sizes, imports downwards only, what the libraries must not use, links.

Prints one line a finding (file:line: what), and ends with status 1 if one of them is more than a warning.
"""
import pathlib
import re
import sys
from bisect import bisect_right

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = ROOT / "Sources"

MAX_COLUMNS = 120
MAX_FILE_LINES, WARN_FILE_LINES = 800, 600
MAX_FUNCTION_LINES = 70

# What a target may import; the programs may import everything but each other.
STORAGE_IMPORTS = {"CLinux", "SystemPackage", "Glibc", "Synchronization"}
ALLOWED_IMPORTS = {
    "CLinux": set(),
    "DiskStorage": STORAGE_IMPORTS,
    "DiskImage": STORAGE_IMPORTS | {"DiskStorage"},
    "DiskPartitions": {"DiskStorage", "CDeflate", "CISAL"},
    "DiskFormats": {"DiskImage", "DiskPartitions", "DiskStorage", "CDeflate", "CZstd", "Glibc"},
    "VirtualDisk": {"DiskFormats", "DiskImage", "DiskPartitions", "DiskStorage", "CLinux", "SystemPackage", "Dispatch",
                    "Glibc"},
    "DiskNetwork": {"DiskStorage", "CLinux", "CCurl", "CNBD", "CISCSI", "Glibc"},
    "CommandSupport": {"ArgumentParser", "CLinux", "FoundationEssentials", "Glibc"},
    "FuseHost": {"FuseShim", "Dispatch", "Glibc", "Synchronization"},
}
PROGRAMS = {"vdmount", "vdumount", "vdimg"}
SHARED_FORMAT_FOLDERS = {"Compression", "Shared"}
FORMAT_NAMES = ["VMDK", "VDI", "VHDX", "VHD", "QED", "QCOW2", "QCOW", "VCI"]

findings = []


def report(path, line, text, warning=False):
    findings.append((str(path.relative_to(ROOT)), line, ("warning: " if warning else "") + text, warning))


# ---- Swift, without its comments and strings ----

TOKEN = re.compile(r'//[^\n]*|/\*|#*"')
COMMENT_EDGE = re.compile(r"/\*|\*/")


def blank(text):
    """Spaces in place of everything but line ends, so that offsets stay what they are."""
    return re.sub(r"[^\n]", " ", text)


def end_of_comment(text, start):
    depth, position = 1, start + 2
    while depth and (edge := COMMENT_EDGE.search(text, position)):
        depth += 1 if edge[0] == "/*" else -1
        position = edge.end()
    return position if depth == 0 else len(text)


def end_of_string(text, start, hashes):
    """The offset after a string that opens at `start`; interpolations may hold strings of their own."""
    quote = '"""' if text.startswith('"""', start + hashes) else '"'
    if text.startswith('""', start + hashes) and quote == '"':
        return start + hashes + 2 + hashes
    closing, escape = quote + "#" * hashes, "\\" + "#" * hashes
    position = start + hashes + len(quote)
    while position < len(text):
        if text.startswith(closing, position):
            return position + len(closing)
        if text.startswith(escape + "(", position):
            position = end_of_interpolation(text, position + len(escape) + 1)
        elif text.startswith(escape, position):
            position += len(escape) + 1
        elif quote == '"' and text[position] == "\n":
            return position
        else:
            position += 1
    return position


def end_of_interpolation(text, position):
    depth = 1
    while position < len(text) and depth:
        if (token := TOKEN.match(text, position)) and token[0].endswith('"'):
            position = end_of_string(text, position, len(token[0]) - 1)
            continue
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        position += 1
    return position


def code_only(text):
    pieces, position = [], 0
    while token := TOKEN.search(text, position):
        start = token.start()
        if token[0].startswith("//"):
            end = token.end()
        elif token[0] == "/*":
            end = end_of_comment(text, start)
        else:
            end = end_of_string(text, start, len(token[0]) - 1)
        pieces += [text[position:start], blank(text[start:end])]
        position = end
    return "".join(pieces) + text[position:]


class Source:
    def __init__(self, path):
        self.path = path
        self.text = path.read_text(encoding="utf-8")
        self.lines = self.text.split("\n")
        self.code = code_only(self.text) if path.suffix == ".swift" else self.text
        self.starts = [0] + [match.end() for match in re.finditer("\n", self.text)]

    def line(self, offset):
        return bisect_right(self.starts, offset)


# ---- the rules ----

LEFTOVER = re.compile(r"\b(TODO|FIXME|XXX)\b")
IMPORT = re.compile(
    r"^[ \t]*(?:@\w+(?:\([^)\n]*\))?[ \t]+)*(?:(?:public|package|internal|fileprivate|private)[ \t]+)?"
    r"import[ \t]+(?:(?:struct|class|enum|protocol|func|var|let|typealias)[ \t]+)?(\w+)", re.M)
FUNCTION = re.compile(
    r"^[ \t]*(?:@\w+(?:\([^)\n]*\))?\s+)*(?:[a-z]+(?:\(\w+\))?[ \t]+)*?"
    r"(func[ \t]+[^\s(<]+|init[?!]?(?=[ \t]*[(<])|deinit\b)", re.M)
FORBIDDEN = [
    (re.compile(r"\bfatalError\s*\("), "fatalError: throw, or state the broken rule with precondition"),
    (re.compile(r"\btry!"), "try!"),
    (re.compile(r"\bas!"), "as!"),
]
PRINT = re.compile(r"(?<![\w.`])(?<!func )(?:debugPrint|print|dump)\s*\(")
UNCHECKED = re.compile(r"@unchecked\s+Sendable")
DECLARATION = re.compile(r"\b(?:class|struct|enum|extension|actor|protocol)\b")
TYPE = re.compile(r"^(?:@\w+(?:\([^)\n]*\))?\s+)*(?:[a-z]+(?:\(\w+\))?[ \t]+)*?"
                  r"(?:struct|class|enum|protocol|actor|typealias)[ \t]+(\w+)", re.M)


def check_text(source):
    for number, line in enumerate(source.lines, 1):
        if len(line) > MAX_COLUMNS:
            report(source.path, number, f"{len(line)} columns; {MAX_COLUMNS} are the limit")
        if line != line.rstrip():
            report(source.path, number, "blanks at the end of the line")
        if "\t" in line:
            report(source.path, number, "a tab")
        if match := LEFTOVER.search(line):
            report(source.path, number, f"{match[1]}: do it, or say what is so in plain words")


def check_size(source):
    count = len(source.lines) - (source.lines[-1] == "")
    if count > MAX_FILE_LINES:
        report(source.path, count, f"{count} lines; {MAX_FILE_LINES} are the limit")
    elif count > WARN_FILE_LINES:
        report(source.path, count, f"{count} lines; think of splitting it", warning=True)


CONTINUES_AFTER = re.compile(r"(->|,|\bwhere|\bthrows|\basync|&|:|=)\s*$")
CONTINUES_WITH = re.compile(r"\s*(->|where\b|throws\b|rethrows\b|async\b|\{|,|&)")


def body_of_function(code, position):
    """The offsets of its braces; None for one without a body (in a protocol)."""
    depth = 0
    while position < len(code):
        character = code[position]
        if character in "([":
            depth += 1
        elif character in ")]":
            depth -= 1
        elif depth == 0 and character == "{":
            return position, end_of_block(code, position)
        elif depth == 0 and (character == "}" or character == "\n" and
                             not CONTINUES_AFTER.search(code, code.rfind("\n", 0, position) + 1, position) and
                             not CONTINUES_WITH.match(code, position)):
            return None
        position += 1
    return None


def end_of_block(code, position):
    depth = 0
    for brace in re.compile(r"[{}]").finditer(code, position):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    return len(code)


def check_functions(source, warning):
    for match in FUNCTION.finditer(source.code):
        body = body_of_function(source.code, match.end())
        if body is None:
            continue
        first = source.line(match.start(1))
        count = source.line(body[1]) - first + 1
        if count > MAX_FUNCTION_LINES:
            report(source.path, first, f"{match[1]} has {count} lines; {MAX_FUNCTION_LINES} are the limit", warning)


def check_imports(source, target):
    for match in IMPORT.finditer(source.code):
        name, line = match[1], source.line(match.start(1))
        if name == "Foundation":
            report(source.path, line, "imports Foundation; the programs may import FoundationEssentials")
        elif target in PROGRAMS:
            if name in PROGRAMS:
                report(source.path, line, f"{target} imports {name}, a program")
        elif name not in ALLOWED_IMPORTS.get(target, set()):
            report(source.path, line, f"{target} imports {name}; imports go down only (the table in Scripts/tidy.py)")


def check_code(source, target):
    rules = FORBIDDEN + ([] if target in PROGRAMS else [(PRINT, "prints; only the programs do")])
    for pattern, text in rules:
        for match in pattern.finditer(source.code):
            report(source.path, source.line(match.start()), text)
    for match in UNCHECKED.finditer(source.code):
        number = source.line(match.start())
        code_lines = source.code.split("\n")
        while number > 1 and not DECLARATION.search(code_lines[number - 1]):
            number -= 1
        while number > 1 and source.lines[number - 2].lstrip().startswith("@"):
            number -= 1
        if number < 2 or not source.lines[number - 2].lstrip().startswith("//"):
            report(source.path, source.line(match.start()), "@unchecked Sendable without the reason in the line above")


def check_formats(sources):
    """No format names a type of another: none its folder declares, none that begins with its name."""
    folder_of = {}
    base = SOURCES / "DiskFormats"
    members = [(source, source.path.relative_to(base).parts[0]) for source in sources
               if base in source.path.parents and source.path.parent != base]
    for source, folder in members:
        if folder not in SHARED_FORMAT_FOLDERS:
            for match in TYPE.finditer(source.code):
                folder_of[match[1]] = folder
    prefixed = re.compile(r"\b(" + "|".join(FORMAT_NAMES) + r")[A-Z]\w*")
    for source, folder in members:
        for match in re.finditer(r"\b[A-Z]\w*", source.code):
            owner = folder_of.get(match[0])
            if owner is None and (prefix := prefixed.fullmatch(match[0])):
                owner = prefix[1]
            if owner is not None and owner != folder and not match[0].startswith(folder):
                report(source.path, source.line(match.start()), f"{folder} names {match[0]}, a type of {owner}")


LINK = re.compile(r"(?<!!)\[[^\]\n]*\]\(([^)\s]+)\)|!\[[^\]\n]*\]\(([^)\s]+)\)")


def check_links(path):
    text = re.sub(r"^```.*?^```|`[^`\n]*`", lambda match: blank(match[0]), path.read_text("utf-8"), flags=re.M | re.S)
    for match in LINK.finditer(text):
        target = (match[1] or match[2]).split("#")[0]
        if not target or re.match(r"[a-z]+:", target):
            continue
        if not (path.parent / target).exists():
            report(path, text.count("\n", 0, match.start()) + 1, f"the link to {target} leads nowhere")


def main():
    swift_tests = [Source(path) for path in sorted((ROOT / "Tests").rglob("*.swift")) if ".build" not in path.parts]
    sources = [Source(path) for path in sorted(SOURCES.rglob("*")) if path.suffix in {".swift", ".c", ".h"}]
    for source in sources:
        target = source.path.relative_to(SOURCES).parts[0]
        check_text(source)
        check_size(source)
        if source.path.suffix == ".swift":
            check_functions(source, warning=False)
            check_imports(source, target)
            check_code(source, target)
    for source in swift_tests:
        check_text(source)
        check_functions(source, warning=True)
    check_formats([source for source in sources if source.path.suffix == ".swift"])
    check_text(Source(ROOT / "Package.swift"))
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        check_links(path)

    for path, line, text, _ in sorted(findings):
        print(f"{path}:{line}: {text}")
    failures = sum(1 for finding in findings if not finding[3])
    if failures:
        print(f"tidy: {failures} to mend in {len(sources) + len(swift_tests)} files", file=sys.stderr)
    return 1 if failures else 0


sys.exit(main())
