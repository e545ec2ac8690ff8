//! Ten thousand requests at once.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

use crate::support::{Node, eventually};

const CONNECTIONS: usize = 500;
const REQUESTS_EACH: usize = 20;

#[test]
fn ten_thousand_requests_over_500_connections_are_answered_and_leave_nothing_open() {
    let node = Node::start("");
    node.http("GET", "/v1/node", b"");
    let before = node.descriptors();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let forked: usize = runtime.block_on(async {
        let clients: Vec<_> = (0..CONNECTIONS).map(|number| tokio::spawn(client(node.socket.clone(), number))).collect();
        let mut forked = 0;
        for client in clients {
            forked += client.await.unwrap();
        }
        forked
    });
    assert_eq!(node.machines().len(), forked, "each fork that was answered is there, and no other");
    eventually("the node has as many descriptors as before", || node.descriptors() <= before);
    assert_eq!(node.http("POST", "/v1/machines/kill", br#"{"all":true}"#).status, 200);
    assert!(node.machines().is_empty());
}

/// Asks one after the other on one connection; how many machines it was given.
async fn client(socket: PathBuf, number: usize) -> usize {
    let stream = connect(&socket).await;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    let connection = tokio::spawn(connection);
    let mut forked = 0;
    for turn in 0..REQUESTS_EACH {
        let (method, path, body, expected): (_, _, &[u8], &[u16]) = match (number + turn) % 5 {
            0 => ("POST", "/v1/forks", br#"{"from":{"guest":"probe"}}"#, &[200, 429]),
            1 => ("POST", "/v1/forks", b"{\"from\":", &[400]),
            2 => ("GET", "/v1/node", b"", &[200, 429]),
            3 => ("DELETE", "/v1/machines/00000000", b"", &[404, 429]),
            _ => ("GET", "/v1/nowhere", b"", &[404]),
        };
        let request = Request::builder().method(method).uri(path).header("host", "x");
        let response = sender.send_request(request.body(Full::new(Bytes::from_static(body))).unwrap()).await.unwrap();
        let status = response.status().as_u16();
        response.into_body().collect().await.unwrap();
        assert!(expected.contains(&status), "{status} for {method} {path}");
        forked += usize::from(path == "/v1/forks" && status == 200);
    }
    drop(sender);
    connection.await.unwrap().unwrap();
    forked
}

async fn connect(socket: &Path) -> UnixStream {
    loop {
        match UnixStream::connect(socket).await {
            Ok(stream) => return stream,
            // The backlog is full for the moment.
            Err(error) if error.kind() == ErrorKind::WouldBlock => tokio::task::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    }
}
