internal import DiskStorage

extension ChainPicture {
    /// The picture as a document of its own: SVG 1.1, the same bytes for the same chain.
    public var svg: String {
        var drawing = SVGDrawing(self)
        return drawing.document()
    }
}

/// Draws a chain. All numbers are pixels.
private struct SVGDrawing {
    private static let width = 1280
    private static let margin = 28
    private static let labelWidth = 268
    private static let rowHeight = 34
    private static let rowGap = 14
    private static let partHeight = 30
    private static let headHeight = 78

    private let picture: ChainPicture
    private var lines: [String] = []

    init(_ picture: ChainPicture) { self.picture = picture }

    private var left: Int { Self.margin + Self.labelWidth }
    private var plotWidth: Int { Self.width - left - Self.margin }
    private var partTop: Int { Self.headHeight }
    private var rowsTop: Int { partTop + (picture.parts.isEmpty ? 0 : Self.partHeight + 12) }
    private func rowTop(_ row: Int) -> Int { rowsTop + row * (Self.rowHeight + Self.rowGap) }
    private var rowsBottom: Int { rowTop(picture.rows.count) - Self.rowGap }
    private var height: Int { rowsBottom + 96 }

    mutating func document() -> String {
        lines = [
            #"<?xml version="1.0" encoding="UTF-8" standalone="no"?>"#,
            #"<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">"#,
            #"<svg xmlns="http://www.w3.org/2000/svg" version="1.1" width="\#(Self.width)" height="\#(height)" "#
                + #"viewBox="0 0 \#(Self.width) \#(height)" font-family="Inter, 'Segoe UI', 'Noto Sans', "#
                + #"'DejaVu Sans', Helvetica, Arial, sans-serif">"#,
            "<title>\(escape(title))</title>",
            #"<rect width="\#(Self.width)" height="\#(height)" fill="white"/>"#,
        ]
        heading()
        parts()
        rows()
        boundaries()
        axis()
        legend()
        lines.append("</svg>")
        return lines.joined(separator: "\n") + "\n"
    }

    private func name(_ path: String) -> String {
        let name = path.split(separator: "/").last.map(String.init) ?? path
        return name.printable()
    }

    private var title: String { picture.rows.first.map { name($0.path) } ?? "disk" }

    // MARK: - Pieces

    private mutating func heading() {
        text(title, x: Self.margin, y: 36, size: 20, fill: "#16202c", weight: "600", limit: 80)
        var facts = ["\(ChainPicture.Text.size(picture.size)) disk"]
        facts.append(picture.rows.count == 1 ? "1 image" : "\(picture.rows.count) images")
        if !picture.tableKind.isEmpty, picture.tableKind != "NONE" {
            facts.append("\(picture.tableKind), \(picture.parts.count) partitions")
        }
        text(facts.joined(separator: "  ·  "), x: Self.margin, y: 58, size: 13, fill: "#5b6876")
    }

    /// Where a byte of the disk is.
    private func x(_ offset: UInt64) -> Double {
        guard picture.size > 0 else { return Double(left) }
        return Double(left) + Double(plotWidth) * (Double(offset) / Double(picture.size))
    }

    private mutating func parts() {
        guard !picture.parts.isEmpty else { return }
        text("partitions", x: Self.margin, y: partTop + 20, size: 12, fill: "#5b6876")
        for (number, part) in picture.parts.enumerated() {
            let start = x(part.range.lowerBound)
            let width = max(2, x(part.range.upperBound) - start - 1)
            let fill = number % 2 == 0 ? "#e3e9f0" : "#d3dce6"
            lines.append("<g>")
            lines.append("<title>\(escape(part.detail))</title>")
            rect(start, Double(partTop), width, Double(Self.partHeight), fill: fill, radius: 4)
            let room = Int((width - 12) / 6.6)
            if room >= 2 {
                let whole = part.title.printable()
                let short = whole.count <= room ? whole : room >= 8 ? String(whole.prefix(room - 1)) + "…" : ""
                let shown = short.isEmpty ? String(whole.prefix { $0 != " " }) : short
                if shown.count <= room {
                    text(shown, x: start + 7, y: partTop + 20, size: 12, fill: "#27384a", weight: "500")
                }
            }
            lines.append("</g>")
        }
    }

