import DiskStorage

/// Prints what is known of something, a line each: a title, and the value in a column of its own.
func printRows(_ rows: [(title: String, value: String)]) {
    let width = rows.map(\.title.count).max() ?? 0
    for (title, value) in rows {
        print(title + ":" + String(repeating: " ", count: width - title.count + 1) + value.printable())
    }
}
