//! The chat template: Jinja, interpreted by minijinja with an allowance of work, depth and output.

use std::io::{self, Write};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, ValueKind};
use minijinja::{AutoEscape, Environment, ErrorKind as JinjaKind, Value};
use serde::{Deserialize, Serialize};

use crate::engine::panic_text;
use crate::error::{Error, ErrorKind, Result};

const MAX_TEMPLATE: usize = 64 << 10;
const MAX_RENDERED: usize = 1 << 20;
const MAX_DEPTH: usize = 64;
const FUEL: u64 = 200_000;
/// Values nested by a hostile template are dropped recursively: FUEL / 8 levels must fit.
const RENDER_STACK: usize = 64 << 20;

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// Its text.
    pub content: String,
}

/// A chat template and the special tokens it may name.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: String,
    /// `bos_token`, `eos_token`, … of tokenizer_config.json.
    tokens: Vec<(String, String)>,
}

impl ChatTemplate {
    pub(super) fn from_files(config: Option<&[u8]>, jinja: Option<&[u8]>) -> Result<Option<Self>> {
        let config: serde_json::Value = match config {
            Some(text) => serde_json::from_slice(text)
                .map_err(|e| Error::format(format!("tokenizer_config.json: not valid JSON: {e}")))?,
            None => serde_json::Value::Null,
        };
        let from_config = || match &config["chat_template"] {
            serde_json::Value::String(source) => Some(source.clone()),
            serde_json::Value::Array(list) => {
                let default = list.iter().find(|t| t["name"] == "default")?;
                default["template"].as_str().map(str::to_owned)
            }
            _ => None,
        };
        let source = match jinja {
            Some(bytes) => {
                let text = String::from_utf8(bytes.to_vec());
                Some(text.map_err(|e| Error::format(format!("chat_template.jinja: not UTF-8: {e}")))?)
            }
            None => from_config(),
        };
        let Some(source) = source else { return Ok(None) };
        let mut tokens = Vec::new();
        for (key, value) in config.as_object().into_iter().flatten() {
            if let Some(text) = value.as_str().or_else(|| value["content"].as_str()).filter(|_| key.ends_with("_token"))
            {
                tokens.push((key.clone(), text.to_owned()));
            }
        }
        Self::new(source, tokens).map(Some)
    }

    /// A template from its source, with the special tokens it may use (`bos_token`, `eos_token`, …).
    ///
    /// # Errors
    /// `Limit` above 64 KiB; `Template` for a syntax error or an unsafe use of `namespace`.
    pub fn new(source: String, tokens: Vec<(String, String)>) -> Result<Self> {
        if source.len() > MAX_TEMPLATE {
            return Err(Error::limit(format!(
                "the chat template has {} bytes, at most {MAX_TEMPLATE} are allowed",
                source.len()
            )));
        }
        // Training marks around the assistant's turns; they produce no text.
        let source = replace_generation_tags(&source);
        refuse_namespace_cycles(&source)?;
        environment().template_from_str(&source).map_err(|e| Error::template(format!("chat template: {e:#}")))?;
        Ok(ChatTemplate { source, tokens })
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders a conversation.
    ///
    /// # Errors
    /// `Template` if the template raises, misuses a value or exceeds its allowance.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let input: usize = messages.iter().map(|m| m.role.len() + m.content.len()).sum();
        let mut context = serde_json::Map::new();
        let to_value = |v| serde_json::to_value(v).map_err(|e| Error::internal(e.to_string()));
        context.insert("messages".into(), to_value(messages)?);
        context.insert("add_generation_prompt".into(), add_generation_prompt.into());
        context.insert("tools".into(), serde_json::Value::Null);
        context.insert("documents".into(), serde_json::Value::Null);
        for (name, text) in &self.tokens {
            context.insert(name.clone(), text.clone().into());
        }
        let render = || {
            let mut environment = environment();
            // Each pass over the input costs a unit per 64 bytes.
            environment.set_fuel(Some(FUEL + 32 * (input as u64 / 64)));
            let mut out = Capped { text: Vec::new(), max: MAX_RENDERED.max(4 * input) };
            environment
                .template_from_str(&self.source)
                .and_then(|t| t.render_captured_to(Value::from(Serde(&context)), &mut out).map(|_| ()))
                .map_err(|e| describe(&e))?;
            String::from_utf8(out.text).map_err(|e| Error::template(format!("chat template: {e}")))
        };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().stack_size(RENDER_STACK).spawn_scoped(scope, render);
            let thread =
                thread.map_err(|e| Error::new(ErrorKind::HostMemory, format!("cannot start a thread: {e}")))?;
            thread.join().map_err(|p| Error::template(format!("chat template: it panicked: {}", panic_text(&*p))))?
        })
    }
}

fn describe(error: &minijinja::Error) -> Error {
    match error.kind() {
        JinjaKind::OutOfFuel => Error::template("chat template: it did more work than its allowance"),
        JinjaKind::WriteFailure => Error::template("chat template: it wrote more text than its allowance"),
        _ => Error::template(format!("chat template: {error:#}")),
    }
}

struct Capped {
    text: Vec<u8>,
    max: usize,
}

