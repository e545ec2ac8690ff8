//! Users: who may ask over HTTPS, for what, and whose machines each of them reaches.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;

use serde_json::Value;
use tempfile::TempDir;

use super::stage::Cluster;
use crate::support::{PROGRAM, Said};

const HTTPS: [&str; 2] = ["--https", "0.0.0.0:0"];

/// Somebody with contexts of its own, on a host.
struct User<'a> {
    cluster: &'a Cluster,
    host: usize,
    home: TempDir,
}

impl<'a> User<'a> {
    fn on(cluster: &'a Cluster, host: usize) -> Self {
        Self { cluster, host, home: tempfile::tempdir().unwrap() }
    }

    fn cli(&self, arguments: &[&str]) -> Said {
        let mut command = self.cluster.program(self.host, PROGRAM);
        command.env_remove("FARFORK_SOCKET").env("FARFORK_CONFIG", self.home.path().join("config.toml")).args(arguments);
        Said::of(command.stdin(std::process::Stdio::null()).output().unwrap())
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let said = self.cli(&[arguments, &["--output", "json"]].concat());
        assert_eq!(said.code, Some(0), "{arguments:?}: {said:?}");
        serde_json::from_str(&said.out).unwrap()
    }

    /// The code that it is refused with.
    fn refused(&self, arguments: &[&str]) -> String {
        let said = self.cli(&[arguments, &["--output", "json"]].concat());
        assert!(matches!(said.code, Some(3 | 4)), "{arguments:?}: {said:?}");
        said.error_code()
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.home.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    /// A context for what `user add` answered.
    fn context(&self, name: &str, of: &Value, port: u16) -> Said {
        let token = self.file("token", of["token"].as_str().unwrap());
        let url = format!("https://{}:{port}", self.cluster.host_address(self.host));
        let authority = of["authority"].as_str().unwrap();
        let token = token.to_str().unwrap();
        self.cli(&["context", "add", name, "--url", &url, "--authority", authority, "--token-file", token])
    }
}

/// Where a node answers users, as it says itself.
fn port(cluster: &Cluster, host: usize) -> u16 {
    let log = cluster.node(host).log();
    let line = log.lines().find(|line| line.contains("answering users")).unwrap_or_else(|| panic!("{log}"));
    line.rsplit(':').next().unwrap().trim().parse().unwrap()
}

fn two_nodes(name: &str) -> Cluster {
    let mut cluster = Cluster::new(name, 2, 1);
    for host in 0..2 {
        cluster.crash(host);
        cluster.start_with(host, &HTTPS);
    }
    cluster.settles(2, 1);
    cluster
}

fn machine(forked: &Value) -> &str {
    forked["children"][0]["id"].as_str().unwrap()
}

#[test]
fn jobs_are_their_tenants_and_are_run_and_followed_over_https() {
    let mut cluster = Cluster::of_fakes("users-j", 2, 1);
    for host in 0..2 {
        cluster.crash(host);
        cluster.start_with(host, &HTTPS);
    }
    cluster.settles(2, 1);
    cluster.template(0, "warm");
    let node = cluster.node(0);
    let added = |arguments: &[&str]| node.json(&[&["user", "add"], arguments].concat());
    let (ann, ben, eve) = (User::on(&cluster, 1), User::on(&cluster, 1), User::on(&cluster, 1));
    ann.context("c", &added(&["ann", "--level", "submit", "--tenant", "default"]), port(&cluster, 1));
    ben.context("c", &added(&["ben", "--level", "read", "--tenant", "default"]), port(&cluster, 1));
    eve.context("c", &added(&["eve", "--level", "submit", "--tenant", "team-7"]), port(&cluster, 1));
    let run = ann.cli(&["run", "warm", "-n", "20", "--name", "hers", "--", "echo", "{index}"]);
    assert_eq!(run.code, Some(0), "{run:?}");
    let mut said: Vec<String> = run
        .out
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["stdout"].as_str().unwrap().trim().to_owned())
        .collect();
    said.sort_by_key(|text| text.parse::<u32>().unwrap());
    assert_eq!(said, (0..20).map(|task| task.to_string()).collect::<Vec<_>>());
    assert!(run.err.contains("20 succeeded, 0 failed"), "{run:?}");
    let failed = ann.cli(&["run", "warm", "--input", "0", "--input", "3", "--", "exit", "{input}"]);
    assert_eq!(failed.code, Some(5), "{failed:?}");
    let jobs = ben.json(&["job", "ls"]);
    let id = jobs["jobs"][0]["id"].as_str().unwrap();
    assert_eq!((&jobs["jobs"][0]["name"], &jobs["jobs"][0]["submitted_by"]), (&"hers".into(), &"user ann".into()));
    assert_eq!(ben.cli(&["job", "logs", id, "7"]).out, "7\n");
    assert_eq!(ben.json(&["explain", id, "7"])["state"], "ended");
    assert_eq!(
        (ben.refused(&["job", "cancel", id]), ben.refused(&["job", "rm", id])),
        ("FORBIDDEN".into(), "FORBIDDEN".into())
    );
    // What is another tenant's is as unknown as what nobody has.
    let nobodys = "00000000-0000-7000-8000-000000000001";
    for verb in
        [&["job", "show"][..], &["job", "cancel"], &["job", "rm"], &["job", "results"], &["job", "wait"], &["job", "attach"]]
    {
        let [theirs, none] = [id, nobodys].map(|id| {
            let said = eve.cli(&[verb, &[id, "--output", "json"]].concat());
            assert_ne!(said.code, Some(0), "{verb:?}: {said:?}");
            (said.code, said.err.replace(id, "ID"))
        });
        assert_eq!(theirs, none, "{verb:?}");
    }
    assert_eq!(eve.json(&["job", "ls"])["jobs"].as_array().unwrap().len(), 0);
    assert_eq!(eve.refused(&["run", "default/warm", "-n", "1", "--eval", "1"]), "UNKNOWN_TEMPLATE");
    assert_eq!(ann.cli(&["job", "rm", id]).code, Some(0));
    assert_eq!(ben.json(&["job", "ls"])["jobs"].as_array().unwrap().len(), 1);
}

