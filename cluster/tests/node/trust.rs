//! Certificates of other nodes: given, kept, taken away; on disk as in memory.

use std::collections::BTreeSet;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use farfork::node::DataDirectory;
use farfork::node::fake_network::{FakeCertificates, certificate};
use farfork::node::trust::{Certificate, CertificateError, Certificates, TrustError, TrustStore, Trusted};
use serde_json::{Value, json};
use types::{Digest, NodeId, Tenant};
use uuid::Uuid;

use crate::support::{Node, Said};

/// Notes who is let in.
struct Door {
    certificates: FakeCertificates,
    open_for: Mutex<BTreeSet<Digest>>,
}

impl Certificates for Door {
    fn own(&self) -> Certificate {
        self.certificates.own()
    }

    fn parse(&self, pem: &str) -> Result<Certificate, CertificateError> {
        self.certificates.parse(pem)
    }

    fn accept(&self, trusted: &Trusted) {
        self.open_for.lock().unwrap().insert(trusted.certificate.fingerprint);
    }

    fn withdraw(&self, certificate: &Certificate) {
        assert!(self.open_for.lock().unwrap().remove(&certificate.fingerprint), "it was accepted");
    }
}

impl Door {
    fn new() -> Arc<Self> {
        let certificates = FakeCertificates::new(of_node(0xA, 3_600));
        Arc::new(Self { certificates, open_for: Mutex::default() })
    }

    fn open_for(&self) -> BTreeSet<Digest> {
        self.open_for.lock().unwrap().clone()
    }
}

fn of_node(number: u128, seconds: u64) -> Certificate {
    certificate(NodeId::from_uuid(Uuid::from_u128(number)), SystemTime::now() + Duration::from_secs(seconds))
}

fn tenants(names: &[&str]) -> BTreeSet<Tenant> {
    names.iter().map(|name| name.parse().unwrap()).collect()
}

fn open(path: &Path, door: &Arc<Door>) -> Result<TrustStore, TrustError> {
    let data = DataDirectory::open(path).unwrap();
    TrustStore::open(data.trust(), Arc::clone(door) as Arc<dyn Certificates>)
}

#[test]
fn whom_a_node_trusts_survives_a_restart_and_is_let_in_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let door = Door::new();
    let trust = open(directory.path(), &door).unwrap();
    let (b, c) = (of_node(0xB, 3_600), of_node(0xC, 3_600));
    trust.add(&b.pem, tenants(&["default", "team-7"])).unwrap();
    trust.add(&c.pem, tenants(&["default"])).unwrap();
    assert_eq!(door.open_for(), BTreeSet::from([b.fingerprint, c.fingerprint]));
    assert!(trust.allows(b.node, &"team-7".parse().unwrap()) && !trust.allows(c.node, &"team-7".parse().unwrap()));
    let file = directory.path().join(format!("trust/{}.pem", b.node));
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), format!("farfork-tenants: default,team-7\n{}", b.pem));

    // Nobody takes a node's place by claiming to be that node.
    let newer = of_node(0xB, 7_200);
    let error = trust.add(&newer.pem, tenants(&["default"])).unwrap_err();
    assert_eq!(error.code(), "OTHER_CERTIFICATE");
    assert_eq!(door.open_for(), BTreeSet::from([b.fingerprint, c.fingerprint]));
    // The same certificate again, with text around it: the tenants are new.
    trust.add(&format!("of node B\n{}{}", b.pem, c.pem), tenants(&["team-8"])).unwrap();
    assert!(!trust.allows(b.node, &"team-7".parse().unwrap()) && trust.allows(b.node, &"team-8".parse().unwrap()));
    trust.remove(&b.node.to_string()).unwrap();
    trust.add(&newer.pem, tenants(&["team-8"])).unwrap();
    trust.remove(&c.node.to_string()).unwrap();
    assert_eq!(door.open_for(), BTreeSet::from([newer.fingerprint]));
    let listed = trust.list();
    drop(trust);

    let door = Door::new();
    let again = open(directory.path(), &door).unwrap();
    assert_eq!(again.list(), listed);
    assert_eq!(door.open_for(), BTreeSet::from([newer.fingerprint]));
    assert_eq!(std::fs::read_dir(directory.path().join("trust")).unwrap().count(), 1, "nothing else is left");
}

#[test]
fn what_is_no_other_nodes_certificate_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let door = Door::new();
    let trust = open(directory.path(), &door).unwrap();
    let good = of_node(0xB, 3_600).pem;
    let long = format!("{}{good}", " ".repeat(TrustStore::PEM_BYTES_MAX));
    let many: BTreeSet<Tenant> = (0..=TrustStore::TENANTS_MAX).map(|number| format!("t{number}").parse().unwrap()).collect();
    let one = || tenants(&["default"]);
    let cases = [
        (trust.add("", one()), "BAD_CERTIFICATE"),
        (trust.add(&good[..good.len() - 2], one()), "BAD_CERTIFICATE"),
        (trust.add(&long, one()), "BAD_CERTIFICATE"),
        (trust.add(&trust.own().pem, one()), "BAD_CERTIFICATE"),
        (trust.add(&of_node(0xC, 0).pem, one()), "BAD_CERTIFICATE"),
        (trust.add(&good, tenants(&[])), "BAD_TENANT"),
        (trust.add(&good, many), "BAD_TENANT"),
        (trust.remove("0000"), "UNKNOWN_NODE"),
        (trust.remove("../x"), "BAD_ID"),
    ];
    for (outcome, code) in cases {
        let error = outcome.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert!(!error.remedy().is_empty(), "{error}");
    }
    assert!(trust.list().is_empty() && door.open_for().is_empty());
    assert_eq!(std::fs::read_dir(directory.path().join("trust")).unwrap().count(), 0);
}

