/// The version of this package.
public let programVersion = "0.1.0"
