public import ArgumentParser
internal import CLinux
internal import Glibc

/// What the programs have in common from their start to their end.
public enum Program {
    /// Ends the program if one of its arguments is no UTF-8. They are text from then on; a name that is none would
    /// become that of another file.
    public static func expectText(_ program: String) {
        for index in 1..<max(1, Int(CommandLine.argc)) {
            guard let argument = unsafe CommandLine.unsafeArgv[index],
                unsafe String(validatingCString: argument) == nil
            else { continue }
            let shown = unsafe String(cString: argument)
            report(
                "\(program): argument \(index), '\(shown)', is no UTF-8, and such names are not supported: rename the "
                    + "file or its folder, or name it by a link")
            exit(ExitCode.validationFailure.rawValue)
        }
    }

    /// Parses the arguments and runs the command, as `Command.main(_:)` does; what could not be written to standard
    /// output makes the program fail.
    public static func run<Command: ParsableCommand>(
        _ command: Command.Type, named program: String, _ arguments: [String]
    ) -> Never {
        do {
            var parsed = try command.parseAsRoot(arguments)
            try parsed.run()
        } catch {
            let code = command.exitCode(for: error)
            let text = command.fullMessage(for: error)
            if !code.isSuccess {
                if !text.isEmpty { report(text) }
                _ = hasWrittenOutput(program)
                exit(code.rawValue)
            }
            if !text.isEmpty, !write(text, to: STDOUT_FILENO) {
                reportLostOutput(program, errno)
                exit(1)
            }
        }
        exit(hasWrittenOutput(program) ? 0 : 1)
    }

    /// Whether all that was printed has reached standard output; says what was wrong if not.
    public static func hasWrittenOutput(_ program: String) -> Bool {
        let result = clinux_flush_output()
        if result != 0 { reportLostOutput(program, -result) }
        return result == 0
    }

    private static func reportLostOutput(_ program: String, _ number: Int32) {
        var text = [CChar](repeating: 0, count: 128)
        unsafe text.withUnsafeMutableBufferPointer { unsafe clinux_strerror(number, $0.baseAddress, $0.count) }
        let reason = String(decoding: text.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
        report("\(program): cannot write to standard output: \(reason)")
    }

    private static func report(_ text: String) { _ = write(text, to: STDERR_FILENO) }

    /// Writes a line; false: not all of it could be written.
    private static func write(_ text: String, to descriptor: Int32) -> Bool {
        let line = Array((text + "\n").utf8)
        var done = 0
        while done < line.count {
            let result = unsafe line[done...].withUnsafeBytes {
                unsafe Glibc.write(descriptor, $0.baseAddress, $0.count)
            }
            if result > 0 { done += result } else if errno != EINTR { return false }
        }
        return true
    }
}