#[test]
fn users_reach_what_is_their_tenants_and_may_what_their_level_says() {
    let cluster = two_nodes("users");
    let node = cluster.node(0);
    let added = |arguments: &[&str]| node.json(&[&["user", "add"], arguments].concat());
    let (ann, ben, root) = (User::on(&cluster, 0), User::on(&cluster, 0), User::on(&cluster, 1));
    ann.context("c", &added(&["ann", "--level", "submit", "--tenant", "team-7"]), port(&cluster, 0));
    ben.context("c", &added(&["ben", "--level", "read", "--tenant", "team-7"]), port(&cluster, 0));
    root.context("c", &added(&["root", "--level", "admin", "--all-tenants"]), port(&cluster, 1));
    assert_eq!(
        (ann.json(&["whoami"])["who"].clone(), ann.json(&["whoami"])["tenant"].clone()),
        ("user ann".into(), "team-7".into())
    );

    // Her machine and the host's: each sees its own, and an admin both, on whichever node.
    let hers = ann.json(&["fork", "--guest", "probe", "--memory", "16MiB"]);
    let hosts = node.json(&["fork", "--guest", "probe", "--memory", "16MiB"]);
    let (her_machine, hosts_machine) = (machine(&hers), machine(&hosts));
    let listed = |user: &User<'_>| user.json(&["ls"])["machines"].as_array().unwrap().len();
    assert_eq!((listed(&ann), listed(&ben), listed(&root)), (1, 1, 2));
    assert_eq!(ben.json(&["show", her_machine])["machine"]["tenant"], "team-7");
    // What is another tenant's is as unknown as what nobody has.
    let nobodys = "00000000-0000-7000-8000-000000000001";
    for verb in [&["show"][..], &["kill"], &["branch"], &["logs"], &["exec"]] {
        let end = if verb == ["exec"] { &["--", "true"][..] } else { &[] };
        let [theirs, none] = [hosts_machine, nobodys].map(|id| {
            let said = ann.cli(&[verb, &[id, "--output", "json"], end].concat());
            assert_ne!(said.code, Some(0), "{verb:?}: {said:?}");
            (said.code, said.err.replace(id, "ID"))
        });
        assert_eq!(theirs, none, "{verb:?}");
    }
    let hosts_image = hosts["image"]["id"].as_str().unwrap();
    assert_eq!(ann.refused(&["fork", hosts_image]), "UNKNOWN_ID");
    assert_eq!(ann.json(&["image", "ls"])["images"].as_array().unwrap().len(), 1);
    // Levels.
    assert_eq!(ben.refused(&["fork", "--guest", "probe"]), "FORBIDDEN");
    assert_eq!(ben.refused(&["kill", her_machine]), "FORBIDDEN");
    assert_eq!(ann.refused(&["image", "save", hers["image"]["id"].as_str().unwrap(), "warm"]), "FORBIDDEN");
    assert_eq!(ann.refused(&["fork", "--guest", "probe", "--tenant", "default"]), "FORBIDDEN");
    assert_eq!(ann.refused(&["fork", her_machine, "--on", &cluster.address(1)]), "FORBIDDEN");
    for verb in
        [&["node", "ls"][..], &["user", "ls"], &["cluster", "token", "x"], &["node", "drain", "node-1"], &["trust", "ls"]]
    {
        assert_eq!(ann.refused(verb), "FORBIDDEN", "{verb:?}");
    }
    assert_eq!(root.cli(&["--context", "c", "ls"]).code, Some(0), "a context that is typed");
    assert_eq!(root.refused(&["trust", "ls"]), "FORBIDDEN", "of the host alone");
    assert_eq!(root.json(&["user", "ls"])["users"].as_array().unwrap().len(), 3);
    // All of hers, and nobody else's.
    assert_eq!(ann.json(&["kill", "--all"])["killed"].as_array().unwrap().len(), 1);
    assert_eq!((listed(&ann), listed(&root)), (0, 1));
    // What she was is over at once.
    node.json(&["user", "rm", "ann"]);
    assert_eq!(ann.refused(&["whoami"]), "UNAUTHORIZED");
}

