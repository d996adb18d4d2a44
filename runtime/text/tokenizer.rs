//! tokenizer.json through the `tokenizers` crate, with its panics turned into errors.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use super::chat::{ChatTemplate, Message};
use super::check;
use crate::engine::panic_text;
use crate::error::{Error, ErrorKind, Result};
use crate::weights::read_bounded;

const MAX_FILE: usize = 64 << 20;
const MAX_CONFIG: usize = 4 << 20;
/// Stack for parsing: nested components cost large frames.
const PARSE_STACK: usize = 32 << 20;

/// How text is encoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Let the post-processor add its tokens (BOS, for instance).
    pub add_special: bool,
    /// Recognise special tokens that stand in the text. Off by default: user text cannot forge control tokens.
    pub parse_special: bool,
}

/// A tokenizer with its chat template, if it has one.
pub struct Tokenizer {
    trusted: tokenizers::Tokenizer,
    /// Does not match special tokens in text.
    plain: tokenizers::Tokenizer,
    /// Special tokens by id.
    special: BTreeMap<u32, String>,
    chat: Option<ChatTemplate>,
}

impl Tokenizer {
    /// Reads tokenizer.json from a model folder, and the chat template from chat_template.jinja or
    /// tokenizer_config.json. `None` if there is no tokenizer.json.
    ///
    /// # Errors
    /// `Format` for a file that the checks or the `tokenizers` crate refuse, `Template` for a broken chat template.
    pub fn from_folder(folder: &Path) -> Result<Option<Self>> {
        let file = folder.join("tokenizer.json");
        if !file.exists() {
            return Ok(None);
        }
        let mut tokenizer = Self::from_json(&read_bounded(&file, MAX_FILE)?).map_err(|e| e.at(folder.display()))?;
        let read = |name: &str| -> Result<Option<Vec<u8>>> {
            let path = folder.join(name);
            if path.exists() { read_bounded(&path, MAX_CONFIG).map(Some) } else { Ok(None) }
        };
        let config = read("tokenizer_config.json")?;
        let template = read("chat_template.jinja")?;
        tokenizer.chat =
            ChatTemplate::from_files(config.as_deref(), template.as_deref()).map_err(|e| e.at(folder.display()))?;
        Ok(Some(tokenizer))
    }

    /// Reads the contents of a tokenizer.json; no chat template.
    ///
    /// # Errors
    /// `Format` for a file that the checks or the `tokenizers` crate refuse.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        let parse = || {
            let mut value: serde_json::Value = serde_json::from_slice(json)
                .map_err(|e| Error::format(format!("tokenizer.json: not valid JSON: {e}")))?;
            check::sanitise(&mut value)?;
            let text = serde_json::to_vec(&value).map_err(|e| Error::internal(e.to_string()))?;
            let parsed =
                tokenizers::Tokenizer::from_bytes(text).map_err(|e| Error::format(format!("tokenizer.json: {e}")))?;
            check_added_ids(&value, &parsed)?;
            Ok(parsed)
        };
        let trusted = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().stack_size(PARSE_STACK).spawn_scoped(scope, parse);
            let thread =
                thread.map_err(|e| Error::new(ErrorKind::HostMemory, format!("cannot start a thread: {e}")))?;
            thread
                .join()
                .map_err(|p| Error::format(format!("tokenizer.json: the parser panicked: {}", panic_text(&*p))))?
        })?;
        let added = trusted.get_added_tokens_decoder();
        let special = added.iter().filter(|(_, t)| t.special).map(|(id, t)| (*id, t.content.clone())).collect();
        let mut plain = trusted.clone();
        plain.set_encode_special_tokens(true);
        Ok(Tokenizer { trusted, plain, special, chat: None })
    }

    /// Encodes text.
    ///
    /// # Errors
    /// `Format` if the tokenizer cannot encode it (or panics on it).
    pub fn encode(&self, text: &str, options: EncodeOptions) -> Result<Vec<u32>> {
        if options.parse_special {
            return Ok(run(&self.trusted, text, options.add_special)?.0);
        }
        let (ids, from_template) = run(&self.plain, text, options.add_special)?;
        let forged = |i: usize| !from_template[i] && self.special.contains_key(&ids[i]);
        if !(0..ids.len()).any(forged) {
            return Ok(ids);
        }
        // The model's own vocabulary can spell a special token; then it is spelled letter by letter.
        let mut safe = Vec::with_capacity(ids.len());
        for i in 0..ids.len() {
            if forged(i) {
                self.spell(&self.special[&ids[i]], &mut safe)?;
            } else {
                safe.push(ids[i]);
            }
        }
        Ok(safe)
    }

    fn spell(&self, content: &str, ids: &mut Vec<u32>) -> Result<()> {
        let mut letter = [0; 4];
        for c in content.chars() {
            let (spelled, _) = run(&self.plain, c.encode_utf8(&mut letter), false)?;
            if spelled.iter().any(|id| self.special.contains_key(id)) {
                return Err(Error::format(format!("the special token {content:?} cannot be encoded as plain text")));
            }
            ids.extend(spelled);
        }
        Ok(())
    }

    /// Decodes ids; `skip_special` leaves special tokens out. Incomplete UTF-8 becomes U+FFFD.
    ///
    /// # Errors
    /// `Argument` for an id that the tokenizer does not know, `Format` if decoding fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        if let Some(id) = ids.iter().find(|id| self.trusted.id_to_token(**id).is_none()) {
            return Err(Error::argument(format!("token id {id} is not in the tokenizer")));
        }
        caught(|| self.trusted.decode(ids, skip_special))
    }

    /// The id of a token by its exact spelling in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.trusted.token_to_id(token)
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.trusted.get_vocab(true).values().max().map_or(0, |id| *id as usize + 1)
    }

    /// The special tokens and their ids.
    pub fn special_tokens(&self) -> impl Iterator<Item = (u32, &str)> {
        self.special.iter().map(|(id, content)| (*id, content.as_str()))
    }

    /// The chat template, if the folder had one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat.as_ref()
    }

    /// Renders messages through the chat template and encodes them; the template writes BOS itself where it wants it.
    ///
    /// Special tokens of the template are recognised, those that stand in a message's content are not.
    ///
    /// # Errors
    /// `Template` if there is no template or it fails.
    pub fn encode_chat(&self, messages: &[Message], add_generation_prompt: bool) -> Result<Vec<u32>> {
        let template = self
            .chat
            .as_ref()
            .ok_or_else(|| Error::template("the tokenizer has no chat template: give the text or its ids instead"))?;
        // A special token in a message is masked by a private-use character while the template works on it.
        let specials: Vec<&str> = self.special.values().map(String::as_str).collect();
        let masked: Vec<Message> = messages.iter().map(|m| mask(m, &specials)).collect();
        let text = template.render(&masked, add_generation_prompt)?;
        let trusted = EncodeOptions { add_special: false, parse_special: true };
        if masked == messages {
            return self.encode(&text, trusted);
        }
        let mut ids = Vec::new();
        let mut start = 0;
        for (at, c) in text.char_indices() {
            if let Some(content) = unmask(c, &specials) {
                ids.extend(self.encode(&text[start..at], trusted)?);
                ids.extend(self.encode(content, EncodeOptions::default())?);
                start = at + c.len_utf8();
            }
        }
        ids.extend(self.encode(&text[start..], trusted)?);
        Ok(ids)
    }
}

