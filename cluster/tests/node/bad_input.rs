//! Whatever a client sends is refused with a typed answer that is the client's fault, and the node goes on.

use crate::support::{Node, ids, raw};

#[test]
fn bodies_that_are_wrong_are_400() {
    let node = Node::start("");
    let deep = "[".repeat(10_000);
    let from_deep = format!(r#"{{"from":{deep}"#);
    let bad_json: &[&str] = &[
        "",
        " ",
        "{",
        "null",
        "[]",
        "7",
        "{}",
        "not json",
        "\0",
        &deep,
        &from_deep,
        r#"{"from":{"guest":"probe"},"colour":"red"}"#,
        r#"{"from":{"guest":"linux"}}"#,
        r#"{"from":{"guest":"probe","image":"abcd"}}"#,
        r#"{"from":{}}"#,
        r#"{"from":"probe"}"#,
        r#"{"from":{"guest":"probe"},"count":-1}"#,
        r#"{"from":{"guest":"probe"},"count":1.5}"#,
        r#"{"from":{"guest":"probe"},"count":"7"}"#,
        r#"{"from":{"guest":"probe"},"count":99999999999999999999999}"#,
        r#"{"from":{"guest":"probe"},"count":1,"count":2}"#,
        r#"{"from":{"guest":"probe"}} trailing"#,
    ];
    for body in bad_json {
        node.http("POST", "/v1/forks", body.as_bytes()).refused(400, "BAD_JSON");
    }
    node.http("POST", "/v1/forks", b"{\"from\":{\"guest\":\"\xff\"}}").refused(400, "BAD_JSON");
    let fork = |rest: &str, code| {
        node.http("POST", "/v1/forks", format!(r#"{{"from":{rest}}}"#).as_bytes()).refused(400, code);
    };
    fork(r#"{"guest":"probe"},"count":0"#, "BAD_COUNT");
    fork(r#"{"guest":"probe"},"count":10001"#, "BAD_COUNT");
    fork(r#"{"guest":"probe"},"count":18446744073709551615"#, "BAD_COUNT");
    fork(r#"{"guest":"probe"},"memory_bytes":0"#, "BAD_MEMORY");
    fork(r#"{"guest":"probe"},"memory_bytes":4097"#, "BAD_MEMORY");
    fork(r#"{"guest":"probe"},"memory_bytes":18446744073709551615"#, "BAD_MEMORY");
    fork(r#"{"guest":"probe"},"vcpus":0"#, "BAD_VCPUS");
    fork(r#"{"guest":"probe"},"vcpus":9"#, "BAD_VCPUS");
    fork(r#"{"guest":"probe"},"vcpus":257"#, "BAD_VCPUS");
    fork(r#"{"guest":"probe"},"limit_bytes":0"#, "BAD_LIMIT");
    fork(r#"{"image":"abcd"},"memory_bytes":67108864"#, "BAD_REQUEST");
    fork(r#"{"machine":"abcd"},"vcpus":1"#, "BAD_REQUEST");
    fork(r#"{"image":""}"#, "BAD_ID");
    fork(r#"{"machine":"abc"}"#, "BAD_ID");
    fork(r#"{"machine":"../../etc/passwd"}"#, "BAD_ID");
    fork(r#"{"machine":"abcd\u0000"}"#, "BAD_ID");
    let kill = |body: &str, code| node.http("POST", "/v1/machines/kill", body.as_bytes()).refused(400, code);
    kill("{}", "BAD_REQUEST");
    kill(r#"{"ids":["abcd"],"all":true}"#, "BAD_REQUEST");
    kill(r#"{"ids":["xyz!"]}"#, "BAD_ID");
    kill(&format!(r#"{{"ids":[{}"abcd"]}}"#, r#""abcd","#.repeat(10_000)), "BAD_COUNT");
    assert!(node.machines().is_empty());
}

#[test]
fn names_that_are_wrong_are_400() {
    let node = Node::start("");
    let id = node.http("POST", "/v1/forks", br#"{"from":{"guest":"probe"}}"#).json()["image"]["id"].clone();
    let save = format!("/v1/images/{}/save", id.as_str().unwrap());
    let long = "x".repeat(300);
    for name in
        ["", ".", "..", "A/b", "a/b/c", "../x", "a\\b", "/etc/passwd", "a\0b", "-x", "A", "ä", "a b", "a\nb", "a..b", &long]
    {
        let body = serde_json::json!({ "name": name }).to_string();
        node.http("POST", &save, body.as_bytes()).refused(400, "BAD_NAME");
        node.http("POST", "/v1/images/load", body.as_bytes()).refused(400, "BAD_NAME");
    }
    // It is saved as its image's tenant's, whatever that is; a name of another tenant is one.
    node.http("POST", &save, br#"{"name":"a/b"}"#).refused(400, "BAD_NAME");
    node.http("POST", "/v1/images/load", br#"{"name":"a/b"}"#).refused(404, "UNKNOWN_IMAGE");
    for encoded in ["name:", "name:..", "name:..%2F..%2Fetc%2Fpasswd", "name:a%00b", "name:%2e%2e"] {
        node.http("DELETE", &format!("/v1/images/{encoded}"), b"").refused(400, "BAD_NAME");
    }
    node.http("POST", "/v1/images/load", br#"{"name":"nobody-saved-this"}"#).refused(404, "UNKNOWN_IMAGE");
}

#[test]
fn ids_that_are_wrong_unknown_or_ambiguous_are_refused() {
    let node = Node::start("");
    for id in ["abc", "xyz!", "%00", "%2e%2e", "..%2F..%2Fetc", &"a".repeat(33), &"a".repeat(5000)] {
        node.http("GET", &format!("/v1/machines/{id}"), b"").refused(400, "BAD_ID");
        node.http("DELETE", &format!("/v1/machines/{id}"), b"").refused(400, "BAD_ID");
        node.http("POST", &format!("/v1/machines/{id}/branch"), b"{}").refused(400, "BAD_ID");
        node.http("GET", &format!("/v1/images/{id}"), b"").refused(400, "BAD_ID");
        node.http("DELETE", &format!("/v1/images/{id}"), b"").refused(400, "BAD_ID");
    }
    node.http("GET", "/v1/machines/%ff%fe", b"").refused(400, "BAD_REQUEST");
    for id in ["0000", "00000000-0000-0000-0000-000000000000"] {
        node.http("GET", &format!("/v1/machines/{id}"), b"").refused(404, "UNKNOWN_MACHINE");
        node.http("DELETE", &format!("/v1/machines/{id}"), b"").refused(404, "UNKNOWN_MACHINE");
        node.http("POST", &format!("/v1/machines/{id}/branch"), b"{}").refused(404, "UNKNOWN_MACHINE");
        node.http("GET", &format!("/v1/images/{id}"), b"").refused(404, "UNKNOWN_IMAGE");
        node.http("POST", &format!("/v1/images/{id}/save"), br#"{"name":"a"}"#).refused(404, "UNKNOWN_IMAGE");
    }
    // Among 3,000 random ends of four digits some are the same.
    let forked = node.http("POST", "/v1/forks", br#"{"from":{"guest":"probe"},"count":3000}"#).json();
    let mut ids = ids(&forked["children"]);
    ids.sort_by_key(|id| id[id.len() - 4..].to_owned());
    let twins = ids.windows(2).find(|pair| pair[0].ends_with(&pair[1][32..])).unwrap();
    let answer = node.http("GET", &format!("/v1/machines/{}", &twins[0][32..]), b"");
    answer.refused(409, "AMBIGUOUS_ID");
    for twin in twins {
        assert!(answer.body.contains(twin.as_str()), "{answer:?}");
        assert_eq!(node.http("DELETE", &format!("/v1/machines/{twin}"), b"").status, 200);
    }
}

#[test]
fn routes_methods_and_queries_that_are_wrong_are_refused() {
    let node = Node::start("");
    for path in ["/", "/v1", "/v1/", "/v2/forks", "/v1/forks/", "/v1/machines/a/b/c", "/v1/../etc/passwd", "//"] {
        node.http("GET", path, b"").refused(404, "UNKNOWN_ROUTE");
    }
    for (method, path) in [("GET", "/v1/forks"), ("PUT", "/v1/machines"), ("PATCH", "/v1/node"), ("NONSENSE", "/metrics")] {
        let answer = node.http(method, path, b"");
        answer.refused(405, "METHOD_NOT_ALLOWED");
        assert!(answer.head.contains("allow: "), "{answer:?}");
    }
    for query in ["state=gone", "state=", "colour=red", "state=all&state=ended", "%ff"] {
        node.http("GET", &format!("/v1/machines?{query}"), b"").refused(400, "BAD_REQUEST");
    }
}

#[test]
fn what_is_no_http_is_cut_or_400_and_the_node_goes_on() {
    let node = Node::start("");
    let long_head = format!("GET /v1/node HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "x".repeat(100_000));
    let many_headers = format!("GET /v1/node HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(1_000));
    let long_path = format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "x".repeat(100_000));
    let lying = "POST /v1/forks HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{\"from\"";
    let two_lengths = "POST /v1/forks HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}";
    let bad_length = "POST /v1/forks HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n{}";
    let bad_chunk = "POST /v1/forks HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n";
    let garbage: String = (0_u32..4_096).filter_map(|n| char::from_u32(n * 7 % 128)).collect();
    let all: [&str; 10] =
        ["", "\r\n\r\n", &garbage, &long_head, &many_headers, &long_path, lying, two_lengths, bad_length, bad_chunk];
    for text in all {
        let answer = raw(&node.socket, text.as_bytes());
        assert!(answer.status == 0 || (400..500).contains(&answer.status), "{answer:?} for {:?}", text.get(..60));
    }
    assert_eq!(node.http("GET", "/v1/node", b"").status, 200);
}
