import ArgumentParser
import DiskStorage
import Dispatch
import Glibc

/// What every command that may take long has.
struct ProgressOptions: ParsableArguments {
    @Flag(help: "Say nothing on success, and show no progress.") var quiet = false

    /// Runs `body`, shows how far it is, and asks it to stop on SIGINT and SIGTERM; errors are reported as everywhere.
    func run(_ body: (OperationControl) throws(DiskError) -> Void) throws {
        let display = quiet ? nil : ProgressDisplay()
        let control = OperationControl { display?.show($0) }
        let signals = [SIGINT, SIGTERM].map { number in
            signal(number, SIG_IGN)  // the source below gets it
            let source = DispatchSource.makeSignalSource(signal: number, queue: .global(qos: .userInitiated))
            source.setEventHandler { control.cancel() }
            source.activate()
            return source
        }
        defer { for source in signals { source.cancel() } }
        try reportingErrors { () throws(DiskError) in
            defer { display?.finish() }
            try body(control)
        }
    }
}

/// A bar on a terminal, one line a tenth elsewhere; on standard error, since standard output may be an image.
final class ProgressDisplay: Sendable {
    private struct State {
        var phase = ""
        var began = ContinuousClock.now
        var shown = ContinuousClock.now - .seconds(1)
        var tenth = 0
        var hasBar = false
    }

    private let state = Locked(State())
    private let isTerminal = isatty(STDERR_FILENO) == 1

    func show(_ progress: OperationProgress) {
        state.withLock { state in
            let now = ContinuousClock.now
            if progress.phase != state.phase {
                endBar(&state)
                state = State(phase: progress.phase, began: now)
            }
            if isTerminal { showBar(progress, now, &state) } else { showTenth(progress, &state) }
        }
    }

    /// Ends the line of the bar, if there is one.
    func finish() { state.withLock { endBar(&$0) } }

    private func endBar(_ state: inout State) {
        guard state.hasBar else { return }
        state.hasBar = false
        put("\n")
    }

    private func showTenth(_ progress: OperationProgress, _ state: inout State) {
        let tenth = Int(progress.fraction * 10)
        guard tenth > state.tenth, progress.total > 0 else { return }
        state.tenth = tenth
        put("\(progress.phase): \(tenth * 10) %\n")
    }

    private func showBar(_ progress: OperationProgress, _ now: ContinuousClock.Instant, _ state: inout State) {
        let isDone = progress.done == progress.total
        guard now - state.shown > .milliseconds(100) || isDone && state.hasBar else { return }
        state.shown = now
        state.hasBar = true
        let width = 30
        let filled = Int(progress.fraction * Double(width))
        let bar = String(repeating: "#", count: filled) + String(repeating: "-", count: width - filled)
        let elapsed = now - state.began
        let seconds = Double(elapsed.components.seconds) + Double(elapsed.components.attoseconds) / 1e18
        var line = "\r\(progress.phase) [\(bar)] \(Int(progress.fraction * 100)) %"
        if seconds > 0.5, progress.done > 0 {
            let rate = Double(progress.done) / seconds
            let left = Int(Double(progress.total - progress.done) / rate)
            line += "  \(Int(rate / 1_048_576)) MiB/s  \(left / 60):\(left % 60 < 10 ? "0" : "")\(left % 60) left"
        }
        put(line + "\u{1B}[K")
    }

    private func put(_ text: String) {
        let bytes = Array(text.utf8)
        _ = unsafe bytes.withUnsafeBytes { unsafe write(STDERR_FILENO, $0.baseAddress, $0.count) }
    }
}
