//! Tokens, queue, sizes, time, clients that go away, and the end.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::golden;
use crate::server::{Server, command, with_tokenizer};

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
    post(server, "/v1/completions", body)
}

fn post(server: &Server, path: &str, body: &Value) -> TcpStream {
    let stream = TcpStream::connect(server.url.strip_prefix("http://").unwrap()).unwrap();
    write_request(stream, path, body)
}

/// As a client does whose window is small, so that what it does not read stays with the server.
fn post_slowly(server: &Server, path: &str, body: &Value) -> TcpStream {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let address: std::net::SocketAddr = server.url.strip_prefix("http://").unwrap().parse().unwrap();
    socket.connect(&address.into()).unwrap();
    write_request(socket.into(), path, body)
}

fn write_request(mut stream: TcpStream, path: &str, body: &Value) -> TcpStream {
    let body = body.to_string();
    write!(stream, "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len()).unwrap();
    stream
}

fn answered(endpoint: &str, status: &str) -> String {
    format!("rewardrt_http_requests_total{{endpoint=\"{endpoint}\",status=\"{status}\"}}")
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
    assert!(server.metric(&answered("/v1/completions", "429")) >= 1.0);
}

#[test]
fn others_wait_for_their_place() {
    let server = start(&["--max-concurrent", "1"]);
    let first = send(&server, &long());
    until("the first job", || server.metric(JOBS) == 1.0);
    let mut second = send(&server, &json!({"prompt": [1], "max_tokens": 1}));
    until("the second request", || server.metric("rewardrt_http_waiting") == 1.0);
    assert_eq!((server.metric(JOBS), server.metric("rewardrt_http_in_flight")), (1.0, 2.0));
    drop(first);
    let mut start = [0; 12];
    second.read_exact(&mut start).unwrap();
    assert_eq!(&start, b"HTTP/1.1 200");
    until("the count", || server.metric(&answered("/v1/completions", "cancelled")) == 1.0);
}

/// What the engine could not hold together waits as well.
#[test]
fn others_wait_for_tokens() {
    let server = start(&["--max-queued-tokens", "1000"]);
    let body = json!({"prompt": [1, 9], "n": 4, "max_tokens": 200, "ignore_eos": true});
    let mut all: Vec<TcpStream> = (0..8).map(|_| send(&server, &body)).collect();
    for connection in &mut all {
        let mut start = [0; 12];
        connection.read_exact(&mut start).unwrap();
        assert_eq!(&start, b"HTTP/1.1 200");
    }
}

/// verl sends a chunk of any size at once, and takes no second try.
#[test]
fn a_thousand_at_once_are_answered() {
    let rewards = format!("r={}", golden("llama-labels-1").display());
    let server = Server::start(command().args(["--reward", &rewards, "--max-context", "512", "--kv-tokens", "4096"]));
    let body = |i: u32| json!({"input": [1, 6 + i % 90, 9]});
    let mut all: Vec<TcpStream> = (0..1024).map(|i| post(&server, "/classify", &body(i))).collect();
    for connection in &mut all {
        let mut start = [0; 12];
        connection.read_exact(&mut start).unwrap();
        assert_eq!(&start, b"HTTP/1.1 200");
    }
    assert_eq!(server.metric(&answered("/classify", "200")), 1024.0);
}

#[test]
fn bodies_beyond_their_memory_answer_429() {
    let server = start(&["--max-queued-bytes", "8K", "--max-body", "6K"]);
    let mut slow = TcpStream::connect(server.url.strip_prefix("http://").unwrap()).unwrap();
    write!(slow, "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 6000\r\n\r\n").unwrap();
    until("the slow one", || server.metric("rewardrt_http_waiting") == 1.0);
    let body = json!({"prompt": [1], "user": "x".repeat(4000)});
    let (status, answer) = server.post("/v1/completions", &body);
    assert_eq!(status, 429, "{answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains("--max-queued-bytes"), "{answer}");
    drop(slow);
    until("room", || server.post("/v1/completions", &body).0 == 200);
}

/// A few megabytes that would be gigabytes of ids are refused at the first bound.
#[test]
fn a_long_query_for_many_documents_is_not_encoded() {
    let folder = tempfile::tempdir().unwrap();
    let path = with_tokenizer("llama-labels-1", folder.path());
    let server = Server::start(command().args(["--reward", path.to_str().unwrap(), "--max-queued-tokens", "5000"]));
    let began = Instant::now();
    let refused = |query: &str, documents: Vec<&str>, says: &str| {
        for (path, first, second) in [("/rerank", "query", "documents"), ("/score", "text_1", "text_2")] {
            let (status, answer) = server.post(path, &json!({first: query, second: documents}));
            assert_eq!((status, &answer["error"]["param"]), (400, &json!(second)), "{answer}");
            assert!(answer["error"]["message"].as_str().unwrap().contains(says), "{answer}");
        }
    };
    refused(&"q".repeat(1 << 20), vec!["d"; 60_000], "sequence 0 has");
    refused("q", vec!["d"; 70_000], "at most 65536");
    refused(&"q".repeat(40), vec!["d"; 60_000], "at most 5000 are taken");
    // One encoding of the first takes less than a second; all of them would take hours.
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
}

/// hyper asks for no more of an answer that is not read, so it is the connection that ends.
#[test]
fn clients_that_do_not_read_are_cut_off() {
    let folder = tempfile::tempdir().unwrap();
    let policy = format!("p={}", with_tokenizer("llama-tied", folder.path()).display());
    let reward = format!("r={}", golden("llama-labels-3").display());
    let mut command = command();
    command.args(["--model", &policy, "--reward", &reward, "--max-context", "512", "--kv-tokens", "4096"]);
    let server = Server::start(command.args(["--timeout", "6"]));
    let mut body = long();
    body["prompt"] = json!(vec![9; 200]);
    body["max_tokens"] = json!(300);
    // With their log-probs these count three times, and all of --max-queued-tokens is 4 Mi.
    body["n"] = json!(1000);
    body["stream"] = json!(true);
    body["logprobs"] = json!(2);
    body["return_token_ids"] = json!(true);
    let began = Instant::now();
    let streamed = post_slowly(&server, "/v1/completions", &body);
    // Twice what the system takes off the server's hands (tcp_wmem, 4 MiB as a rule, with its bookkeeping).
    let whole = post_slowly(&server, "/classify", &json!({"input": vec![[1]; 60_000]}));
    until("the whole answer", || server.get("/metrics").1.contains(&answered("/classify", "200")));
    // Its bytes are not written, and the stream's are not even asked for.
    std::thread::sleep(Duration::from_secs(5));
    // One of them may fit into larger buffers than usual.
    assert!(server.metric("rewardrt_http_in_flight") >= 1.0);
    until("the end", || server.metric("rewardrt_http_in_flight") == 0.0 && server.metric(JOBS) == 0.0);
    assert!(began.elapsed() > Duration::from_secs(15));
    let metrics = server.get("/metrics").1;
    assert!(
        ["/v1/completions", "/classify"].iter().any(|path| metrics.contains(&answered(path, "cancelled"))),
        "{metrics}"
    );
    drop((streamed, whole));
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
    assert_eq!(server.metric(&answered("/v1/completions", "504")), 1.0);
    // A stream has begun by then: the error is its last event, and what it is counted with.
    let mut streamed = long();
    streamed["stream"] = json!(true);
    let events = server.events("/v1/completions", &streamed);
    let (last, chunks) = events.split_last().unwrap();
    let last: Value = serde_json::from_str(last).unwrap();
    assert_eq!(last["error"]["code"], "timeout", "{last}");
    assert!(!chunks.is_empty());
    assert_eq!(server.metric(&answered("/v1/completions", "504")), 2.0);
    // A body that never comes is late sooner than the work would be.
    let mut stream = TcpStream::connect(server.url.strip_prefix("http://").unwrap()).unwrap();
    write!(stream, "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{{").unwrap();
    let mut start = [0; 12];
    stream.read_exact(&mut start).unwrap();
    assert_eq!(&start, b"HTTP/1.1 408");
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
    assert_eq!(server.metric(&answered("/v1/completions", "cancelled")), 2.0);
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
    assert_eq!(server.metric(&answered("/v1/completions", "200")), 1.0);
    assert_eq!(server.metric("rewardrt_http_request_seconds_count{endpoint=\"/v1/completions\"}"), 1.0);
    assert_eq!(server.metric("rewardrt_kv_blocks{model=\"p\"}"), 256.0);
}
