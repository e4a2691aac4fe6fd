extension String {
    /// The text as a line for people: what acts on a terminal (control characters) is shown as `?`. With a `limit`,
    /// after so many Unicode scalars it ends in `…`.
    ///
    /// Names, comments and paths that come from an image may hold anything.
    public func printable(limit: Int = .max) -> String {
        let scalars = unicodeScalars.prefix(limit)
        var result = ""
        for scalar in scalars {
            result.unicodeScalars.append(scalar.properties.generalCategory == .control ? "?" : scalar)
        }
        return scalars.endIndex < unicodeScalars.endIndex ? result + "…" : result
    }
}
