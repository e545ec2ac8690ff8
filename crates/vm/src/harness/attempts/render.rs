//! The generated parts of `docs/security.md`.

use std::fmt::Write;

use super::{Case, Given, Refusal, Thread, cases};
use crate::jail::Mechanism;
use crate::jail::syscalls::{Allowed, Arguments, CONTROL, FIRST_PARENT, VCPU, ZYGOTE};

/// The tables of system calls, in Markdown.
#[must_use]
pub fn render_syscalls() -> String {
    let mut page = String::new();
    for (title, table) in [
        ("A vCPU's thread", VCPU),
        ("The control thread, and copiers", CONTROL),
        ("The builder of a first parent, besides what the control thread may", FIRST_PARENT),
        ("The zygote and the builders of shells, besides what all of the above may", ZYGOTE),
    ] {
        section(&mut page, title, "| system call | arguments | why |\n|---|---|---|");
        for Allowed { name, arguments, why, .. } in table {
            line(&mut page, &format!("| `{name}` | {} | {why} |", describe(*arguments)));
        }
    }
    page
}

fn describe(arguments: Arguments) -> String {
    match arguments {
        Arguments::Any => "any".to_owned(),
        Arguments::OneOf(index, values) => {
            let names: Vec<String> = values.iter().map(|(name, _)| format!("`{}`", name.replace('|', "\\|"))).collect();
            format!("{}: {}", ordinal(index), names.join(", "))
        }
        Arguments::Kick(index) => format!("{}: the signal that brings a vCPU out of the guest (`SIGRTMIN`)", ordinal(index)),
    }
}

fn ordinal(index: u8) -> &'static str {
    ["first", "second", "third", "fourth", "fifth", "sixth"].get(usize::from(index)).copied().unwrap_or("last")
}

/// The cases, by who refuses them, in Markdown.
///
/// # Panics
/// If a case is refused with an error that has no name here.
#[must_use]
pub fn render_cases() -> String {
    let mut page = String::new();
    let (strict, layered): (Vec<&Case>, Vec<&Case>) = cases().partition(|case| case.behind.is_empty());
    line(&mut page, &format!("\n{} cases, {} of them with nothing in front.", strict.len() + layered.len(), strict.len()));
    for mechanism in Mechanism::ALL.into_iter().rev() {
        let head = "| case | thread | what is tried | given | behind | refused with |\n|---|---|---|---|---|---|";
        section(&mut page, &format!("Refused by {mechanism:?}"), head);
        for Case { name, what, thread, behind, refusal, given, .. } in cases().filter(|case| case.refused_by == mechanism) {
            let behind: Vec<String> = behind.iter().map(|mechanism| format!("{mechanism:?}")).collect();
            let thread = match thread {
                Thread::Control => "control",
                Thread::Vcpu => "vCPU",
            };
            let given = if *given == Given::Nothing { String::new() } else { format!("{given:?}") };
            let refusal = match refusal {
                Refusal::Killed => "SIGSYS".to_owned(),
                Refusal::OutOfMemory => "SIGKILL: out of memory".to_owned(),
                Refusal::Errno(errno) => format!("`{}`", name_of(*errno)),
                Refusal::NoEffect => "no effect".to_owned(),
            };
            line(&mut page, &format!("| {name} | {thread} | {what} | {given} | {} | {refusal} |", behind.join(", ")));
        }
    }
    page
}

/// An error number as the kernel's manual writes it.
fn name_of(errno: i32) -> &'static str {
    match errno {
        libc::EPERM => "EPERM",
        libc::ENOENT => "ENOENT",
        libc::ESRCH => "ESRCH",
        libc::EAGAIN => "EAGAIN",
        libc::ENOMEM => "ENOMEM",
        libc::EACCES => "EACCES",
        libc::EMFILE => "EMFILE",
        libc::EFBIG => "EFBIG",
        libc::ENETUNREACH => "ENETUNREACH",
        libc::ECONNREFUSED => "ECONNREFUSED",
        other => panic!("error {other} has no name here"),
    }
}

fn section(page: &mut String, title: &str, head: &str) {
    line(page, &format!("\n### {title}\n\n{head}"));
}

fn line(page: &mut String, text: &str) {
    writeln!(page, "{text}").expect("a string grows");
}