#[test]
fn a_machine_and_a_template_are_their_tenants_on_every_node() {
    let mut cluster = two_nodes("tenants");
    let lead = {
        let node = cluster.node(0);
        let lead = node.json(&["user", "add", "lead", "--level", "admin", "--tenant", "team-7"]);
        // The same name twice, of two tenants.
        cluster.template(0, "warm");
        lead
    };
    {
        let (here, there) = (User::on(&cluster, 0), User::on(&cluster, 1));
        here.context("c", &lead, port(&cluster, 0));
        there.context("c", &lead, port(&cluster, 1));
        assert_eq!(there.refused(&["fork", "warm"]), "UNKNOWN_TEMPLATE");
        assert_eq!(there.refused(&["fork", "default/warm"]), "UNKNOWN_TEMPLATE");
        let forked = here.json(&["fork", "--guest", "probe", "--memory", "16MiB"]);
        let image = forked["image"]["id"].as_str().unwrap();
        here.json(&["image", "save", image, "warm"]);
        let names = |user: &User<'_>| user.json(&["template", "ls"])["templates"].to_string();
        assert!(names(&here).contains("team-7/warm") && !names(&here).contains("\"warm\""), "{}", names(&here));
        // Through the other node, which has neither.
        assert_eq!(there.json(&["show", machine(&forked)])["machine"]["tenant"], "team-7");
        let forks = there.json(&["fork", "warm", "-n", "3"]);
        assert_eq!(forks["image"]["tenant"], "team-7");
        assert_eq!(there.json(&["explain", "warm"])["image"], forks["image"]["digest"]);
        there.json(&["kill", machine(&forked)]);
        let said = cluster.node(0).json(&["audit", "ls"])["lines"].to_string();
        assert!(said.contains("user lead through node"), "{said}");
        there.json(&["kill", "--all"]);
    }
    // After a start each name is still its tenant's.
    cluster.crash(0);
    cluster.start_with(0, &HTTPS);
    cluster.settles(2, 1);
    let user = User::on(&cluster, 0);
    user.context("c", &lead, port(&cluster, 0));
    crate::support::eventually("its templates are found again", || {
        user.cli(&["fork", "warm"]).code == Some(0) && cluster.node(0).cli(&["fork", "warm"]).code == Some(0)
    });
    assert_eq!(user.json(&["fork", "warm"])["image"]["tenant"], "team-7");
    assert_eq!(cluster.node(0).json(&["fork", "warm"])["image"]["tenant"], "default");
    user.json(&["template", "rm", "warm"]);
    assert_eq!(cluster.node(0).json(&["fork", "warm"])["image"]["tenant"], "default");
}

