//! Tokenizers for tests.

use serde_json::{Value, json};

use super::Tokenizer;

fn special(id: usize, content: &str) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
           "normalized": false, "special": true})
}

/// GPT-2's letters for bytes, a few longer tokens, `<|end|>` and `<|pad|>`.
pub(crate) fn byte_level() -> String {
    let printable = |b: &u8| matches!(b, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut others = (0x100u32..).filter_map(char::from_u32);
    let letter = |b: u8| if printable(&b) { char::from(b) } else { others.next().unwrap_or_default() };
    let mut vocab: Vec<String> = (0..=u8::MAX).map(letter).map(String::from).collect();
    let merges = [["t", "r"], ["tr", "u"], ["tru", "e"], ["a", "b"], ["ab", "c"], ["\"", ":"], ["}", "}"], ["1", "2"]];
    vocab.extend(merges.iter().map(|m| m.concat()));
    let ids: serde_json::Map<String, Value> = vocab.iter().enumerate().map(|(i, t)| (t.clone(), i.into())).collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [special(vocab.len(), "<|end|>"), special(vocab.len() + 1, "<|pad|>")],
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": ids, "merges": merges},
    })
    .to_string()
}

/// Words with a mark for the space before them, and single bytes.
pub(crate) fn metaspace() -> String {
    let words = ["<unk>", "▁", "▁Hello", "▁a", "a", "▁world", "llo", "STOP", "▁STOP"];
    let mut ids: serde_json::Map<String, Value> =
        words.iter().enumerate().map(|(i, t)| ((*t).into(), i.into())).collect();
    (0..=u8::MAX).for_each(|b| drop(ids.insert(format!("<0x{b:02X}>"), (words.len() + usize::from(b)).into())));
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [special(ids.len(), "</s>")],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "vocab": ids, "merges": [], "unk_token": "<unk>", "byte_fallback": true},
    })
    .to_string()
}

/// SmolLM2's, where it was fetched.
pub(crate) fn smollm2() -> Option<Tokenizer> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache/smollm2");
    if let Ok(Some(tokenizer)) = Tokenizer::from_folder(&folder) {
        return Some(tokenizer);
    }
    assert!(std::env::var_os("CI").is_none(), "{} must be there in CI", folder.display());
    eprintln!("SKIPPED: {} has no tokenizer (make model)", folder.display());
    None
}
