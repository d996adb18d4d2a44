//! What a tokenizer.json must satisfy before the `tokenizers` crate sees it: the crate validates little, and some
//! files make it panic, or allocate without bound, later on.

use std::collections::HashSet;

use serde_json::Value;

use crate::error::{Error, Result};

const MAX_ID: u64 = 1 << 20;
const MAX_DEPTH: usize = 16;
const MAX_COMPONENTS: usize = 64;
const MAX_ADDED: usize = 100_000;
const MAX_CONTENT: usize = 512;
const MAX_REPLACEMENT: usize = 64;
const MAX_TEMPLATE_IDS: usize = 8;

/// Checks `json` and switches truncation and padding off, which the runtime never wants.
pub(super) fn sanitise(json: &mut Value) -> Result<()> {
    let fail = |message: &str| Err(Error::format(format!("tokenizer.json: {message}")));
    if depth(json) > MAX_DEPTH {
        return fail(&format!("nested more than {MAX_DEPTH} deep"));
    }
    let Some(object) = json.as_object_mut() else { return fail("not an object") };
    object.insert("truncation".into(), Value::Null);
    object.insert("padding".into(), Value::Null);
    let Some(model) = object.get("model").filter(|m| m.is_object()) else { return fail("\"model\" is missing") };
    check_model(model)?;
    check_added(object.get("added_tokens").unwrap_or(&Value::Null))?;
    let mut components = 0;
    for key in ["normalizer", "pre_tokenizer", "post_processor", "decoder"] {
        check_component(key, object.get(key).unwrap_or(&Value::Null), &mut components)?;
    }
    Ok(())
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Array(list) => 1 + list.iter().map(depth).max().unwrap_or(0),
        Value::Object(map) => 1 + map.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

fn bad(place: &str, message: impl std::fmt::Display) -> Error {
    Error::format(format!("tokenizer.json: {place}: {message}"))
}

fn small_id(value: Option<&Value>) -> Option<u64> {
    value.and_then(Value::as_u64).filter(|id| *id < MAX_ID)
}

fn check_model(model: &Value) -> Result<()> {
    let kind = model["type"].as_str().ok_or_else(|| bad("model", "\"type\" is missing"))?;
    match kind {
        "BPE" | "WordPiece" | "WordLevel" => {
            let vocab = model["vocab"].as_object().ok_or_else(|| bad("model", "\"vocab\" must be an object"))?;
            let mut ids = HashSet::with_capacity(vocab.len());
            for (token, id) in vocab {
                let id = small_id(Some(id)).ok_or_else(|| {
                    bad("model.vocab", format!("{token:?} has the id {id}, it must be below {MAX_ID}"))
                })?;
                if !ids.insert(id) {
                    return Err(bad("model.vocab", format!("{token:?} has the id {id}, which another token has too")));
                }
            }
            if vocab.is_empty() {
                return Err(bad("model.vocab", "empty"));
            }
            if kind == "BPE" { check_merges(model, vocab) } else { Ok(()) }
        }
        "Unigram" => {
            let vocab = model["vocab"].as_array().ok_or_else(|| bad("model", "\"vocab\" must be a list"))?;
            let piece = |v: &Value| {
                let text = v.get(0).and_then(Value::as_str).is_some_and(|s| !s.is_empty());
                text && v.get(1).and_then(Value::as_f64).is_some_and(f64::is_finite)
            };
            if vocab.is_empty() || vocab.len() as u64 > MAX_ID || !vocab.iter().all(piece) {
                return Err(bad("model.vocab", "must be pairs of a non-empty string and a finite number"));
            }
            match model.get("unk_id").filter(|v| !v.is_null()) {
                Some(id) if id.as_u64().is_none_or(|id| id >= vocab.len() as u64) => {
                    Err(bad("model.unk_id", format!("{id} is not in the vocabulary")))
                }
                _ => Ok(()),
            }
        }
        other => Err(bad("model", format!("type {other:?}; known are BPE, Unigram, WordPiece and WordLevel"))),
    }
}

fn check_merges(model: &Value, vocab: &serde_json::Map<String, Value>) -> Result<()> {
    let prefix = model["continuing_subword_prefix"].as_str().unwrap_or("");
    let merges = model["merges"].as_array().ok_or_else(|| bad("model", "\"merges\" must be a list"))?;
    for merge in merges {
        let pair = match merge {
            Value::String(s) => s.split_once(' '),
            Value::Array(list) if list.len() == 2 => list[0].as_str().zip(list[1].as_str()),
            _ => None,
        };
        let known = pair.is_some_and(|(a, b)| {
            let joined = b.strip_prefix(prefix).map(|rest| format!("{a}{rest}"));
            vocab.contains_key(a) && vocab.contains_key(b) && joined.is_some_and(|j| vocab.contains_key(&j))
        });
        if !known {
            return Err(bad("model.merges", format!("{merge} is not a pair of tokens whose join is a token")));
        }
    }
    if model.get("dropout").is_some_and(|d| !d.is_null() && d.as_f64() != Some(0.0)) {
        return Err(Error::unsupported("tokenizer.json: model: dropout would make encoding random"));
    }
    Ok(())
}

fn check_added(added: &Value) -> Result<()> {
    let empty = Vec::new();
    let list = match added {
        Value::Null => &empty,
        Value::Array(list) if list.len() <= MAX_ADDED => list,
        _ => return Err(bad("added_tokens", format!("must be a list of at most {MAX_ADDED}"))),
    };
    let mut contents = HashSet::new();
    for token in list {
        let content = token["content"].as_str().unwrap_or("");
        if content.is_empty() || content.len() > MAX_CONTENT || small_id(token.get("id")).is_none() {
            return Err(bad(
                "added_tokens",
                format!("{token} needs an id below {MAX_ID} and 1 to {MAX_CONTENT} bytes of content"),
            ));
        }
        if !contents.insert(content) {
            return Err(bad("added_tokens", format!("{content:?} stands twice")));
        }
    }
    Ok(())
}

/// Checks a normalizer, pre-tokenizer, post-processor or decoder and what it is made of.
fn check_component(place: &str, value: &Value, count: &mut usize) -> Result<()> {
    *count += 1;
    if *count > MAX_COMPONENTS {
        return Err(bad(place, format!("more than {MAX_COMPONENTS} components")));
    }
    if value.is_null() {
        return Ok(());
    }
    for key in ["normalizers", "pretokenizers", "processors", "decoders"] {
        for part in value[key].as_array().into_iter().flatten() {
            check_component(place, part, count)?;
        }
    }
    match value["type"].as_str() {
        None => Err(bad(place, "\"type\" is missing")),
        Some("FixedLength") if value["length"].as_u64().is_none_or(|n| n == 0) => Err(bad(place, "FixedLength of 0")),
        Some("Strip") if place == "decoder" && value["stop"].as_u64() != Some(0) => {
            Err(bad(place, format!("Strip with stop {}; only 0 is safe", value["stop"])))
        }
        Some("Replace") if value["content"].as_str().is_none_or(|c| c.len() > MAX_REPLACEMENT) => {
            Err(bad(place, format!("Replace needs at most {MAX_REPLACEMENT} bytes of content")))
        }
        Some("TemplateProcessing") => check_template(place, value),
        _ => Ok(()),
    }
}

fn check_template(place: &str, value: &Value) -> Result<()> {
    let tokens = &value["special_tokens"];
    for token in tokens.as_object().into_iter().flat_map(|map| map.values()) {
        let (ids, names) = (token["ids"].as_array(), token["tokens"].as_array());
        let lengths = (ids.map_or(0, Vec::len), names.map_or(0, Vec::len));
        let small = ids.is_some_and(|ids| ids.iter().all(|id| small_id(Some(id)).is_some()));
        if !small || lengths.0 != lengths.1 || lengths.0 > MAX_TEMPLATE_IDS {
            return Err(bad(
                place,
                format!("special token {token} needs as many ids as tokens, at most {MAX_TEMPLATE_IDS}"),
            ));
        }
    }
    for (template, allowed) in [("single", &["A"][..]), ("pair", &["A", "B"][..])] {
        let Some(pieces) = value[template].as_array() else {
            return Err(bad(place, format!("TemplateProcessing needs {template:?}")));
        };
        let mut sequences = Vec::new();
        for piece in pieces {
            if let Some(id) = piece["SpecialToken"]["id"].as_str() {
                if tokens.get(id).is_none() {
                    return Err(bad(place, format!("the template uses {id:?}, which special_tokens lacks")));
                }
            } else if let Some(id) = piece["Sequence"]["id"].as_str().filter(|id| allowed.contains(id)) {
                sequences.push(id);
            } else {
                return Err(bad(place, format!("{piece} is not a piece of a {template:?} template")));
            }
        }
        if sequences.len() != allowed.len() {
            return Err(bad(place, format!("a {template:?} template must contain its text once")));
        }
    }
    Ok(())
}