    private mutating func rows() {
        for (number, row) in picture.rows.enumerated() {
            let top = rowTop(number)
            lines.append("<g>")
            lines.append("<title>\(escape("\(row.path) (\(row.format))"))</title>")
            text(
                name(row.path), x: Self.margin, y: top + 14, size: 13, fill: "#16202c", weight: "600", limit: 33)
            text(describe(row, number), x: Self.margin, y: top + 30, size: 11, fill: "#5b6876", limit: 46)
            lines.append("</g>")
            // What is absent is the ground; the image's own end is seen.
            rect(
                Double(left), Double(top), x(min(row.size, picture.size)) - Double(left), Double(Self.rowHeight),
                fill: SVGColour(.absent).hex, radius: 3)
            let cell = Double(plotWidth) / Double(picture.columns)
            for run in row.runs where run.shade != .absent {
                rect(
                    Double(left) + Double(run.start) * cell, Double(top), Double(run.count) * cell,
                    Double(Self.rowHeight), fill: SVGColour(run.shade).hex)
            }
        }
    }

    private func describe(_ row: ChainPicture.Row, _ number: Int) -> String {
        var words = [row.format]
        if row.data > 0 { words.append("\(ChainPicture.Text.size(row.data)) data") }
        if row.encoded > 0 { words.append("\(ChainPicture.Text.size(row.encoded)) compressed") }
        if row.zero > 0 { words.append("\(ChainPicture.Text.size(row.zero)) zero") }
        if words.count == 1 { words.append("holds nothing") }
        return words.joined(separator: "  ·  ")
    }

    /// The edges of partitions, across all rows.
    private mutating func boundaries() {
        var drawn: Set<String> = []
        for part in picture.parts {
            for offset in [part.range.lowerBound, part.range.upperBound] where offset > 0 && offset < picture.size {
                let place = decimal(x(offset))
                guard drawn.insert(place).inserted else { continue }
                path(
                    "M\(place) \(partTop + Self.partHeight + 2)V\(rowsBottom + 4)", stroke: "#8a939d", dash: "3 3")
            }
        }
    }

    private mutating func axis() {
        guard picture.size > 0 else { return }
        let y = rowsBottom + 14
        path("M\(left) \(y)H\(left + plotWidth)", stroke: "#9aa7b4")
        // A power of two that gives four to eight steps.
        let step = UInt64(1) << UInt64(max(0, 63 - (picture.size / 4).leadingZeroBitCount))
        var offset: UInt64 = 0
        while offset < picture.size {
            let place = decimal(x(offset))
            path("M\(place) \(y)V\(y + 5)", stroke: "#9aa7b4")
            // The last number of all is the disk's size; nothing is written into it.
            if Double(left + plotWidth) - x(offset) > 90 || offset == 0 {
                let anchor = offset == 0 ? "start" : "middle"
                text(
                    offset == 0 ? "0" : ChainPicture.Text.size(offset), x: x(offset), y: y + 19, size: 11,
                    fill: "#5b6876", anchor: anchor)
            }
            let (next, overflow) = offset.addingReportingOverflow(max(1, step))
            if overflow { break }
            offset = next
        }
        text(
            ChainPicture.Text.size(picture.size), x: Double(left + plotWidth), y: y + 19, size: 11, fill: "#5b6876",
            anchor: "end")
    }

    private mutating func legend() {
        let y = rowsBottom + 60
        let full = UInt8(ChainPicture.Shade.steps)
        let entries: [(String, ChainPicture.Shade)] = [
            ("data", .init(data: full, encoded: 0, zero: 0)),
            ("compressed", .init(data: 0, encoded: full, zero: 0)),
            ("zero", .init(data: 0, encoded: 0, zero: full)),
            ("absent: the image below is asked", .absent),
        ]
        var place = left
        for (title, shade) in entries {
            rect(Double(place), Double(y - 11), 22, 14, fill: SVGColour(shade).hex, radius: 3)
            text(title, x: place + 30, y: y, size: 12, fill: "#27384a")
            place += 30 + title.count * 7 + 26
        }
        text(
            "lighter: a part of it", x: Double(left + plotWidth), y: y, size: 12, fill: "#5b6876", anchor: "end")
    }

