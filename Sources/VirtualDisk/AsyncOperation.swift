public import DiskStorage
internal import Dispatch

extension OperationControl {
    /// Runs a long operation beside the caller's task, which may be cancelled: then the operation is, and ends with
    /// `DiskError.Kind.cancelled`.
    ///
    ///     let control = OperationControl { print($0.fraction) }
    ///     try await control.perform { (control) throws(DiskError) in try conversion.run(control) }
    public func perform<Result: Sendable>(
        _ operation: @escaping @Sendable (OperationControl) throws(DiskError) -> Result
    ) async throws(DiskError) -> Result {
        let result = await withTaskCancellationHandler {
            await withCheckedContinuation { continuation in
                DispatchQueue.global().async {
                    continuation.resume(
                        returning: Swift.Result<Result, DiskError> { () throws(DiskError) in try operation(self) })
                }
            }
        } onCancel: {
            cancel()
        }
        return try result.get()
    }
}
