//! As much of HTTP/1.1 as it takes to ask a daemon on a Unix socket something, over and over on one connection.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, ensure};

/// One request; its answer, which must be a success.
pub(crate) fn request(connection: &mut UnixStream, verb: &str, path: &str, body: &str) -> Result<String> {
    let length = body.len();
    let head = format!(
        "{verb} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    );
    connection.write_all(format!("{head}{body}").as_bytes())?;
    let mut answer = String::new();
    loop {
        let mut part = [0; 4096];
        let read = connection.read(&mut part).with_context(|| format!("{verb} {path}"))?;
        ensure!(read > 0, "{verb} {path}: the connection was closed");
        answer.push_str(&String::from_utf8_lossy(&part[..read]));
        if let Some((head, body)) = answer.split_once("\r\n\r\n") {
            let due = head.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length:")?.trim().parse().ok());
            if body.len() >= due.unwrap_or(0) {
                break;
            }
        }
    }
    ensure!(answer.starts_with("HTTP/1.1 20"), "{verb} {path}: {answer}");
    Ok(answer)
}

/// The body of an answer, as JSON.
pub(crate) fn json(answer: &str) -> Result<serde_json::Value> {
    let (_, body) = answer.split_once("\r\n\r\n").context("an answer without a body")?;
    Ok(serde_json::from_str(body)?)
}