    // MARK: - Elements

    private mutating func rect(
        _ x: Double, _ y: Double, _ width: Double, _ height: Double, fill: String, radius: Int = 0
    ) {
        guard width > 0 else { return }
        let round = radius > 0 ? #" rx="\#(radius)""# : ""
        lines.append(
            #"<rect x="\#(decimal(x))" y="\#(decimal(y))" width="\#(decimal(width))" height="\#(decimal(height))""#
                + #"\#(round) fill="\#(fill)"/>"#)
    }

    private mutating func path(_ path: String, stroke: String, dash: String = "none") {
        lines.append(
            #"<path d="\#(path)" stroke="\#(stroke)" stroke-dasharray="\#(dash)" fill="none"/>"#)
    }

    private mutating func text(
        _ text: String, x: Int, y: Int, size: Int, fill: String, weight: String = "400", limit: Int = .max
    ) {
        let shown = text.count > limit ? String(text.prefix(limit - 1)) + "…" : text
        self.text(shown, x: Double(x), y: y, size: size, fill: fill, weight: weight)
    }

    private mutating func text(
        _ text: String, x: Double, y: Int, size: Int, fill: String, weight: String = "400", anchor: String = "start"
    ) {
        lines.append(
            #"<text x="\#(decimal(x))" y="\#(y)" font-size="\#(size)" font-weight="\#(weight)" fill="\#(fill)" "#
                + #"text-anchor="\#(anchor)">\#(escape(text))</text>"#)
    }

    /// A number with two digits behind the point: what no locale and no version of a library writes otherwise.
    private func decimal(_ number: Double) -> String {
        let hundredths = Int((number * 100).rounded())
        let (whole, rest) = hundredths.quotientAndRemainder(dividingBy: 100)
        if rest == 0 { return "\(whole)" }
        return rest % 10 == 0 ? "\(whole).\(rest / 10)" : rest < 10 ? "\(whole).0\(rest)" : "\(whole).\(rest)"
    }

    /// Text between tags: what XML 1.0 cannot hold becomes U+FFFD.
    private func escape(_ text: String) -> String {
        var result = ""
        for scalar in text.unicodeScalars {
            switch scalar {
            case "&": result += "&amp;"
            case "<": result += "&lt;"
            case ">": result += "&gt;"
            case "\"": result += "&quot;"
            case "'": result += "&#39;"
            case "\u{FFFE}", "\u{FFFF}", "\u{0}"..."\u{1F}", "\u{7F}"..."\u{9F}": result += "\u{FFFD}"
            default: result.unicodeScalars.append(scalar)
            }
        }
        return result
    }
}

/// The colour of a shade: of each kind as much as there is of it, on the ground of what is absent.
private struct SVGColour {
    private typealias RGB = (red: Int, green: Int, blue: Int)
    private static let data: RGB = (37, 99, 173)
    private static let encoded: RGB = (124, 77, 168)
    private static let zero: RGB = (240, 190, 92)
    private static let absent: RGB = (238, 241, 245)

    let hex: String

    init(_ shade: ChainPicture.Shade) {
        let parts = [(Int(shade.data), Self.data), (Int(shade.encoded), Self.encoded), (Int(shade.zero), Self.zero)]
        let held = parts.reduce(0) { $0 + $1.0 }
        let steps = max(Int(ChainPicture.Shade.steps), held)
        // What is there at all shows: a sixteenth looks like a quarter.
        let boosted = held == 0 ? 0 : min(steps, held * 3 / 4 + steps / 4)
        func mix(_ channel: (RGB) -> Int) -> Int {
            guard held > 0 else { return channel(Self.absent) }
            let colour = parts.reduce(0) { $0 + $1.0 * channel($1.1) } / held
            return (colour * boosted + channel(Self.absent) * (steps - boosted)) / steps
        }
        func digits(_ value: Int) -> String {
            let text = String(max(0, min(255, value)), radix: 16)
            return text.count == 1 ? "0" + text : text
        }
        hex = "#" + digits(mix(\.red)) + digits(mix(\.green)) + digits(mix(\.blue))
    }
}
