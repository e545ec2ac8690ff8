//! No two children are alike: and each step after a fork is what makes it so.

use std::collections::BTreeMap;

use vm::harness::{count, held};

use super::{PYTHON, Shared, fork, provide};
use crate::support::Node;

/// What must differ, by name, as a Python expression gives it.
const FIELDS: [&str; 5] = ["kernel", "random", "uuid", "hostname", "machine-id"];
const WHO: &str = "' '.join([__import__('os').urandom(16).hex(), str(random.getrandbits(128)), str(uuid.uuid4()), \
                   socket.gethostname(), open('/etc/machine-id').read().strip()])";

/// For each field, how many children had a value that another one had, too.
fn duplicates(node: &Node, template: Shared, children: u64) -> BTreeMap<&'static str, u64> {
    let mut seen: BTreeMap<(usize, String), u64> = BTreeMap::new();
    let mut left = children;
    while left > 0 {
        // As many at a time as there is memory for.
        let some = left.min(50);
        for child in fork(node, template, some) {
            let said = super::eval(node, &child, WHO);
            for (number, value) in said.trim_matches('\'').split(' ').enumerate() {
                *seen.entry((number, value.to_owned())).or_default() += 1;
            }
        }
        assert_eq!(node.cli(&["kill", "--all"]).code, Some(0));
        left -= some;
    }
    let mut duplicates: BTreeMap<&'static str, u64> = FIELDS.iter().map(|field| (*field, 0)).collect();
    for ((number, _), times) in seen {
        *duplicates.get_mut(FIELDS[number]).unwrap() += if times > 1 { times } else { 0 };
    }
    duplicates
}

#[test]
fn real_children_have_nothing_in_common_that_should_be_their_own() {
    let node = super::node_with(PYTHON);
    let children = count(50, 1000);
    let duplicates = duplicates(&node, PYTHON, children);
    assert!(duplicates.values().all(|duplicates| *duplicates == 0), "{duplicates:?}");
    held("Linux children without anything in common", children);
}

/// The test above fails without what it tests.
#[test]
fn real_children_are_alike_where_the_steps_after_the_fork_are_left_out() {
    let node = Node::start_leaving_out("rng,main,hostname,machine-id");
    provide(&node, PYTHON);
    let duplicates = duplicates(&node, PYTHON, 6);
    // The kernel's own generator is stirred by the guest's devices as well, so it may differ without its step.
    for field in ["random", "hostname", "machine-id"] {
        assert_eq!(duplicates[field], 6, "{duplicates:?}");
    }
}

/// Numbers of OpenSSL's generator in branches of a machine whose main process has used it.
fn openssl_of_branches(node: &Node) -> Vec<String> {
    let draw = |machine: &str| super::eval(node, machine, "__import__('ssl').RAND_bytes(16).hex()");
    let parent = fork(node, PYTHON, 1).remove(0);
    draw(&parent);
    let branched = node.json(&["branch", &parent, "-n", "3"]);
    crate::support::ids(&branched["children"]).iter().map(|child| draw(child)).collect()
}

/// It asks the kernel once, and then only in a process with another id: a branch has to tell it.
#[test]
fn real_branches_draw_numbers_of_their_own_from_openssl() {
    let node = super::node_with(PYTHON);
    let numbers = openssl_of_branches(&node);
    let different: std::collections::BTreeSet<_> = numbers.iter().collect();
    assert_eq!(different.len(), 3, "{numbers:?}");
    let node = Node::start_leaving_out("rng,main");
    provide(&node, PYTHON);
    let numbers = openssl_of_branches(&node);
    assert!(numbers.iter().all(|number| *number == numbers[0]), "alike without the step: {numbers:?}");
}
