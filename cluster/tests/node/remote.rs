//! Forks between nodes, as users meet them: two programs, a network and engines that only pretend.

use std::net::TcpListener;
use std::process::Stdio;

use serde_json::{Value, json};

use crate::support::{Node, Said, eventually, ids};

/// Two nodes that listen and trust one another.
fn two(fake_a: &str, fake_b: &str) -> (Node, Node) {
    let listening = ["--listen", "127.0.0.1:0"];
    let (a, b) = (Node::start_with(fake_a, &listening), Node::start_with(fake_b, &listening));
    trust(&a, &b, &["default"]);
    trust(&b, &a, &["default"]);
    (a, b)
}

/// Lets `node` trust `other`.
fn trust(node: &Node, other: &Node, tenants: &[&str]) {
    let own = other.json(&["trust", "show"])["pem"].clone();
    let body = json!({"certificate": own, "tenants": tenants}).to_string();
    assert_eq!(node.http("POST", "/v1/trust", body.as_bytes()).status, 200);
}

fn address(node: &Node) -> String {
    node.http("GET", "/v1/node", b"").json()["network"]["listening"].as_str().unwrap().to_owned()
}

fn image_of(node: &Node, more: &[&str]) -> String {
    node.json(&[&["fork", "--guest", "probe"], more].concat())["image"]["id"].as_str().unwrap().to_owned()
}

/// Where nobody listens.
fn nowhere() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

fn refused(said: &Said, exit: i32, code: &str) {
    assert_eq!((said.code, said.error_code().as_str()), (Some(exit), code), "{said:?}");
}

#[test]
fn children_are_forked_on_another_node_and_settle_there() {
    let (a, b) = two("", "settle_ms=1500");
    let image = image_of(&a, &[]);
    let there = a.json(&["fork", &image[28..], "-n", "8", "--on", &address(&b), "--verify"]);
    assert_eq!(there["on"], json!({"node": b.json(&["trust", "show"])["node"], "address": address(&b)}));
    assert_eq!((ids(&there["children"]).len(), &there["children"][0]["verified_pages"]), (8, &json!(16_128)));
    assert_eq!(b.machines(), ids(&there["children"]));
    assert_eq!(a.machines().len(), 1, "they are not this node's machines");

    // Before its memory is there.
    let machine = &b.machines()[0];
    let early = b.json(&["show", machine]);
    assert!(early["residency"]["remote_bytes"].as_u64().unwrap() > 0, "{early}");
    assert_eq!(early["residency"]["sources"][0]["address"].as_str(), Some(address(&a).as_str()));
    assert_eq!((&early["usage"]["faults"], &early["residency"]["children"]), (&json!(5), &json!(8)));
    let listed = b.cli(&["ls"]).out;
    assert!(listed.contains("SETTLED") && listed.contains(" %"), "{listed}");
    let watched = b.cli(&["watch", machine, "--output", "json"]);
    let lines: Vec<Value> = watched.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.len() >= 2 && watched.code == Some(0), "{watched:?}");
    let percent = |line: &Value| line["settled_percent"].as_u64().unwrap();
    assert!(lines.windows(2).all(|pair| percent(&pair[0]) <= percent(&pair[1])), "{lines:?}");
    assert!(lines.last().is_some_and(|last| percent(last) == 100 && last["is_settled"] == true), "{lines:?}");
    let shown = b.cli(&["show", machine]).out;
    assert!(shown.contains("settled   yes, 1.50 s after it was opened") && shown.contains("good, 256 extents"), "{shown}");
    assert!(b.cli(&["ls"]).out.contains("yes"));

    // The second time the image is there, and it is one image.
    let again = a.cli(&["fork", &image, "--on", &address(&b)]);
    assert!(again.out.contains("they run on node") && again.code == Some(0), "{again:?}");
    let images = b.json(&["image", "ls"])["images"].clone();
    assert_eq!((images.as_array().unwrap().len(), &images[0]["origin"]), (1, &json!("remote")));
    assert_eq!(b.machines().len(), 9);
    let digest = images[0]["digest"].as_str().unwrap();
    let table = b.cli(&["image", "ls"]).out;
    assert!(table.contains(&digest[..12]) && table.contains("yes"), "{table}");
    assert_eq!(a.cli(&["image", "digest", &image]).out, format!("{digest}\n"), "its name everywhere");
}

