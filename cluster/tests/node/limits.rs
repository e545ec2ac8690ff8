//! What a node takes on: sizes, deadlines, connections, calls.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use farfork::api::Limits;

use crate::support::{DEADLINE, InProcess, Node, connect, eventually, http, raw, read_answer};

const SHORT: Duration = Duration::from_millis(300);

#[test]
fn a_body_of_1_mib_is_read_and_one_byte_more_is_413() {
    let node = Node::start("");
    let most = vec![b' '; 1 << 20];
    node.http("POST", "/v1/forks", &most).refused(400, "BAD_JSON");
    for length in [(1 << 20) + 1, 3 << 20, 20 << 20] {
        node.http("POST", "/v1/forks", &vec![b' '; length]).refused(413, "BODY_TOO_LARGE");
    }
    let huge = b"POST /v1/forks HTTP/1.1\r\nHost: x\r\nContent-Length: 18446744073709551615\r\n\r\n{}";
    let answer = raw(&node.socket, huge);
    assert!((400..500).contains(&answer.status), "{answer:?}");
    let endless = [&b"POST /v1/forks HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"[..]]
        .into_iter()
        .chain(std::iter::repeat_n(&b"8\r\n        \r\n"[..], 1 << 20))
        .collect::<Vec<_>>()
        .concat();
    raw(&node.socket, &endless).refused(413, "BODY_TOO_LARGE");
    assert_eq!(node.http("GET", "/v1/node", b"").status, 200);
}

#[test]
fn a_slow_body_is_408_and_a_slow_head_is_cut() {
    let node = InProcess::start(Limits { read_deadline: SHORT, ..Limits::default() }, "");
    let mut slow = connect(&node.socket);
    slow.write_all(b"POST /v1/forks HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n").unwrap();
    let mut writer = slow.try_clone().unwrap();
    let trickle = std::thread::spawn(move || {
        while writer.write_all(b" ").is_ok() {
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    let answer = read_answer(&mut slow);
    answer.refused(408, "SLOW_REQUEST");
    assert!(answer.head.contains("connection: close"));
    trickle.join().unwrap();

    let mut slow = connect(&node.socket);
    let began = Instant::now();
    let head = b"GET /v1/node HTTP/1.1\r\n".iter().chain(b"X: y\r\n".iter().cycle());
    for byte in head {
        if slow.write_all(&[*byte]).is_err() {
            break;
        }
        assert!(began.elapsed() < DEADLINE, "still listened to");
        std::thread::sleep(Duration::from_millis(20));
    }
    let answer = read_answer(&mut slow);
    assert!(matches!(answer.status, 0 | 408), "{answer:?}");
    assert_eq!(http(&node.socket, "GET", "/v1/node", b"").status, 200);
}

#[test]
fn silent_clients_do_not_keep_their_slots() {
    let limits = Limits { read_deadline: SHORT, connections_max: 4, ..Limits::default() };
    let node = InProcess::start(limits, "");
    let silent: Vec<_> = (0..4).map(|_| connect(&node.socket)).collect();
    // Waits in the backlog until one of them is cut.
    assert_eq!(http(&node.socket, "GET", "/v1/node", b"").status, 200);
    drop(silent);
}

#[test]
fn clients_that_do_not_read_do_not_keep_their_slots() {
    let limits = Limits { read_deadline: DEADLINE, write_deadline: SHORT, connections_max: 1, ..Limits::default() };
    let node = InProcess::start(limits, "");
    let fork = br#"{"from":{"guest":"probe"},"count":5000}"#;
    assert_eq!(http(&node.socket, "POST", "/v1/forks", fork).status, 200);
    let mut deaf = connect(&node.socket);
    deaf.write_all(b"GET /v1/machines HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    assert_eq!(http(&node.socket, "GET", "/v1/node", b"").status, 200);
    let mut rest = Vec::new();
    let _ = deaf.read_to_end(&mut rest);
    assert!(!rest.ends_with(b"]}"), "it was cut in the middle");
}

#[test]
fn calls_beyond_the_line_are_429_and_looking_goes_on() {
    let limits = Limits { calls_max: 1, queued_max: 1, ..Limits::default() };
    let node = InProcess::start(limits, "fork_ms=2000");
    let fork = br#"{"from":{"guest":"probe"}}"#;
    let crowd: Vec<_> = (0..6)
        .map(|_| {
            let socket = node.socket.clone();
            std::thread::spawn(move || http(&socket, "POST", "/v1/forks", fork))
        })
        .collect();
    assert_eq!(http(&node.socket, "GET", "/v1/machines", b"").status, 200, "looking has a line of its own");
    let answers: Vec<_> = crowd.into_iter().map(|one| one.join().unwrap()).collect();
    let served = answers.iter().filter(|answer| answer.status == 200).count();
    assert!((1..6).contains(&served), "{served}");
    for busy in answers.iter().filter(|answer| answer.status != 200) {
        busy.refused(429, "BUSY");
        assert!(busy.head.contains("retry-after: "), "{busy:?}");
    }
    eventually("the line is free again", || http(&node.socket, "POST", "/v1/forks", fork).status == 200);
}

#[test]
fn a_client_that_leaves_midway_leaves_nothing_unregistered() {
    let node = InProcess::start(Limits::default(), "fork_ms=500");
    let body = br#"{"from":{"guest":"probe"},"count":3}"#;
    let mut leaver = connect(&node.socket);
    let head = format!("POST /v1/forks HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", body.len());
    leaver.write_all(&[head.as_bytes(), body].concat()).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    drop(leaver);
    eventually("its machines are listed", || {
        http(&node.socket, "GET", "/v1/machines", b"").json()["machines"].as_array().unwrap().len() == 3
    });
}
