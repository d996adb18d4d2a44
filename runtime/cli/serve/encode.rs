//! Text to ids, the way the stacks do it whose clients ask here, and no further than a request may go.

use rewardrt::{EncodeOptions, MAX_SEQUENCES, Message, Tokenizer};

use super::error::{ApiError, ApiResult};
use super::fields::Prompts;
use super::models::Served;
use super::wait::Wanted;

/// Encodes for one model, as long as somebody waits for it.
pub struct Encoder<'a> {
    pub served: &'a Served,
    pub max_queued_tokens: usize,
    pub wanted: &'a Wanted,
}

/// Sequences that were asked for by a field. Each is checked before the next is encoded: what a request asks for can be a
/// thousand times as long as its body.
struct Sequences<'a> {
    encoder: &'a Encoder<'a>,
    field: &'static str,
    all: Vec<Vec<u32>>,
    tokens: usize,
}

impl Encoder<'_> {
    pub fn tokenizer(&self) -> ApiResult<&Tokenizer> {
        Ok(self.served.model.tokenizer()?)
    }

    fn sequences(&self, field: &'static str, count: usize) -> ApiResult<Sequences<'_>> {
        if count > MAX_SEQUENCES {
            return Err(ApiError::field(field, format!("{count} sequences, at most {MAX_SEQUENCES} are allowed")));
        }
        Ok(Sequences { encoder: self, field, all: Vec::new(), tokens: 0 })
    }

    /// Ids of texts that may have been rendered by a chat template.
    ///
    /// # Errors
    /// 400 that names the field, if there are too many texts or a text or all of them are too long.
    pub fn rendered<T: AsRef<str>>(
        &self,
        field: &'static str,
        texts: impl ExactSizeIterator<Item = T>,
        add_special: bool,
    ) -> ApiResult<Vec<Vec<u32>>> {
        let tokenizer = self.tokenizer()?;
        self.each(field, texts, |text| rendered(tokenizer, text.as_ref(), add_special))
    }

    /// Ids of texts just as they are: nothing is added, special tokens are recognised.
    pub fn literal<T: AsRef<str>>(
        &self,
        field: &'static str,
        texts: impl ExactSizeIterator<Item = T>,
    ) -> ApiResult<Vec<Vec<u32>>> {
        let tokenizer = self.tokenizer()?;
        let options = EncodeOptions { add_special: false, parse_special: true };
        self.each(field, texts, |text| Ok(tokenizer.encode(text.as_ref(), options)?))
    }

    /// Ids of prompts that are texts or ids.
    pub fn prompts(&self, field: &'static str, prompts: Prompts, add_special: bool) -> ApiResult<Vec<Vec<u32>>> {
        match prompts {
            Prompts::Text(text) => self.rendered(field, [text].into_iter(), add_special),
            Prompts::Texts(texts) => self.rendered(field, texts.into_iter(), add_special),
            Prompts::Ids(ids) => self.each(field, [ids].into_iter(), Ok),
            Prompts::Lists(lists) => self.each(field, lists.into_iter(), Ok),
        }
    }

    /// Ids of one conversation.
    pub fn chat(&self, messages: &[Message], add_generation_prompt: bool) -> ApiResult<Vec<Vec<u32>>> {
        let tokenizer = self.tokenizer()?;
        let encode = |messages| Ok(tokenizer.encode_chat(messages, add_generation_prompt)?);
        self.each("messages", [messages].into_iter(), encode)
    }

    fn each<T>(
        &self,
        field: &'static str,
        items: impl ExactSizeIterator<Item = T>,
        encode: impl Fn(T) -> ApiResult<Vec<u32>>,
    ) -> ApiResult<Vec<Vec<u32>>> {
        let mut sequences = self.sequences(field, items.len())?;
        for item in items {
            self.wanted.check()?;
            sequences.add(encode(item)?)?;
        }
        Ok(sequences.all)
    }
}

impl Sequences<'_> {
    fn add(&mut self, ids: Vec<u32>) -> ApiResult<()> {
        let (i, length) = (self.all.len(), ids.len());
        let (context, most) = (self.encoder.served.model.max_context(), self.encoder.max_queued_tokens);
        let wrong = |message: String| Err(ApiError::field(self.field, message));
        if length == 0 {
            return wrong(format!("sequence {i} is empty; it must have at least one token"));
        }
        if length > context {
            return wrong(format!("sequence {i} has {length} tokens, the model's context allows {context}"));
        }
        self.tokens += length;
        if self.tokens > most {
            return wrong(format!(
                "the first {} sequences have {} tokens, at most {most} are taken (--max-queued-tokens)",
                i + 1,
                self.tokens
            ));
        }
        self.all.push(ids);
        Ok(())
    }
}

/// Special tokens in the text are recognised, and where both the text and the tokenizer put the first one (BOS), there is
/// one.
fn rendered(tokenizer: &Tokenizer, text: &str, add_special: bool) -> ApiResult<Vec<u32>> {
    let encode = |add_special| tokenizer.encode(text, EncodeOptions { add_special, parse_special: true });
    let mut ids = encode(add_special)?;
    let twice = matches!(ids[..], [a, b, ..] if a == b && tokenizer.special_tokens().any(|(id, _)| id == a));
    // It may be the text alone that has it twice.
    if add_special && twice && encode(false)?.len() < ids.len() {
        ids.remove(0);
    }
    Ok(ids)
}