#[test]
fn children_are_forked_of_an_image_that_others_hold() {
    let (a, b) = two("", "settle_ms=300");
    let digest = a.cli(&["image", "digest", &image_of(&a, &[])]).out.trim_end().to_owned();
    let there = address(&a);
    let fork = b.cli(&["fork", &digest, "-n", "8", "--from", &there, "--from", &nowhere()]);
    assert!(fork.code == Some(0) && fork.out.contains("8 of image"), "{fork:?}");
    assert_eq!(b.machines().len(), 8);
    let watched = b.cli(&["watch", &digest, "--timeout", "60s"]);
    assert!(watched.code == Some(0) && watched.out.contains("settled: yes, 16 MiB of 16 MiB"), "{watched:?}");
    // From now on it goes by its digest alone, and from here to a third node.
    assert_eq!(b.cli(&["fork", &digest]).code, Some(0));
    assert_eq!(b.cli(&["fork", &digest, "--on", &there]).code, Some(0), "{}", a.log());
    let metrics = b.http("GET", "/metrics", b"").body;
    for expected in
        ["farfork_host_images{state=\"settled\"} 1", "farfork_page_bytes_total{kind=\"demand\"} 0", "farfork_hedges_total 0"]
    {
        assert!(metrics.contains(expected), "{expected} is not in\n{metrics}");
    }
    let machine = b.machines()[0].clone();
    let branched = b.json(&["branch", &machine]);
    assert_eq!(branched["image"]["parent"].as_str(), Some(machine.as_str()));

    let said = b.cli(&["fork", &"0".repeat(64), "--output", "json"]);
    refused(&said, 4, "UNKNOWN_IMAGE");
    let said = b.cli(&["fork", &"0".repeat(64), "--from", &nowhere(), "--output", "json"]);
    refused(&said, 3, "UNREACHABLE");
    let said = b.cli(&["fork", &"0".repeat(64), "--from", "no-such-host.invalid:7117", "--output", "json"]);
    refused(&said, 3, "UNREACHABLE");
}

