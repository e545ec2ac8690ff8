//! The checked-in description of the API is the one that a node gives.

use std::path::Path;

use farfork::api::openapi_json;

use crate::support::Node;

#[test]
fn the_description_in_the_repository_is_current() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/openapi.json");
    if std::env::var_os("FARFORK_UPDATE").is_some() {
        std::fs::write(&path, openapi_json()).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(kept == openapi_json(), "docs/openapi.json is old: run this test with FARFORK_UPDATE=1 and look at what changed");
}

#[test]
fn each_operation_has_a_name_of_its_own_and_says_what_else_may_come() {
    let described: serde_json::Value = serde_json::from_str(&openapi_json()).unwrap();
    let mut names = std::collections::BTreeSet::new();
    for (path, methods) in described["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            let name = operation["operationId"].as_str().unwrap_or_default();
            assert!(!name.is_empty() && names.insert(name), "{method} {path} is called {name:?}");
            for status in ["4XX", "5XX"] {
                let answer = &operation["responses"][status]["content"]["application/json"]["schema"]["$ref"];
                assert_eq!(answer, "#/components/schemas/ErrorAnswer", "{method} {path}: {status}");
            }
        }
    }
}

#[test]
fn a_node_describes_every_route_that_it_has() {
    let node = Node::start("");
    let described = node.http("GET", "/v1/openapi.json", b"").json();
    let paths = described["paths"].as_object().unwrap();
    assert_eq!(paths.len(), 37, "{:?}", paths.keys());
    for (path, methods) in paths {
        for method in methods.as_object().unwrap().keys() {
            let answer = node.http(
                &method.to_uppercase(),
                &path.replace("{id}", "0000").replace("{verb}", "cordon").replace("{task}", "0"),
                b"",
            );
            assert!(!answer.body.contains("UNKNOWN_ROUTE") && answer.status != 405, "{method} {path}: {answer:?}");
        }
    }
}