#[test]
fn ends_of_ids_that_several_nodes_have_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let trust = open(directory.path(), &Door::new()).unwrap();
    for number in [0x1_5555, 0x2_5555] {
        trust.add(&of_node(number, 3_600).pem, tenants(&["default"])).unwrap();
    }
    assert!(matches!(trust.remove("5555"), Err(TrustError::Ambiguous { count: 2, .. })));
    assert_eq!(trust.remove("15555").unwrap().certificate.node, NodeId::from_uuid(Uuid::from_u128(0x1_5555)));
}

#[test]
fn a_damaged_file_keeps_everybody_out_and_is_named() {
    let good = of_node(0xB, 3_600);
    let name = format!("{}.pem", good.node);
    let other = format!("{}.pem", NodeId::from_uuid(Uuid::from_u128(0xC)));
    let whole = format!("farfork-tenants: default\n{}", good.pem);
    let cases: &[(&str, &[u8])] = &[
        (&name, b""),
        (&name, good.pem.as_bytes()),
        (&name, &whole.as_bytes()[..whole.len() - 2]),
        (&name, b"farfork-tenants: \n"),
        (&name, b"\xff\xfe"),
        (&name, &vec![b' '; 1 << 20]),
        (&other, whole.as_bytes()),
    ];
    for (file, bytes) in cases {
        let directory = tempfile::tempdir().unwrap();
        drop(DataDirectory::open(directory.path()).unwrap());
        std::fs::write(directory.path().join("trust").join(file), bytes).unwrap();
        let door = Door::new();
        let error = open(directory.path(), &door).err().unwrap();
        assert!(error.to_string().contains(file) && error.code() == "STORE", "{error}");
        assert!(door.open_for().is_empty());
    }
    // A link is not followed, wherever it leads; what was not written to its end is nobody's.
    let directory = tempfile::tempdir().unwrap();
    drop(DataDirectory::open(directory.path()).unwrap());
    let elsewhere = directory.path().join("elsewhere");
    std::fs::write(&elsewhere, &whole).unwrap();
    std::fs::write(directory.path().join("trust").join(format!("{other}.new")), b"half").unwrap();
    assert!(open(directory.path(), &Door::new()).unwrap().list().is_empty());
    symlink(&elsewhere, directory.path().join("trust").join(&name)).unwrap();
    assert!(matches!(open(directory.path(), &Door::new()), Err(TrustError::Io { .. })));
}

#[test]
fn the_command_line_exchanges_certificates() {
    let (a, b) = (Node::start(""), Node::start(""));
    let shown = a.cli(&["trust", "show"]);
    assert!(shown.out.starts_with("-----BEGIN CERTIFICATE-----\n") && shown.err.contains("valid for"), "{shown:?}");
    let own = a.json(&["trust", "show"]);
    assert_eq!(own["pem"].as_str(), Some(shown.out.as_str()));
    let file = a.path().join("a.pem");
    std::fs::write(&file, &shown.out).unwrap();
    let added = b.json(&["trust", "add", file.to_str().unwrap(), "--tenant", "team-7", "--tenant", "default"]);
    assert_eq!(added["tenants"], json!(["default", "team-7"]));
    assert_eq!(b.json(&["trust", "ls"])["nodes"], json!([added]));
    let id = own["node"].as_str().unwrap();
    assert!(b.cli(&["trust", "ls"]).out.contains(id));
    let themselves = a.cli(&["trust", "add", file.to_str().unwrap(), "--output", "json"]);
    assert_eq!((themselves.code, themselves.error_code().as_str()), (Some(2), "BAD_CERTIFICATE"));
    let refused = b.cli(&["trust", "rm", "0000", "--output", "json"]);
    assert_eq!((refused.code, refused.error_code().as_str()), (Some(4), "UNKNOWN_NODE"));
    assert_eq!(b.cli(&["trust", "rm", &id[28..]]).out, format!("{id}\n"));
    assert_eq!(b.json(&["trust", "ls"]), json!({"nodes": []}));

    let piped = add_from_stdin(&b, shown.out.as_bytes());
    assert_eq!(piped.code, Some(0), "{piped:?}");
    let again = Node::start_in(b.crash(), &["--fake-engine", ""]);
    let kept: Value = again.json(&["trust", "ls"]);
    assert_eq!((&kept["nodes"][0]["certificate"], &kept["nodes"][0]["tenants"]), (&own, &json!(["default"])));
    let endless = add_from_stdin(&again, &vec![b'x'; 1 << 20]);
    assert_eq!(endless.code, Some(2), "{endless:?}");
}

fn add_from_stdin(node: &Node, bytes: &[u8]) -> Said {
    let mut command: Command = node.command(&["trust", "add", "-"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // It may have read enough before the end.
    let _ = child.stdin.take().unwrap().write_all(bytes);
    Said::of(child.wait_with_output().unwrap())
}
