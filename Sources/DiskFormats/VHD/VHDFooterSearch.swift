internal import DiskImage
internal import DiskStorage

/// Finds the footer that counts: the one at the file's end, or the copy at its beginning, whichever is whole.
struct VHDFooterSearch {
    /// The footer.
    let footer: VHDFooter
    /// Its 512 bytes, as they belong into the file.
    let bytes: [UInt8]
    /// Where the footer at the end lies; nil if there is none that is whole.
    let endOffset: UInt64?
    /// Where one lies that is damaged.
    let damagedEndOffset: UInt64?
    /// Whether it has 511 bytes.
    let isShort: Bool
    /// What is wrong with the one or the other.
    let damages: [VHDDamage]

    /// What stands in one of the two places.
    private enum Found {
        case nothing
        case damaged(String)
        case whole(VHDFooter, [UInt8])

        init(_ bytes: [UInt8]) {
            guard VHDFooter.hasCookie(bytes) else {
                self = .nothing
                return
            }
            do throws(DiskError) {
                let footer = try VHDFooter(parsing: bytes)
                self = VHDFooter.hasRightChecksum(bytes) ? .whole(footer, bytes) : .damaged("its checksum is wrong")
            } catch {
                self = .damaged(error.message)
            }
        }
    }

    init(_ storage: any Storage, length: UInt64) throws(DiskError) {
        let count = UInt64(VHDFooter.byteCount)
        guard length >= count else {
            throw DiskError(.invalidImage, "the file has \(length) bytes: too few for a footer")
        }
        let tail = try storage.bytes(at: length - count, count: VHDFooter.byteCount, for: .footer, "the footer")
        let head = Found(try storage.bytes(at: 0, count: VHDFooter.byteCount, for: .header, "the footer's copy"))
        let shortTail = Array(tail.dropFirst()) + [0]
        isShort = !VHDFooter.hasCookie(tail) && VHDFooter.hasCookie(shortTail)
        let end = Found(isShort ? shortTail : tail)
        let place = length - count + (isShort ? 1 : 0)
        if case .damaged = end { damagedEndOffset = place } else { damagedEndOffset = nil }

        switch (end, head) {
        case (.whole(let footer, let bytes), let copy):
            (self.footer, self.bytes, endOffset) = (footer, bytes, place)
            damages = Self.damages(of: copy, besides: footer, bytes)
        case (let end, .whole(let footer, let bytes)) where footer.type != .fixed:
            (self.footer, self.bytes, endOffset) = (footer, bytes, nil)
            damages = storage.traits.hasFixedLength ? [] : [Self.damage(ofEnd: end, at: place)]
        default:
            // A fixed image has no copy; but where nothing but the checksum is wrong, there is no doubt what it is.
            let bytes = VHDFooter.withChecksum(isShort ? shortTail : tail)
            guard case .damaged(let why) = end, let footer = try? VHDFooter(parsing: bytes), footer.type == .fixed,
                footer.currentSize == place
            else { throw DiskError(.invalidImage, Self.explanation(end, head), offset: place) }
            (self.footer, self.bytes, endOffset) = (footer, bytes, place)
            damages = [VHDDamage(.endFooter, "the footer at byte \(place) is damaged: \(why)")]
        }
    }

    private static func damages(of copy: Found, besides footer: VHDFooter, _ bytes: [UInt8]) -> [VHDDamage] {
        guard footer.type != .fixed else { return [] }
        switch copy {
        case .nothing: return [VHDDamage(.footerCopy, "the footer's copy at byte 0 is missing")]
        case .damaged(let why): return [VHDDamage(.footerCopy, "the footer's copy at byte 0 is damaged: \(why)")]
        case .whole(_, let other):
            return other == bytes ? [] : [VHDDamage(.footerCopy, "the footer's copy at byte 0 is not the footer's")]
        }
    }

    private static func damage(ofEnd end: Found, at place: UInt64) -> VHDDamage {
        switch end {
        case .damaged(let why):
            VHDDamage(.endFooter, "the footer at byte \(place) is damaged (\(why)): its copy at byte 0 is used")
        default:
            VHDDamage(.endFooter, "there is no footer at the file's end: its copy at byte 0 is used")
        }
    }

    private static func explanation(_ end: Found, _ head: Found) -> String {
        switch (end, head) {
        case (.damaged(let why), .damaged(let other)): "both footers are damaged: at the end \(why), at byte 0 \(other)"
        case (.damaged(let why), _): "the footer at the end is damaged (\(why)), and there is no copy of it at byte 0"
        case (_, .damaged(let why)): "there is no footer at the end, and its copy at byte 0 is damaged: \(why)"
        default: "there is no footer at the file's end: it is no VHD, or the file was cut short"
        }
    }
}

/// Something that is wrong with an image's headers, and can be put right from what is whole.
struct VHDDamage: Sendable {
    enum Part: Sendable {
        case endFooter
        case footerCopy
        case dynamicHeader
    }

    let part: Part
    /// What is wrong.
    let message: String

    init(_ part: Part, _ message: String) {
        self.part = part
        self.message = message
    }
}