#[test]
fn a_watch_ends_when_its_image_is_lost_and_when_its_time_is_up() {
    let (a, b) = two("", "settle_ms=600,loses_sources=1");
    let digest = a.json(&["image", "digest", &image_of(&a, &[])])["digest"].as_str().unwrap().to_owned();
    let image = b.json(&["fork", &digest, "--from", &address(&a)])["image"]["id"].as_str().unwrap().to_owned();
    let lost = b.cli(&["watch", &image, "--output", "json"]);
    refused(&lost, 4, "LOST");
    assert!(lost.err.contains("PAGE_SOURCE_LOST") && lost.out.lines().last().unwrap().contains("gone"), "{lost:?}");
    assert!(b.cli(&["image", "ls"]).out.contains("no: PAGE_SOURCE_LOST"));
    assert!(b.cli(&["show", &image]).out.contains("no: PAGE_SOURCE_LOST: all holders are gone"));

    let slow = Node::start("settle_ms=3600000");
    let image = slow.json(&["fork", &digest, "--from", &address(&a)])["image"]["id"].as_str().unwrap().to_owned();
    let said = slow.cli(&["watch", &image, "--timeout", "300ms", "--output", "json"]);
    assert_eq!(said.code, Some(4), "{said:?}");
    assert!(said.err.contains("DEADLINE_EXCEEDED"), "{said:?}");
    let machine = slow.machines()[0].clone();
    let watch = slow.command(&["watch", &machine]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    slow.json(&["kill", &machine]);
    let said = Said::of(watch.wait_with_output().unwrap());
    assert!(said.code == Some(4) && said.err.contains("is not there any more"), "{said:?}");
}

#[test]
fn nodes_that_do_not_trust_one_another_do_nothing_for_one_another() {
    let listening = ["--listen", "127.0.0.1:0"];
    let (a, b) = (Node::start_with("", &listening), Node::start_with("", &listening));
    let image = image_of(&a, &[]);
    let on = address(&b);
    let fork = ["fork", image.as_str(), "--on", on.as_str(), "--output", "json"];
    let said = a.cli(&fork);
    refused(&said, 4, "REFUSED");
    assert!(said.err.contains("is not trusted with images of tenant default") && said.err.contains("trust add"), "{said:?}");
    trust(&b, &a, &["team-7"]);
    refused(&a.cli(&fork), 4, "REFUSED");
    let of_team = image_of(&a, &["--tenant", "team-7"]);
    assert_eq!(a.cli(&["fork", &of_team, "--on", &on]).code, Some(0), "without a restart");
    assert_eq!(b.json(&["image", "ls"])["images"][0]["tenant"], "team-7");
    let other = a.cli(&["fork", &of_team, "--on", &on, "--tenant", "default", "--output", "json"]);
    refused(&other, 4, "OTHER_TENANT");
    b.cli(&["trust", "rm", a.json(&["trust", "show"])["node"].as_str().unwrap()]);
    refused(&a.cli(&["fork", &of_team, "--on", &on, "--output", "json"]), 4, "REFUSED");
    assert_eq!(b.machines().len(), 1);
}

#[test]
fn of_two_tenants_with_the_same_image_each_forks_its_own() {
    let listening = ["--listen", "127.0.0.1:0"];
    let (a, b) = (Node::start_with("", &listening), Node::start(""));
    let (image, from) = (image_of(&a, &[]), address(&a));
    let image = a.json(&["image", "digest", &image])["digest"].as_str().unwrap().to_owned();
    for tenant in ["default", "team-7"] {
        b.json(&["fork", &image, "--tenant", tenant, "--from", &from]);
    }
    for (tenant, count) in [("default", 2), ("team-7", 2)] {
        b.json(&["fork", &image, "--tenant", tenant]);
        let machines = b.json(&["ls"]);
        let of_tenant = machines["machines"].as_array().unwrap().iter().filter(|machine| machine["tenant"] == tenant);
        assert_eq!(of_tenant.count(), count, "{machines}");
    }
    refused(&b.cli(&["fork", &image, "--tenant", "team-8", "--output", "json"]), 4, "OTHER_TENANT");
}

#[test]
fn what_stands_in_the_way_of_a_fork_elsewhere_is_named() {
    let (a, b) = two("", "fail_every=3");
    let (image, on) = (image_of(&a, &[]), address(&b));
    let partial = a.cli(&["fork", &image, "-n", "4", "--on", &on]);
    assert_eq!(partial.code, Some(5), "{partial:?}");
    assert!(partial.err.contains("no memory for another machine"), "{partial:?}");
    assert_eq!(b.machines().len(), 3);
    let said = a.cli(&["fork", &image, "--on", &nowhere(), "--output", "json"]);
    refused(&said, 3, "UNREACHABLE");
    let said = a.cli(&["fork", "--guest", "probe", "--on", &nowhere(), "--output", "json"]);
    refused(&said, 3, "UNREACHABLE");
    assert_eq!(ids(&a.json(&["image", "ls"])["images"]), [image], "the image that was made for it is gone");
    assert_eq!(a.cli(&["fork", "--guest", "probe", "--on", &on]).code, Some(0), "a guest is warmed up here, and runs there");

    let silent = Node::start("");
    let image = image_of(&silent, &[]);
    refused(&silent.cli(&["fork", &image, "--on", &on, "--output", "json"]), 4, "NOT_LISTENING");
    let anywhere = Node::start_with("", &["--listen", "0.0.0.0:0"]);
    let image = image_of(&anywhere, &[]);
    refused(&anywhere.cli(&["fork", &image, "--on", &on, "--output", "json"]), 4, "NOT_ADVERTISED");
    assert_eq!(anywhere.cli(&["fork", &image]).code, Some(0), "nobody else needs to reach it for that");
}

#[test]
fn a_fork_for_which_nobody_waits_any_more_leaves_no_machine() {
    use farfork::node::peers::{Answer, Order, PeerForkOrder};
    let (a, b) = two("", "fork_ms=300");
    let holder = address(&a).parse().unwrap();
    let order = PeerForkOrder {
        image: types::Digest::of(b"of a test"),
        tenant: types::Tenant::default_tenant(),
        count: 3,
        limit_bytes: None,
        verify: false,
        network: false,
        holders: vec![holder],
        deadline: std::time::Duration::from_millis(1),
    };
    let as_a = a.json(&["trust", "show"])["node"].as_str().unwrap().parse::<uuid::Uuid>().unwrap();
    let Answer::Refused(refusal) = ask(&b, as_a, &Order::Fork(order).encode()) else { panic!("it was too late") };
    assert_eq!(refusal.code, "DEADLINE_EXCEEDED");
    eventually("they are ended", || b.machines().is_empty());
    assert_eq!(b.json(&["ls", "--all"])["machines"].as_array().unwrap().len(), 3, "they had run");
    for garbage in [&b""[..], b"\x07", b"\x00", &[0xFF; 1000]] {
        let Answer::Refused(refusal) = ask(&b, as_a, garbage) else { panic!("{garbage:?} was an order") };
        assert_eq!(refusal.code, "BAD_MESSAGE");
    }
}

#[test]
fn what_another_node_says_is_looked_at() {
    use farfork::node::peers::{Answer, PeerForkReport, PeerRefusal};
    let node = Node::start_with("", &["--listen", "127.0.0.1:0"]);
    let image = image_of(&node, &[]);
    let fork = |answer: &[u8]| {
        let on = liar(answer.to_vec());
        node.cli(&["fork", &image, "-n", "2", "--on", &on])
    };
    let text = "\u{1b}[2Jgone".to_owned();
    let refusal = PeerRefusal { code: "REFUSED".to_owned(), message: text.clone(), remedy: text, reason: None };
    let said = fork(&Answer::Refused(refusal).encode());
    assert!(said.code == Some(4) && said.err.contains("\u{FFFD}[2Jgone") && !said.err.contains('\u{1b}'), "{said:?}");
    let none = PeerForkReport { node: types::NodeId::from_uuid(uuid::Uuid::nil()), children: Vec::new(), failures: Vec::new() };
    for answer in [Answer::Forked(none).encode(), b"garbage".to_vec(), Vec::new(), vec![1; 5 << 20]] {
        let said = fork(&answer);
        assert!(said.code == Some(3) && said.err.contains("children may run there"), "{said:?}");
    }
    assert_eq!(node.http("GET", "/v1/node", b"").status, 200);
}

/// Answers whoever asks first with these bytes.
fn liar(answer: Vec<u8>) -> String {
    use std::io::{Read, Write};
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut asked = Vec::new();
        let _ = stream.read_to_end(&mut asked);
        // It may have heard enough before the end.
        let _ = stream.write_all(&answer);
    });
    address
}