impl Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.text.len() + bytes.len() > self.max {
            return Err(io::Error::other("the rendered text is too long"));
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The environment that transformers gives chat templates, less `strftime_now`: a prompt must not depend on the day.
/// Templates that want a date test whether that function is defined and have a fixed one otherwise.
fn environment<'a>() -> Environment<'a> {
    let mut e = Environment::new();
    if let Ok(syntax) = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() {
        e.set_syntax(syntax);
    }
    e.set_auto_escape_callback(|_| AutoEscape::None);
    e.set_recursion_limit(100);
    e.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    e.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
        Err(minijinja::Error::new(JinjaKind::InvalidOperation, message))
    });
    e.add_filter("tojson", to_json);
    e
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`.
fn to_json(value: &Value, options: Kwargs) -> Result<Value, minijinja::Error> {
    let indent = options.get::<Option<usize>>("indent")?;
    options.assert_all_used()?;
    let mut out = String::new();
    write_json(value, indent.map(|n| n.min(16)), 0, &mut out)?;
    Ok(Value::from(out))
}

fn write_json(value: &Value, indent: Option<usize>, depth: usize, out: &mut String) -> Result<(), minijinja::Error> {
    let fail = |message: &str| minijinja::Error::new(JinjaKind::InvalidOperation, message.to_owned());
    if depth > MAX_DEPTH || out.len() > MAX_RENDERED {
        return Err(fail("tojson: the value is too large"));
    }
    let is_map = value.kind() == ValueKind::Map;
    match value.kind() {
        ValueKind::Map | ValueKind::Seq | ValueKind::Iterable => {
            out.push(if is_map { '{' } else { '[' });
            let mut empty = true;
            for item in value.try_iter()? {
                if !empty {
                    out.push_str(if indent.is_some() { "," } else { ", " });
                }
                empty = false;
                new_line(indent, depth + 1, out);
                if is_map {
                    let key = item.as_str().map_or_else(|| item.to_string(), str::to_owned);
                    write_text(&key, out)?;
                    out.push_str(": ");
                    write_json(&value.get_item(&item)?, indent, depth + 1, out)?;
                } else {
                    write_json(&item, indent, depth + 1, out)?;
                }
            }
            if !empty {
                new_line(indent, depth, out);
            }
            out.push(if is_map { '}' } else { ']' });
        }
        ValueKind::String => write_text(value.as_str().unwrap_or_default(), out)?,
        ValueKind::Number | ValueKind::Bool => out.push_str(&value.to_string()),
        ValueKind::None => out.push_str("null"),
        _ => return Err(fail("tojson: the value has no JSON form")),
    }
    Ok(())
}

fn write_text(text: &str, out: &mut String) -> Result<(), minijinja::Error> {
    let json = serde_json::to_string(text);
    out.push_str(&json.map_err(|e| minijinja::Error::new(JinjaKind::InvalidOperation, e.to_string()))?);
    Ok(())
}

fn new_line(indent: Option<usize>, depth: usize, out: &mut String) {
    if let Some(width) = indent {
        out.push('\n');
        out.extend(std::iter::repeat_n(' ', width * depth));
    }
}

fn replace_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let Some(end) = rest[at..].find("%}").map(|n| at + n + 2) else { break };
        let tag = &rest[at..end];
        out.push_str(&rest[..at]);
        match tag[2..tag.len() - 2].trim_matches(['-', '+']).trim() {
            "generation" => out.push_str(&tag.replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endif", 1)),
            _ => out.push_str(tag),
        }
        rest = &rest[end..];
    }
    out.push_str(rest);
    out
}

/// A namespace that contains itself overflows the stack when it is printed. So a namespace may only be made by
/// `set NAME = namespace(…)`, and NAME may only be followed by a dot: it can then never become a value.
///
/// The whole source is read as code, text and strings included: a lexer of our own that skipped them could be led to
/// disagree with the real one. The price is that NAME must not be a word of the template's text either.
fn refuse_namespace_cycles(source: &str) -> Result<()> {
    let words = words(source);
    let text = |i: usize| words.get(i).copied().unwrap_or("");
    let declares = |i: usize| text(i + 1) == "=" && text(i + 2) == "namespace" && i > 0 && text(i - 1) == "set";
    let mut names = Vec::new();
    for i in 0..words.len() {
        if text(i) == "namespace" {
            if i < 2 || !declares(i - 2) || text(i + 1) != "(" {
                return Err(Error::template(
                    "chat template: \"namespace\" is allowed only in {% set NAME = namespace(…) %}",
                ));
            }
            names.push(text(i - 2));
        }
    }
    for i in 0..words.len() {
        if names.contains(&text(i)) && !declares(i) && text(i + 1) != "." {
            return Err(Error::template(format!(
                "chat template: the namespace {:?} may only be used by its attributes",
                text(i)
            )));
        }
    }
    Ok(())
}

/// Identifiers and single other characters, without white space.
fn words(source: &str) -> Vec<&str> {
    let mut words = Vec::new();
    let mut rest = source;
    while let Some(c) = rest.chars().next() {
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        let len = if is_word(c) { rest.find(|c| !is_word(c)).unwrap_or(rest.len()) } else { c.len_utf8() };
        if !c.is_whitespace() {
            words.push(&rest[..len]);
        }
        rest = &rest[len..];
    }
    words
}
