//! tokenizer.json through the `tokenizers` crate, with its panics turned into errors.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::OnceLock;

use xxhash_rust::xxh3::Xxh3;

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
    vocabulary: OnceLock<u128>,
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
        if added.len() > MAX_CONTROL {
            return Err(Error::limit(format!("tokenizer.json: {} added tokens, at most {MAX_CONTROL}", added.len())));
        }
        let mut plain = trusted.clone();
        plain.set_encode_special_tokens(true);
        Ok(Tokenizer { trusted, plain, special, chat: None, vocabulary: OnceLock::new() })
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

    /// Decodes ids that a model gave: those that the tokenizer does not know (a padded vocabulary) are left out.
    pub(crate) fn decode_sampled(&self, ids: &[u32]) -> Result<String> {
        let known: Vec<u32> = ids.iter().copied().filter(|id| self.trusted.id_to_token(*id).is_some()).collect();
        self.decode(&known, true)
    }

    /// Whether decoding gives an id its place in the text: it is known and not special.
    pub(crate) fn is_text(&self, id: u32) -> bool {
        !self.special.contains_key(&id) && self.trusted.id_to_token(id).is_some()
    }

    /// The tokenizer.json that this tokenizer is.
    pub(crate) fn to_json(&self) -> Result<serde_json::Value> {
        let text = caught(|| self.trusted.to_string(false))?;
        serde_json::from_str(&text).map_err(|e| Error::internal(format!("tokenizer.json: {e}")))
    }

    /// The id of a token by its exact spelling in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.trusted.token_to_id(token)
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.trusted.get_vocab(true).values().max().map_or(0, |id| *id as usize + 1)
    }

    /// True if each of this tokenizer's ids is the same token to the other one, which may have more.
    pub(crate) fn is_part_of(&self, other: &Tokenizer) -> bool {
        self.vocabulary() == other.vocabulary()
            || self.trusted.get_vocab(true).iter().all(|(token, id)| other.trusted.token_to_id(token) == Some(*id))
    }

    /// A hash of all tokens with their ids.
    fn vocabulary(&self) -> u128 {
        *self.vocabulary.get_or_init(|| {
            let mut tokens: Vec<(u32, String)> =
                self.trusted.get_vocab(true).into_iter().map(|(token, id)| (id, token)).collect();
            tokens.sort();
            let mut hash = Xxh3::new();
            for (id, token) in tokens {
                hash.update(&id.to_le_bytes());
                hash.update(&(token.len() as u64).to_le_bytes());
                hash.update(token.as_bytes());
            }
            hash.digest128()
        })
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
        // A control token in a message is masked by a private-use character while the template works on it.
        let control = self.control_tokens(template.source());
        let masked: Vec<Message> = messages.iter().map(|m| mask(m, &control)).collect();
        let trusted = EncodeOptions { add_special: false, parse_special: true };
        if masked == messages {
            return self.encode(&template.render(messages, add_generation_prompt)?, trusted);
        }
        let in_range = |c: char| (MASK_BASE..MASK_BASE + control.len() as u32).contains(&(c as u32));
        if messages.iter().any(|m| m.role.contains(in_range) || m.content.contains(in_range)) {
            return Err(Error::argument(
                "a message has both control tokens and characters of the private-use plane 16",
            ));
        }
        let text = template.render(&masked, add_generation_prompt)?;
        let mut ids = Vec::new();
        let mut start = 0;
        for (at, c) in text.char_indices().filter(|(_, c)| in_range(*c)) {
            let content = &control[(c as u32 - MASK_BASE) as usize].content;
            ids.extend(self.encode(&text[start..at], trusted)?);
            self.spell(content, &mut ids)?;
            start = at + c.len_utf8();
        }
        ids.extend(self.encode(&text[start..], trusted)?);
        Ok(ids)
    }

    /// The tokens that must not be forged: the special ones, and other added ones that the template itself writes
    /// (role marks are not always flagged as special). Longest first.
    fn control_tokens(&self, template: &str) -> Vec<Control> {
        let added = self.trusted.get_added_tokens_decoder();
        let mut control: Vec<Control> = added
            .values()
            .filter(|t| t.special || template.contains(&t.content))
            .map(|t| Control { content: t.content.clone(), special: t.special })
            .collect();
        control.sort_by(|a, b| b.content.len().cmp(&a.content.len()).then_with(|| a.content.cmp(&b.content)));
        control
    }
}

/// A token that must not come out of a message's text.
struct Control {
    content: String,
    special: bool,
}

/// First of the private-use characters that stand for control tokens (plane 16; text never needs them).
const MASK_BASE: u32 = 0x10_0000;
/// The plane has 65,534 of them.
const MAX_CONTROL: usize = 0xFFFD;

/// Puts a private-use character in the place of every control token. The assistant's own turns may hold tokens that
/// are not special, such as the marks of its thoughts.
fn mask(message: &Message, control: &[Control]) -> Message {
    let mut masked = message.clone();
    let own = message.role == "assistant";
    for (i, token) in control.iter().enumerate().filter(|(_, t)| t.special || !own) {
        if let Some(c) = char::from_u32(MASK_BASE + i as u32) {
            for text in [&mut masked.role, &mut masked.content] {
                if text.contains(&token.content) {
                    *text = text.replace(&token.content, c.encode_utf8(&mut [0; 4]));
                }
            }
        }
    }
    masked
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