/// First of the private-use characters that stand for special tokens (plane 16; text never needs them).
const MASK_BASE: u32 = 0x10_0000;
const MASK_COUNT: usize = 0xFFFD;

fn mask(message: &Message, specials: &[&str]) -> Message {
    let mut masked = message.clone();
    let mut order: Vec<usize> = (0..specials.len().min(MASK_COUNT)).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(specials[i].len()));
    for i in order {
        if let Some(c) = char::from_u32(MASK_BASE + i as u32) {
            for text in [&mut masked.role, &mut masked.content] {
                if text.contains(specials[i]) {
                    *text = text.replace(specials[i], c.encode_utf8(&mut [0; 4]));
                }
            }
        }
    }
    masked
}

fn unmask<'a>(c: char, specials: &[&'a str]) -> Option<&'a str> {
    let i = (c as u32).checked_sub(MASK_BASE)?;
    specials.get(i as usize).copied()
}

/// The crate ignores the `id` of added tokens and counts instead; a file where the two differ would shift ids.
fn check_added_ids(json: &serde_json::Value, parsed: &tokenizers::Tokenizer) -> Result<()> {
    for token in json["added_tokens"].as_array().into_iter().flatten() {
        let content = token["content"].as_str().unwrap_or("");
        let got = parsed.token_to_id(content);
        if got.map(u64::from) != token["id"].as_u64() {
            return Err(Error::format(format!(
                "tokenizer.json: added token {content:?} has the id {}, but its place in the vocabulary gives {got:?}",
                token["id"]
            )));
        }
    }
    Ok(())
}

/// Ids, and which of them the post-processor added.
fn run(tokenizer: &tokenizers::Tokenizer, text: &str, add_special: bool) -> Result<(Vec<u32>, Vec<bool>)> {
    let encoding = caught(|| tokenizer.encode_fast(text, add_special))?;
    let added = encoding.get_special_tokens_mask().iter().map(|m| *m == 1).collect();
    Ok((encoding.get_ids().to_vec(), added))
}

fn caught<T>(f: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(result) => result.map_err(|e| Error::format(format!("tokenizer: {e}"))),
        Err(panic) => Err(Error::format(format!("tokenizer.json: the tokenizer panicked: {}", panic_text(&*panic)))),
    }
}