/// Sends bytes as a node of this id would.
fn ask(node: &Node, id: uuid::Uuid, bytes: &[u8]) -> farfork::node::peers::Answer {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(address(node)).unwrap();
    stream.set_read_timeout(Some(crate::support::DEADLINE)).unwrap();
    stream.write_all(&[id.as_bytes(), bytes].concat()).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    farfork::node::peers::Answer::decode(&answer).unwrap()
}

#[test]
fn requests_about_other_nodes_that_are_wrong_are_400() {
    let node = Node::start("");
    let digest = "a".repeat(64);
    let fork = |body: Value, code| node.http("POST", "/v1/forks", body.to_string().as_bytes()).refused(400, code);
    let remote = |image: &str, holders: Value| json!({"from": {"remote": {"image": image, "holders": holders}}});
    fork(remote("abcd", json!(["192.0.2.7:1"])), "BAD_DIGEST");
    fork(remote(&digest.to_uppercase(), json!(["192.0.2.7:1"])), "BAD_DIGEST");
    fork(remote(&digest, json!([])), "BAD_HOLDERS");
    fork(remote(&digest, json!(vec!["192.0.2.7:1"; 17])), "BAD_HOLDERS");
    for bad in ["", "192.0.2.7", "192.0.2.7:0", "::1:1", "a b:1", "192.0.2.7:65536", &"x".repeat(300)] {
        fork(remote(&digest, json!([bad])), "BAD_ADDRESS");
        fork(json!({"from": {"image": "abcd"}, "on": bad}), "BAD_ADDRESS");
    }
    fork(json!({"from": {"image": "abcd"}, "tenant": "A"}), "BAD_TENANT");
    let mut both = remote(&digest, json!(["192.0.2.7:1"]));
    both["on"] = json!("192.0.2.8:1");
    fork(both, "BAD_REQUEST");
    let mut class = remote(&digest, json!(["192.0.2.7:1"]));
    class["vcpus"] = json!(1);
    fork(class, "BAD_REQUEST");
    fork(json!({"from": {"remote": {"image": digest}}}), "BAD_JSON");
    let trust = |body: Value, code| node.http("POST", "/v1/trust", body.to_string().as_bytes()).refused(400, code);
    trust(json!({}), "BAD_JSON");
    trust(json!({"certificate": "x".repeat(20_000)}), "BAD_CERTIFICATE");
    trust(json!({"certificate": "no"}), "BAD_CERTIFICATE");
    trust(json!({"certificate": "no", "tenants": ["-"]}), "BAD_TENANT");
    trust(json!({"certificate": "no", "tenants": []}), "BAD_TENANT");
    node.http("DELETE", "/v1/trust/abc", b"").refused(400, "BAD_ID");
    node.http("DELETE", "/v1/trust/0000", b"").refused(404, "UNKNOWN_NODE");
    node.http("POST", "/v1/images/0000/digest", b"").refused(404, "UNKNOWN_IMAGE");
}
