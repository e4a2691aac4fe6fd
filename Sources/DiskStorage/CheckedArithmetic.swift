/// Arithmetic for numbers that came from a file: what would trap with the plain operators is an error here.
extension FixedWidthInteger where Self: Sendable {
    /// `self + other`, or ``DiskError/Kind/invalidImage`` if that does not fit.
    @inlinable
    public func adding(_ other: Self, _ what: StaticString = "an offset") throws(DiskError) -> Self {
        let (value, overflow) = addingReportingOverflow(other)
        if overflow { throw arithmeticError(what) }
        return value
    }

    /// `self - other`, or ``DiskError/Kind/invalidImage`` if that does not fit.
    @inlinable
    public func subtracting(_ other: Self, _ what: StaticString = "an offset") throws(DiskError) -> Self {
        let (value, overflow) = subtractingReportingOverflow(other)
        if overflow { throw arithmeticError(what) }
        return value
    }

    /// `self * other`, or ``DiskError/Kind/invalidImage`` if that does not fit.
    @inlinable
    public func multiplied(by other: Self, _ what: StaticString = "an offset") throws(DiskError) -> Self {
        let (value, overflow) = multipliedReportingOverflow(by: other)
        if overflow { throw arithmeticError(what) }
        return value
    }

    /// The same number in another width, or ``DiskError/Kind/invalidImage`` if it does not fit.
    @inlinable
    public func converted<T: FixedWidthInteger>(
        to type: T.Type = T.self, _ what: StaticString = "a number"
    ) throws(DiskError) -> T {
        guard let value = T(exactly: self) else { throw arithmeticError(what) }
        return value
    }
}

extension FixedWidthInteger where Self: UnsignedInteger {
    /// The quotient rounded up. `divisor` is not zero.
    @inlinable
    public func dividedRoundingUp(by divisor: Self) -> Self {
        let (quotient, remainder) = quotientAndRemainder(dividingBy: divisor)
        return remainder == 0 ? quotient : quotient + 1
    }

    /// The next multiple of `alignment` (a power of two) not below `self`, or nil if that does not fit.
    @inlinable
    public func alignedUp(to alignment: Self) -> Self? {
        let (sum, overflow) = addingReportingOverflow(alignment - 1)
        return overflow ? nil : sum & ~(alignment - 1)
    }

    /// Whether exactly one bit is set.
    @inlinable public var isPowerOfTwo: Bool { nonzeroBitCount == 1 }
}

@usableFromInline
func arithmeticError(_ what: StaticString) -> DiskError {
    DiskError(.invalidImage, "\(what) in the image is out of range")
}
