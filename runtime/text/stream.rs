//! Text as it is sampled: decoded in small pieces, watched for stop strings, handed out as far as it is certain.

use std::sync::Arc;

use super::Tokenizer;
use crate::error::Result;

/// Tokens that an unfinished character may take before it counts as broken: it has four bytes at most.
const LONGEST_CHARACTER: usize = 4;

/// Decodes ids as they come. The cost of a token does not depend on how many there were.
#[derive(Clone)]
pub(crate) struct TextStream {
    tokenizer: Arc<Tokenizer>,
    stops: Arc<[String]>,
    ids: Vec<u32>,
    /// The last ids: some context, whose text is known, and those that are not decoded for certain.
    window: Vec<u32>,
    /// How many of them are context.
    context: usize,
    /// Bytes of the window's text that are in `text`, its context's included.
    known: usize,
    /// What is certain so far.
    text: String,
    /// Where a stop string begins.
    cut: Option<usize>,
    /// Bytes of `text` that were handed out.
    taken: usize,
}

impl TextStream {
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, stops: Arc<[String]>) -> Self {
        TextStream {
            tokenizer,
            stops,
            ids: Vec::new(),
            window: Vec::new(),
            context: 0,
            known: 0,
            text: String::new(),
            cut: None,
            taken: 0,
        }
    }

    /// Takes a sampled id. True if a stop string is complete in the text.
    pub(crate) fn push(&mut self, id: u32) -> Result<bool> {
        self.ids.push(id);
        if !self.tokenizer.has_text(id) {
            return Ok(self.cut.is_some());
        }
        self.window.push(id);
        let all = self.tokenizer.decode_sampled(&self.window)?;
        let waiting = self.window.len() - self.context <= LONGEST_CHARACTER;
        // An unfinished character looks like a broken one until its last byte.
        let certain = if waiting { all.trim_end_matches(char::REPLACEMENT_CHARACTER) } else { &all[..] };
        let before = self.text.len();
        if let Some(new) = certain.get(self.known..) {
            self.text.push_str(new);
            self.known = certain.len();
        }
        if certain.len() == all.len() {
            // Decoders look at a token's neighbours (spaces, for instance): the last ones stay.
            self.window.drain(..self.context);
            self.context = self.window.len();
            self.known = self.tokenizer.decode_sampled(&self.window)?.len();
        }
        if self.cut.is_none() {
            self.cut = self.find_stop(before);
        }
        Ok(self.cut.is_some())
    }

    /// Where the first stop string begins that ends after `before`.
    fn find_stop(&self, before: usize) -> Option<usize> {
        let find = |stop: &String| {
            let mut start = (before + 1).saturating_sub(stop.len());
            while !self.text.is_char_boundary(start) {
                start -= 1;
            }
            self.text[start..].find(stop.as_str()).map(|at| start + at)
        };
        self.stops.iter().filter_map(find).min()
    }

    /// Text that is certain and was not taken yet: whole characters, nothing that may be the beginning of a stop string.
    pub(crate) fn take(&mut self) -> String {
        let end = self.cut.unwrap_or_else(|| {
            let may_begin = |stop: &String| {
                let longest = self.text.len().min(stop.len() - 1);
                let begins = |n: &usize| stop.is_char_boundary(*n) && self.text.ends_with(&stop[..*n]);
                (1..=longest).rev().find(begins).unwrap_or(0)
            };
            self.text.len() - self.stops.iter().map(may_begin).max().unwrap_or(0)
        });
        let new = self.text.get(self.taken..end).unwrap_or_default().to_owned();
        self.taken = self.taken.max(end);
        new
    }

    /// The final text: all ids decoded as a whole, cut at the first stop string; and what of it was not taken yet. Should a
    /// tokenizer decode the whole in another way than its pieces, the whole is right and the rest is what follows the
    /// part that both have.
    pub(crate) fn finish(&mut self) -> (String, String) {
        let mut text = self.tokenizer.decode_sampled(&self.ids).unwrap_or_else(|_| self.text.clone());
        let cut = self.stops.iter().filter_map(|s| text.find(s.as_str())).min();
        text.truncate(cut.unwrap_or(text.len()));
        let taken = self.text[..self.taken].chars().zip(text.chars());
        let common: usize = taken.take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
        let rest = text[common..].to_owned();
        (text, rest)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use super::*;

    fn smollm2() -> Option<Arc<Tokenizer>> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache/smollm2");
        let tokenizer = Tokenizer::from_folder(&folder).ok().flatten();
        assert!(tokenizer.is_some() || std::env::var_os("CI").is_none(), "SmolLM2's tokenizer must be there in CI");
        if tokenizer.is_none() {
            eprintln!("SKIPPED: no tokenizer at {}; `make model` fetches it", folder.display());
        }
        tokenizer.map(Arc::new)
    }

    /// Metaspace with byte fallback: ▁ begins a word, and the decoder strips the first one.
    fn metaspace() -> Arc<Tokenizer> {
        let mut vocab = serde_json::Map::new();
        for b in 0..256u32 {
            vocab.insert(format!("<0x{b:02X}>"), b.into());
        }
        for (i, word) in ["▁", "▁the", "▁end", "s", ".", "▁of", "END"].iter().enumerate() {
            vocab.insert((*word).into(), (256 + i).into());
        }
        let json = serde_json::json!({
            "version": "1.0", "normalizer": null, "post_processor": null, "truncation": null, "padding": null,
            "added_tokens": [],
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "vocab": vocab, "merges": [], "dropout": null, "unk_token": null,
                      "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
                      "byte_fallback": true, "ignore_merges": false},
        });
        Arc::new(Tokenizer::from_json(json.to_string().as_bytes()).unwrap())
    }

    fn stream(tokenizer: &Arc<Tokenizer>, stops: &[&str]) -> TextStream {
        TextStream::new(tokenizer.clone(), stops.iter().map(|s| (*s).to_owned()).collect())
    }

    /// Pushes ids until a stop; the pieces, whether it stopped, the final text.
    fn follow(tokenizer: &Arc<Tokenizer>, ids: &[u32], stops: &[&str]) -> (Vec<String>, bool, String) {
        let mut stream = stream(tokenizer, stops);
        let mut pieces = Vec::new();
        let mut stopped = false;
        for id in ids {
            stopped = stream.push(*id).unwrap();
            pieces.push(stream.take());
            if stopped {
                break;
            }
        }
        let (text, rest) = stream.finish();
        pieces.push(rest);
        assert_eq!(pieces.concat(), text);
        (pieces, stopped, text)
    }

    #[test]
    fn stops_are_found_and_cut() {
        let Some(tokenizer) = smollm2() else { return };
        let ids =
            tokenizer.encode("The answer is 42. Next question: why 🦀 crabs? 東京タワー", Default::default()).unwrap();
        let (_, stopped, text) = follow(&tokenizer, &ids, &["swer i"]);
        assert_eq!((stopped, text.as_str()), (true, "The an"), "across tokens, inside of one");
        let (pieces, stopped, text) = follow(&tokenizer, &ids, &["question: no", "question"]);
        assert_eq!((stopped, text.as_str()), (true, "The answer is 42. Next "), "the shorter one");
        assert!(pieces.iter().all(|p| !p.contains('q')), "{pieces:?}");
        let (pieces, stopped, text) = follow(&tokenizer, &ids, &["crabs?!", "東京x"]);
        assert!(!stopped && text.ends_with("東京タワー"), "{text}");
        assert!(!pieces.concat().contains(char::REPLACEMENT_CHARACTER), "{pieces:?}");
        assert!(pieces.iter().filter(|p| !p.is_empty()).count() > 12, "as it comes: {pieces:?}");
        let (_, stopped, text) = follow(&tokenizer, &ids, &["🦀"]);
        assert!(stopped && text.ends_with("why "), "{text}");
    }

    #[test]
    fn pieces_make_the_whole() {
        let mut state = 5u64;
        let mut below = |n: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) % n) as u32
        };
        let check = |tokenizer: &Arc<Tokenizer>, next: &mut dyn FnMut() -> Vec<u32>| {
            for _ in 0..200 {
                let ids: Vec<u32> = (0..40).flat_map(|_| next()).collect();
                let (_, stopped, text) = follow(tokenizer, &ids, &["END", "\u{0}\u{1}\u{2}"]);
                let whole = tokenizer.decode_sampled(&ids).unwrap();
                assert!(stopped || text == whole);
                assert_eq!(stopped, whole.contains("END"), "{whole:?}");
            }
        };
        if let Some(tokenizer) = smollm2() {
            // Beyond the vocabulary as well: what a padded model may sample.
            let vocab = tokenizer.vocab_size() as u64 + 20;
            check(&tokenizer, &mut || vec![below(vocab)]);
        }
        // Whole characters alone: byte fallback turns a whole run of bytes to U+FFFD for one that is broken.
        let parts: [&[u32]; 9] =
            [&[256], &[257], &[258], &[259], &[262], &[0xC3, 0xA9], &[0x41], &[0xE6, 0x9D, 0xB1], &[999]];
        check(&metaspace(), &mut || parts[below(parts.len() as u64) as usize].to_vec());
    }

    #[test]
    fn spaces_and_bytes_of_metaspace() {
        let tokenizer = metaspace();
        // "the ends é." with é in two bytes.
        let ids = [257, 258, 259, 256, 0xC3, 0xA9, 260];
        let (pieces, _, text) = follow(&tokenizer, &ids, &[]);
        assert_eq!(text, "the ends é.");
        assert_eq!(pieces[..3], ["the", " end", "s"]);
        assert!(pieces[4].is_empty() && pieces[5] == "é", "{pieces:?}");
        let (_, stopped, text) = follow(&tokenizer, &ids, &[" é"]);
        assert!(stopped && text == "the ends");
    }
}
