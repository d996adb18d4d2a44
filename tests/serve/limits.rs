//! Tokens, queue, sizes, time, clients that go away, and the end.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::golden;
use crate::server::{Server, command};

const JOBS: &str = "rewardrt_jobs{model=\"p\"}";

fn start(args: &[&str]) -> Server {
    let model = format!("p={}", golden("llama-tied").display());
    Server::start(command().args(["--model", &model, "--max-context", "512", "--kv-tokens", "4096"]).args(args))
}

/// Work for minutes.
fn long() -> Value {
    json!({"prompt": [1, 9], "n": 4000, "max_tokens": 500, "ignore_eos": true})
}

/// A request on a connection of its own, not waited for.
fn send(server: &Server, body: &Value) -> TcpStream {
    let mut stream = TcpStream::connect(server.url.strip_prefix("http://").unwrap()).unwrap();
    let body = body.to_string();
    write!(stream, "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len()).unwrap();
    stream
}

#[track_caller]
fn until(what: &str, ready: impl Fn() -> bool) {
    let since = Instant::now();
    while !ready() {
        assert!(since.elapsed() < Duration::from_secs(30), "{what} did not come");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_token_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    std::fs::write(&file, " s3cret\n").unwrap();
    let server = start(&["--token-file", file.to_str().unwrap()]);
    let body = json!({"prompt": [1, 9]}).to_string();
    let post = |headers: &[(&str, &str)]| server.send("POST", "/v1/completions", body.as_bytes(), headers);
    for headers in [
        &[][..],
        &[("authorization", "Bearer wrong")],
        &[("authorization", "Bearer s3cre")],
        &[("authorization", "Bearer s3cret2")],
        &[("authorization", "s3cret")],
        &[("authorization", "Basic s3cret")],
        &[("authorization", "")],
    ] {
        let response = server.respond("POST", "/v1/completions", body.as_bytes(), headers);
        assert_eq!(response.status(), 401, "{headers:?}");
        assert_eq!(response.headers()["www-authenticate"], "Bearer");
    }
    let (_, text) = post(&[]);
    let error: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        (&error["error"]["type"], &error["error"]["code"]),
        (&json!("authentication_error"), &json!("invalid_api_key"))
    );
    assert_eq!(post(&[("authorization", "bearer s3cret")]).0, 200);
    assert_eq!(post(&[("authorization", "Bearer s3cret")]).0, 200);
    assert_eq!((server.get("/health").0, server.get("/metrics").0, server.get("/v1/models").0), (200, 401, 401));
}

#[test]
fn a_full_queue_answers_429() {
    let server = start(&["--max-queue", "2"]);
    let (first, second) = (send(&server, &long()), send(&server, &long()));
    until("two jobs", || server.metric(JOBS) == 2.0);
    let response = server.respond("POST", "/v1/completions", b"{\"prompt\": [1]}", &[]);
    assert_eq!((response.status().as_u16(), &response.headers()["retry-after"]), (429, &"1".parse().unwrap()));
    assert_eq!(server.metric("rewardrt_http_in_flight"), 2.0);
    // Looking is free.
    assert_eq!(server.get("/health").0, 200);
    drop((first, second));
    until("room", || server.post("/v1/completions", &json!({"prompt": [1]})).0 == 200);
    let refused = "rewardrt_http_requests_total{endpoint=\"/v1/completions\",status=\"429\"}";
    assert!(server.metric(refused) >= 1.0);
}

#[test]
fn large_bodies_and_long_work() {
    let server = start(&["--max-body", "1K", "--timeout", "0.5"]);
    let (status, answer) = server.post("/v1/completions", &json!({"prompt": "x".repeat(2000)}));
    assert_eq!((status, &answer["error"]["code"]), (413, &json!("body_too_large")), "{answer}");
    let began = Instant::now();
    let (status, answer) = server.post("/v1/completions", &long());
    assert_eq!(
        (status, &answer["error"]["code"], &answer["error"]["type"]),
        (504, &json!("timeout"), &json!("server_error"))
    );
    assert!(began.elapsed() < Duration::from_secs(20));
    until("the cancel", || server.metric(JOBS) == 0.0);
    // A stream has begun by then: the error is its last event.
    let mut streamed = long();
    streamed["stream"] = json!(true);
    let events = server.events("/v1/completions", &streamed);
    let (last, chunks) = events.split_last().unwrap();
    let last: Value = serde_json::from_str(last).unwrap();
    assert_eq!(last["error"]["code"], "timeout", "{last}");
    assert!(!chunks.is_empty());
    // A body that never comes is late as well.
    let mut stream = TcpStream::connect(server.url.strip_prefix("http://").unwrap()).unwrap();
    write!(stream, "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{{").unwrap();
    let mut start = [0; 12];
    stream.read_exact(&mut start).unwrap();
    assert_eq!(&start, b"HTTP/1.1 504");
    until("room", || server.metric("rewardrt_http_in_flight") == 0.0);
}

#[test]
fn clients_that_go_away_cancel_their_work() {
    let server = start(&[]);
    for streamed in [false, true] {
        let mut body = long();
        body["stream"] = json!(streamed);
        let mut connection = send(&server, &body);
        until("the job", || server.metric(JOBS) == 1.0);
        if streamed {
            connection.read_exact(&mut [0; 1000]).unwrap();
        }
        drop(connection);
        until("its end", || server.metric(JOBS) == 0.0 && server.metric("rewardrt_http_in_flight") == 0.0);
    }
}

#[test]
fn it_stops_when_the_work_is_done() {
    let mut server = start(&["--drain", "60"]);
    let body = json!({"prompt": [1, 9], "n": 64, "max_tokens": 400, "ignore_eos": true});
    let mut connection = send(&server, &body);
    until("the job", || server.metric(JOBS) == 1.0);
    server.terminate();
    let address = server.url.strip_prefix("http://").unwrap().to_owned();
    let mut text = String::new();
    connection.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    let answer: Value = serde_json::from_str(text.split("\r\n\r\n").nth(1).unwrap()).unwrap();
    assert_eq!(answer["usage"]["completion_tokens"], 64 * 400);
    assert_eq!(server.ended(Duration::from_secs(30)), Some(0), "{}", server.said());
    assert!(TcpStream::connect(address).is_err());
}

#[test]
fn it_stops_when_the_time_is_up() {
    let mut server = start(&["--drain", "0.3"]);
    let mut connection = send(&server, &long());
    until("the job", || server.metric(JOBS) == 1.0);
    let began = Instant::now();
    server.terminate();
    assert_eq!(server.ended(Duration::from_secs(30)), Some(0));
    assert!(began.elapsed() >= Duration::from_millis(300));
    let mut text = String::new();
    assert_eq!(connection.read_to_string(&mut text).unwrap_or(0), 0, "{text}");
    until("its last words", || server.said().contains("cancelled"));
}

#[test]
fn metrics_are_open_metrics() {
    let server = start(&[]);
    server.ask("/v1/completions", json!({"prompt": [1, 9], "max_tokens": 7, "ignore_eos": true}));
    let response = server.respond("GET", "/metrics", b"", &[]);
    let kind = response.headers()["content-type"].to_str().unwrap();
    assert!(kind.starts_with("application/openmetrics-text"), "{kind}");
    let (_, text) = server.get("/metrics");
    assert!(text.ends_with("# EOF\n"));
    for line in text.lines().filter(|l| !l.starts_with('#')) {
        let (_, value) = line.rsplit_once(' ').unwrap();
        assert!(value.parse::<f64>().is_ok(), "{line}");
    }
    assert_eq!(server.metric("rewardrt_sampled_tokens_total{model=\"p\"}"), 7.0);
    assert_eq!(server.metric("rewardrt_http_requests_total{endpoint=\"/v1/completions\",status=\"200\"}"), 1.0);
    assert_eq!(server.metric("rewardrt_http_request_seconds_count{endpoint=\"/v1/completions\"}"), 1.0);
    assert_eq!(server.metric("rewardrt_kv_blocks{model=\"p\"}"), 256.0);
}
