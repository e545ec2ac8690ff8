//! The program `farfork`; everything is in the library of the same name.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    farfork::cli::main()
}
