//! Programs in Linux guests of one node, run by word of another. (Names that begin with `real_`: see the tests of Linux guests.)

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use super::stage::Cluster;
use crate::linux::{BASE, exec, fork, provide};
use crate::support::{Node, Said, eventually, wait};

/// How long the API waits for a client that does not read its answer.
const WRITE_DEADLINE: Duration = Duration::from_secs(10);
const MIB: usize = 1 << 20;

/// A command that runs a program in a machine, by word of this node.
fn running(node: &Node, machine: &str, program: &str) -> Child {
    let mut command = node.command(&["exec", machine, "-i", "--", "sh", "-c", program]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn real_programs_run_in_machines_of_other_nodes() {
    let mut cluster = Cluster::new("execs", 3, 3);
    provide(cluster.node(1), BASE);
    let machine = fork(cluster.node(1), BASE, 1).remove(0);
    {
        let node = cluster.node(0);
        let said = node.cli(&["exec", &machine, "--", "uname", "-a"]);
        assert!(said.code == Some(0) && said.out.starts_with("Linux m-"), "{said:?}");
        assert_eq!(exec(node, &machine, "exit 7").code, Some(7));
        assert_eq!(exec(node, &machine, "kill -9 $$").code, Some(128 + 9));
        assert_eq!(node.cli(&["exec", &machine, "--", "no-such-program"]).code, Some(127));
        let said = exec(node, &machine, "echo out; echo err >&2");
        assert_eq!((said.out.as_str(), said.err.as_str()), ("out\n", "err\n"));
        // More than all pipes and windows on the way hold, there and back.
        let mut fed = running(node, &machine, "cat");
        let mut input = fed.stdin.take().unwrap();
        let feeding = std::thread::spawn(move || input.write_all(&vec![b'x'; MIB]));
        let output = fed.wait_with_output().unwrap();
        assert!(output.status.success() && output.stdout == vec![b'x'; MIB], "{} bytes", output.stdout.len());
        feeding.join().unwrap().unwrap();
        // Who reads late gets all of it, however late: nobody on the way loses patience.
        let mut slow = running(node, &machine, "dd if=/dev/zero bs=65536 count=128 2>/dev/null");
        std::thread::sleep(WRITE_DEADLINE * 2);
        let mut read = Vec::new();
        slow.stdout.take().unwrap().read_to_end(&mut read).unwrap();
        assert_eq!((read.len(), wait(&mut slow).code()), (8 * MIB, Some(0)));
        // Files go the same way.
        let here = tempfile::tempdir().unwrap();
        std::fs::write(here.path().join("file"), vec![7; 300_000]).unwrap();
        let file = here.path().join("file");
        let copied = node.cli(&["cp", file.to_str().unwrap(), &format!("{machine}:/root")]);
        assert_eq!(copied.code, Some(0), "{copied:?}");
        let back = tempfile::tempdir().unwrap();
        let copied = node.cli(&["cp", &format!("{machine}:/root/file"), back.path().to_str().unwrap()]);
        assert_eq!(copied.code, Some(0), "{copied:?}");
        assert_eq!(std::fs::read(back.path().join("file")).unwrap(), vec![7; 300_000]);
    }
    // Its node dies in the middle.
    let mut cut = running(cluster.node(0), &machine, "echo on; sleep 1000");
    let mut output = BufReader::new(cut.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "on\n");
    let killed = Instant::now();
    cluster.crash(1);
    let status = wait(&mut cut);
    println!("told after {:?}", killed.elapsed());
    let mut error = String::new();
    cut.stderr.take().unwrap().read_to_string(&mut error).unwrap();
    assert!(status.code() == Some(125) && error.contains("broke off"), "{status}: {error}");
    // Asked again, it says that nobody has it.
    let mut said: Option<Said> = None;
    eventually("nobody has it", || {
        let asked = cluster.node(0).cli(&["exec", &machine, "--", "true"]);
        let is_told = asked.err.contains("no machine");
        said = Some(asked);
        is_told
    });
    assert_eq!(said.unwrap().code, Some(125));
}
