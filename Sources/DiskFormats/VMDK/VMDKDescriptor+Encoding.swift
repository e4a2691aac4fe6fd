internal import DiskStorage

extension VMDKDescriptor {
    /// What every descriptor that is made here begins with.
    init(createType: VMDKCreateType, extents: [VMDKExtentDescription]) {
        self.init(lines: [], encoding: .utf8, extents: extents)
        append("# Disk DescriptorFile")
        setValue("version", "1", isQuoted: false)
        setValue("encoding", encoding.name)
        contentID = Self.randomContentID()
        parentContentID = Self.noContentID
        createTypeName = createType.rawValue
        append("")
        append("# Extent description")
        for extent in extents { lines.append(VMDKDescriptorLine(content: .extent(extent))) }
        for text in ["", "# The Disk Data Base", "#DDB", ""] { append(text) }
    }

    /// The text. Lines of which nothing changed are as they were; extents that were added follow the last one.
    func encoded() throws(DiskError) -> [UInt8] {
        var output = leading
        let lastExtentLine = lines.lastIndex { if case .extent = $0.content { true } else { false } }
        var remaining = extents[...]
        for (index, line) in lines.enumerated() {
            switch line.content {
            case .other: output += line.raw ?? []
            case .entry(let entry):
                if let raw = line.raw { output += raw } else { output += try encode(entry.line, entry.value) }
            case .extent(let original):
                guard let extent = remaining.popFirst() else { continue }
                if let raw = line.raw, extent == original { output += raw } else { output += try encode(extent) }
            }
            if index == lastExtentLine { for extent in remaining { output += [10] + (try encode(extent)) } }
            if index < lines.count - 1 || endsWithNewline { output.append(10) }
        }
        if lastExtentLine == nil { for extent in extents { output += try encode(extent) + [10] } }
        guard output.count <= Self.textLimit else {
            throw DiskError(
                .invalidArgument, "the descriptor would have \(output.count) bytes; \(Self.textLimit) are the limit")
        }
        return output
    }

    private func encode(_ extent: VMDKExtentDescription) throws(DiskError) -> [UInt8] {
        if let name = extent.fileName {
            // Other programs end a name at the first quotation mark.
            guard !name.utf8.contains(UInt8(ascii: "\"")) else {
                throw DiskError(.invalidArgument, "a VMDK cannot name a file with a quotation mark: '\(clipped(name))'")
            }
        }
        return try encode(extent.line, extent.line)
    }

    /// One line in the encoding, with the text's line end but for the line feed.
    private func encode(_ line: String, _ value: String) throws(DiskError) -> [UInt8] {
        guard value.utf8.allSatisfy({ $0 != 10 && $0 != 13 && $0 != 0 }) else {
            throw DiskError(
                .invalidArgument, "a line end or a NUL cannot be written into a VMDK descriptor: '\(clipped(value))'")
        }
        guard var bytes = try encoding.encode(line) else {
            throw DiskError(
                .invalidArgument,
                "'\(clipped(value))' has characters that do not exist in \(encoding.name), the descriptor's encoding")
        }
        // A changed entry has its carriage return in what followed its value.
        if usesCarriageReturns, bytes.last != 13 { bytes.append(13) }
        return bytes
    }
}