#[test]
fn who_is_not_known_is_not_let_in() {
    let cluster = two_nodes("strangers");
    let node = cluster.node(0);
    let added = node.json(&["user", "add", "ann", "--level", "submit"]);
    let port = port(&cluster, 0);
    let user = User::on(&cluster, 0);
    // Another token; none of a cluster that answers there; an authority that is another's.
    let wrong = |key: &str, value: &str| {
        let mut answer = added.clone();
        answer[key] = value.into();
        answer
    };
    assert_eq!(user.context("token", &wrong("token", &format!("ffuser_{}", "0".repeat(64))), port).code, Some(0));
    assert_eq!(user.refused(&["ls"]), "UNAUTHORIZED");
    user.context("authority", &wrong("authority", &"7".repeat(64)), port);
    let said = user.cli(&["ls"]);
    assert!(said.code == Some(3) && said.err.contains("authority"), "{said:?}");
    user.context("nobody", &added, 1);
    assert_eq!((user.cli(&["ls"]).code, &*user.refused(&["ls"])), (Some(3), "NO_NODE"));
    user.context("good", &added, port);
    assert_eq!(user.json(&["whoami"])["who"], "user ann");
    assert_eq!(user.cli(&["--context", "token", "ls"]).code, Some(4));
    assert_eq!(user.cli(&["context", "use", "none"]).code, Some(2));
    // Known by a key, which another certificate of the same name does not have.
    let [own, other] = [(); 2].map(|()| {
        let id = types::NodeId::from_uuid(uuid::Uuid::now_v7());
        pages::Identity::generate(id, pages::Role::Learner).unwrap()
    });
    let pem = user.file("ci.pem", own.certificate_pem());
    node.json(&["user", "add", "ci", "--level", "read", "--certificate", pem.to_str().unwrap()]);
    for (name, identity) in [("ci", &own), ("other", &other)] {
        let certificate = user.file(&format!("{name}.pem"), identity.certificate_pem());
        let key = user.file(&format!("{name}.key"), identity.key_pem());
        let url = format!("https://{}:{port}", cluster.host_address(0));
        let authority = added["authority"].as_str().unwrap();
        let (certificate, key) = (certificate.to_str().unwrap(), key.to_str().unwrap());
        let said = user.cli(&[
            "context",
            "add",
            name,
            "--url",
            &url,
            "--authority",
            authority,
            "--certificate",
            certificate,
            "--key",
            key,
        ]);
        assert_eq!(said.code, Some(0), "{said:?}");
    }
    assert_eq!(user.json(&["--context", "ci", "whoami"])["who"], "user ci");
    assert_eq!(user.refused(&["--context", "other", "whoami"]), "UNAUTHORIZED");
    // For a while only.
    let brief = node.json(&["user", "add", "brief", "--level", "read", "--for", "1s"]);
    user.context("brief", &brief, port);
    crate::support::eventually("its time is over", || user.cli(&["--context", "brief", "whoami"]).code == Some(4));
    // What speaks no TLS, or nothing, is hung up on, and others go on.
    let address = (cluster.host_address(0), port);
    let mut rude = run_on(&cluster, address);
    rude.write_all(b"GET /v1/machines HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    let _ = rude.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    let silent: Vec<TcpStream> = (0..50).map(|_| run_on(&cluster, address)).collect();
    assert_eq!(user.json(&["--context", "good", "whoami"])["who"], "user ann");
    drop(silent);
    // Who hangs up before the answer is written down too, whatever came of it.
    let forks = || node.json(&["audit", "ls", "-n", "1000"])["lines"].to_string().matches("/v1/forks").count();
    let before = forks();
    let body = r#"{"from":{"guest":"probe"},"count":3}"#;
    let whole = format!("POST /v1/forks HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let mut hasty = std::os::unix::net::UnixStream::connect(&node.socket).unwrap();
    hasty.write_all(whole.as_bytes()).unwrap();
    drop(hasty);
    crate::support::eventually("it is written down", || forks() > before);
    // Who was turned away is written down, and what is written down cannot be changed.
    let lines = node.json(&["audit", "ls", "-n", "1000"])["lines"].clone();
    assert!(lines.to_string().contains("a stranger"), "{lines}");
    assert!(!lines.to_string().contains("ffuser_"), "tokens are not written down");
    let data = node.path().join("data");
    let verified = node.cli(&["audit", "verify", "--data", data.to_str().unwrap()]);
    assert_eq!(verified.code, Some(0), "{verified:?}");
    let log = data.join("audit.jsonl");
    let text = std::fs::read_to_string(&log).unwrap();
    std::fs::write(&log, text.replacen("a stranger", "uid 0", 1)).unwrap();
    let verified = node.cli(&["audit", "verify", "--data", data.to_str().unwrap(), "--output", "json"]);
    assert_eq!((verified.code, &*verified.error_code()), (Some(4), "AUDIT"), "{verified:?}");
}

fn run_on(cluster: &Cluster, address: (std::net::IpAddr, u16)) -> TcpStream {
    cluster.run_on(0, move || TcpStream::connect(address).unwrap())
}
