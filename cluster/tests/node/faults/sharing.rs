//! Who may have which bytes: content is shared within a tenant, and a node that is trusted no longer gets nothing more.

use serde_json::Value;
use vm::harness::{count, held, seed};

use super::stage::{IMAGE_BYTES, Stage};
use super::{CHILDREN, only};
use crate::between::{introduce, listening};
use crate::support::Node;

/// A counter of the node's metrics.
fn page_bytes(node: &Node, kind: &str) -> u64 {
    let metrics = node.http("GET", "/metrics", b"").body;
    let name = format!("farfork_page_bytes_total{{kind=\"{kind}\"}} ");
    metrics.lines().find_map(|line| line.strip_prefix(&name)).unwrap().parse().unwrap()
}

/// An image of a tenant: its digest. Its work pages hold the same as those of any other.
fn warm_of(node: &Node, tenant: &str) -> String {
    let forked = node.json(&["fork", "--guest", "probe", "--memory", "16MiB", "--tenant", tenant]);
    let image = forked["image"]["id"].as_str().unwrap();
    node.json(&["image", "digest", image])["digest"].as_str().unwrap().to_owned()
}

fn trust(node: &Node, other: &Node, tenants: &[&str]) {
    let own = other.json(&["trust", "show"])["pem"].clone();
    let body = serde_json::json!({"certificate": own, "tenants": tenants}).to_string();
    assert_eq!(node.http("POST", "/v1/trust", body.as_bytes()).status, 200);
}

#[test]
fn real_content_is_shared_within_a_tenant_and_not_between_tenants() {
    let node = || listening(tempfile::tempdir().unwrap(), &["--page-deadline", "2s"], "");
    let ((a, at_a), (b, _), (c, _)) = (node(), node(), node());
    introduce(&[&a, &b, &c]);
    let settle = |digest: &str, tenant: &str| -> Value {
        let forked = b.json(&["fork", digest, "--tenant", tenant, "--from", &at_a]);
        let image = forked["image"]["id"].as_str().unwrap();
        assert_eq!(b.cli(&["watch", image, "--timeout", "60s"]).code, Some(0));
        b.json(&["show", image])["residency"].clone()
    };
    let wire = |residency: &Value| residency["wire_bytes"].as_u64().unwrap();
    let first = settle(&warm_of(&a, "default"), "default");
    assert!(wire(&first) >= IMAGE_BYTES, "{first}");
    assert_eq!(page_bytes(&b, "local"), 0);

    let second = settle(&warm_of(&a, "default"), "default");
    let found_here = page_bytes(&b, "local");
    assert!(found_here >= IMAGE_BYTES / 2 && wire(&second) < wire(&first) / 2, "{second}, {found_here} bytes found here");

    // B may, as soon as A says so; what B has of another tenant is of no use to it.
    let of_team = warm_of(&a, "team-7");
    let ask = |node: &Node, tenant: &str| {
        let said = node.cli(&["fork", &of_team, "--tenant", tenant, "--from", &at_a, "--output", "json"]);
        assert_eq!((said.code, said.error_code().as_str()), (Some(4), "REFUSED"), "{said:?}");
        said.err
    };
    assert!(ask(&b, "team-7").contains("OTHER_TENANT"));
    assert!(ask(&b, "default").contains("UNKNOWN_IMAGE"), "of that tenant there is no such image");
    trust(&a, &b, &["default", "team-7"]);
    let third = settle(&of_team, "team-7");
    assert!(wire(&third) >= IMAGE_BYTES, "{third}");
    assert_eq!(page_bytes(&b, "local"), found_here);
    assert!(ask(&c, "team-7").contains("OTHER_TENANT"));
}

#[test]
fn real_readers_that_are_trusted_no_longer_get_nothing_more() {
    let mut dice = fastrand::Rng::with_seed(seed());
    let rounds = count(2, 40);
    let stage = Stage::new(dice.u64(..), &[], "");
    for round in 0..rounds {
        let digest = stage.warm();
        let another = (round % 2 == 1).then(|| super::sources::another_holder(&stage, &digest));
        let holders = [Some(stage.holder()), another.as_ref().map(|(_, address)| address.clone())];
        let holders: Vec<&str> = holders.iter().flatten().map(String::as_str).collect();
        let mut asked = stage.ask(&digest, CHILDREN, &holders);
        stage.wait_until(&mut asked, dice.u64(1..IMAGE_BYTES / 2));
        let reader = stage.destination().json(&["trust", "show"])["node"].as_str().unwrap().to_owned();
        assert_eq!(stage.source().cli(&["trust", "rm", &reader]).code, Some(0));
        // What was being read at that moment may still be counted.
        std::thread::sleep(std::time::Duration::from_millis(100));
        let served = page_bytes(stage.source(), "served");
        let outcomes = asked.outcomes();
        println!("{} holders: {outcomes:?}", holders.len());
        match another {
            Some(_) => only(&outcomes, &["complete"]),
            None => only(&outcomes, &["complete", "PAGE_SOURCE_LOST"]),
        }
        assert_eq!(page_bytes(stage.source(), "served"), served, "it was given more");
        introduce(&[stage.source(), stage.destination()]);
        stage.forks_well(&digest);
        stage.clear();
    }
    held("readers that were trusted no longer", rounds);
    stage.end();
}
