//! A `rewardrt serve` of one's own, on golden models that were given a tokenizer.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::golden;

/// Puts a golden model and a tokenizer for its 101 ids into a folder: six special tokens, then the printable characters of
/// ASCII, one token each.
pub fn with_tokenizer(name: &str, folder: &Path) -> PathBuf {
    let target = folder.join(name);
    std::fs::create_dir_all(&target).unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(golden(name).join(file), target.join(file)).unwrap();
    }
    let special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"];
    let mut vocabulary = serde_json::Map::new();
    let letters = ('!'..='~').map(String::from).chain(["Ġ".to_owned()]);
    for (id, token) in special.iter().map(|s| (*s).to_owned()).chain(letters).enumerate() {
        vocabulary.insert(token, id.into());
    }
    let added = |(id, content): (usize, &&str)| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": special.iter().enumerate().map(added).collect::<Vec<_>>(),
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocabulary, "merges": []}
    });
    std::fs::write(target.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let template = "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}";
    let config = json!({"bos_token": "<s>", "eos_token": "</s>", "chat_template": template});
    std::fs::write(target.join("tokenizer_config.json"), config.to_string()).unwrap();
    target
}

/// The process, and where it listens.
pub struct Server {
    pub child: Child,
    pub url: String,
    said: Arc<Mutex<String>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The command, with everything but the models.
pub fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rewardrt"));
    command.args(["serve", "--port", "0", "--device", "cpu", "--threads", "2"]);
    command
}

impl Server {
    pub fn start(command: &mut Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut text = String::new();
        let url = loop {
            let mut line = String::new();
            assert!(stderr.read_line(&mut line).unwrap() > 0, "the server ended: {text}");
            if let Some(url) = line.strip_prefix("rewardrt: listening on ") {
                break url.trim().to_owned();
            }
            text += &line;
        };
        let said = Arc::new(Mutex::new(text));
        let for_thread = said.clone();
        std::thread::spawn(move || {
            let mut rest = String::new();
            let _ = stderr.read_to_string(&mut rest);
            for_thread.lock().unwrap().push_str(&rest);
        });
        Server { child, url, said }
    }

    /// Posts a body; the status and what came back.
    pub fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let (status, text) = self.send("POST", path, body.to_string().as_bytes(), &[]);
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// Posts a body that must be taken.
    #[track_caller]
    pub fn ask(&self, path: &str, body: Value) -> Value {
        let (status, answer) = self.post(path, &body);
        assert_eq!(status, 200, "{path} {body}: {answer}");
        answer
    }

    pub fn get(&self, path: &str) -> (u16, String) {
        self.send("GET", path, b"", &[])
    }

    pub fn send(&self, method: &str, path: &str, body: &[u8], headers: &[(&str, &str)]) -> (u16, String) {
        let mut response = self.respond(method, path, body, headers);
        (response.status().as_u16(), response.body_mut().read_to_string().unwrap())
    }

    pub fn respond(
        &self,
        method: &str,
        path: &str,
        body: &[u8],
        headers: &[(&str, &str)],
    ) -> ureq::http::Response<ureq::Body> {
        let config = ureq::Agent::config_builder().http_status_as_error(false);
        let agent = config.timeout_global(Some(Duration::from_secs(120))).build().new_agent();
        let mut request = ureq::http::Request::builder().method(method).uri(format!("{}{path}", self.url));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if method == "GET" {
            return agent.run(request.body(()).unwrap()).unwrap();
        }
        agent.run(request.header("content-type", "application/json").body(body).unwrap()).unwrap()
    }

    /// The data of server-sent events, in order.
    pub fn events(&self, path: &str, body: &Value) -> Vec<String> {
        let (status, text) = self.send("POST", path, body.to_string().as_bytes(), &[]);
        assert_eq!(status, 200, "{text}");
        text.lines().filter_map(|l| l.strip_prefix("data: ")).map(str::to_owned).collect()
    }

    /// A metric by its name and labels, as it is written.
    #[track_caller]
    pub fn metric(&self, name: &str) -> f64 {
        let (_, text) = self.get("/metrics");
        let line = text.lines().find_map(|l| l.strip_prefix(name).and_then(|l| l.strip_prefix(' ')));
        line.unwrap_or_else(|| panic!("no {name} in\n{text}")).parse().unwrap()
    }

    /// Sends SIGTERM.
    pub fn terminate(&self) {
        let status = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Waits for its end; the exit code.
    pub fn ended(&mut self, within: Duration) -> Option<i32> {
        let since = Instant::now();
        while since.elapsed() < within {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        None
    }

    /// What it wrote to stderr after its address; complete once it has ended.
    pub fn said(&self) -> String {
        self.said.lock().unwrap().clone()
    }
}
