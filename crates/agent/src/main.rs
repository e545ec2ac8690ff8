//! `/init` of a guest's initial RAM disk.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    agent::guest::main()
}
