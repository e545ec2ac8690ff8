//! The zygote of this crate's tests, which have no node whose program it could be.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    vm::worker::zygote::main()
}
