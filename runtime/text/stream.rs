//! Text as it is sampled: decoded id by id, cut at stop strings.

use std::sync::Arc;

use super::tokenizer::Tokenizer;
use crate::error::Result;

/// What decoding gives for bytes that are no character (yet).
const BROKEN: char = char::REPLACEMENT_CHARACTER;
/// Ids that wait for a character to become complete. A character is at most four bytes; more is no text.
const MAX_WAITING: usize = 16;
/// Ids that are decoded again when the wait is given up: enough to hold a character.
const KEPT: usize = 8;

/// Decodes ids as they come, finds stop strings, and holds back text that may still change or belong to a stop string.
///
/// An id is decoded together with a few before it, since decoders treat the first token of a text in their own way (a
/// space is dropped, a marker is left out): the difference in length is what the id adds. That costs the same at any
/// length. `DecodeStream` of the tokenizers crate does so too, but decodes ever more ids while a text has no character
/// that it counts as complete, and fails where a decoder changes its mind.
#[derive(Clone)]
pub(crate) struct TextStream {
    tokenizer: Arc<Tokenizer>,
    stops: Arc<[String]>,
    /// The ids that are text: neither special nor unknown.
    ids: Vec<u32>,
    /// `ids[window..]` is decoded at the next push.
    window: usize,
    /// `ids[waiting..]` ended in an incomplete character.
    waiting: usize,
    /// Bytes of the window's text that are in `text`.
    known: usize,
    /// All text that is complete.
    text: String,
    /// Bytes of it that `take` gave.
    taken: usize,
    /// Where the first stop string begins.
    stop: Option<usize>,
}

impl TextStream {
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, stops: Arc<[String]>) -> Self {
        TextStream {
            tokenizer,
            stops,
            ids: Vec::new(),
            window: 0,
            waiting: 0,
            known: 0,
            text: String::new(),
            taken: 0,
            stop: None,
        }
    }

    /// Takes a sampled id. True if a stop string is complete in the text.
    ///
    /// # Errors
    /// `Format` if the tokenizer cannot decode it.
    pub(crate) fn push(&mut self, id: u32) -> Result<bool> {
        if self.tokenizer.is_text(id) {
            self.ids.push(id);
            let before = self.text.len();
            self.decode()?;
            if self.stop.is_none() {
                self.stop = self.first_stop_after(before);
            }
        }
        Ok(self.stop.is_some())
    }

    /// Adds what the last id completed to the text.
    fn decode(&mut self) -> Result<()> {
        let window = self.tokenizer.decode(&self.ids[self.window..], true)?;
        let complete = window.trim_end_matches(BROKEN).len();
        let give_up = complete < window.len() && self.ids.len() - self.waiting > MAX_WAITING;
        // The last one may still be the beginning of a character.
        let certain = if give_up { window.len() - BROKEN.len_utf8() } else { complete };
        self.text.push_str(window.get(self.known..certain).unwrap_or(""));
        self.known = self.known.max(certain);
        if complete == window.len() {
            self.window = self.waiting;
            self.waiting = self.ids.len();
            self.known = self.tokenizer.decode(&self.ids[self.window..], true)?.len();
        } else if give_up {
            self.window = self.ids.len() - KEPT;
            self.waiting = self.window;
            let kept = self.tokenizer.decode(&self.ids[self.window..], true)?;
            self.known = kept.len() - if kept.ends_with(BROKEN) { BROKEN.len_utf8() } else { 0 };
        }
        Ok(())
    }

    /// The first stop string that text from `before` on completes.
    fn first_stop_after(&self, before: usize) -> Option<usize> {
        let longest = self.stops.iter().map(String::len).max()?;
        let from = self.text.floor_char_boundary((before + 1).saturating_sub(longest));
        first_stop(&self.text[from..], &self.stops).map(|at| from + at)
    }

    /// Text that is certain and was not taken yet: complete characters, not a possible beginning of a stop string,
    /// nothing at or after a complete stop.
    pub(crate) fn take(&mut self) -> String {
        let end = self.stop.unwrap_or_else(|| self.text.len() - self.held_back());
        let text = self.text.get(self.taken..end).unwrap_or("").to_owned();
        self.taken += text.len();
        text
    }

    /// Bytes at the end of the text that a stop string may begin with.
    fn held_back(&self) -> usize {
        let longest_beginning = |stop: &String| {
            (1..stop.len()).rev().find(|n| stop.is_char_boundary(*n) && self.text.ends_with(&stop[..*n])).unwrap_or(0)
        };
        self.stops.iter().map(longest_beginning).max().unwrap_or(0)
    }

    /// The final text of all ids pushed: decoded without special tokens as a whole, cut at the first stop string; and
    /// the rest of it that `take` has not given.
    ///
    /// Where a decoder reads the whole otherwise than its parts, the whole is right, and the rest is what follows their
    /// common beginning. (Byte-fallback decoders do: one invalid byte breaks all characters of its run of bytes.)
    pub(crate) fn finish(&mut self) -> (String, String) {
        // What the parts gave, if the whole cannot be decoded.
        let mut whole = self.tokenizer.decode(&self.ids, true).unwrap_or_else(|_| self.text.clone());
        whole.truncate(first_stop(&whole, &self.stops).unwrap_or(whole.len()));
        let given = self.text[..self.taken].chars();
        let same: usize = whole.chars().zip(given).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
        self.taken = self.text.len();
        let rest = whole[same..].to_owned();
        (whole, rest)
    }
}

/// Where the first of the stop strings begins in `text`.
fn first_stop(text: &str, stops: &[String]) -> Option<usize> {
    stops.iter().filter_map(|stop| text.find(stop.as_str())).min()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::text::EncodeOptions;
    use crate::text::samples;

    fn small() -> Arc<Tokenizer> {
        Arc::new(Tokenizer::from_json(samples::byte_level().as_bytes()).unwrap())
    }

    fn metaspace() -> Arc<Tokenizer> {
        Arc::new(Tokenizer::from_json(samples::metaspace().as_bytes()).unwrap())
    }

    fn stream(tokenizer: &Arc<Tokenizer>, stops: &[&str]) -> TextStream {
        TextStream::new(tokenizer.clone(), stops.iter().map(|s| s.to_string()).collect())
    }

    fn encode(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
        tokenizer.encode(text, EncodeOptions::default()).unwrap()
    }

    /// Pushes ids until a stop; what was taken after each, whether it stopped, and what `finish` gives.
    fn run(mut stream: TextStream, ids: &[u32]) -> (Vec<String>, bool, String) {
        let mut parts = Vec::new();
        let mut stopped = false;
        let mut pushed = 0;
        while pushed < ids.len() && !stopped {
            stopped = stream.push(ids[pushed]).unwrap();
            parts.push(stream.take());
            pushed += 1;
        }
        let (text, rest) = stream.clone().finish();
        assert_eq!(parts.concat() + &rest, text);
        assert!(!stopped || rest.is_empty(), "nothing is held back at a stop");
        let mut whole = stream.tokenizer.decode_sampled(&ids[..pushed]).unwrap();
        whole.truncate(first_stop(&whole, &stream.stops).unwrap_or(whole.len()));
        assert_eq!(text, whole);
        (parts, stopped, text)
    }

    #[test]
    fn a_stop_across_tokens_is_held_back_and_cut() {
        let tokenizer = small();
        let ids: Vec<u32> = "one STxSTOP two".bytes().map(|b| tokenizer.token_id(&letter(b)).unwrap()).collect();
        let (parts, stopped, text) = run(stream(&tokenizer, &["STOP"]), &ids);
        assert!(stopped);
        assert_eq!(text, "one STx");
        assert_eq!(parts, ["o", "n", "e", " ", "", "", "STx", "", "", "", ""]);
    }

    fn letter(byte: u8) -> String {
        if byte == b' ' { "Ġ".into() } else { char::from(byte).into() }
    }

    #[test]
    fn a_stop_within_a_token_cuts_it() {
        let tokenizer = small();
        let ids = encode(&tokenizer, "xtrue");
        assert_eq!(ids.len(), 2);
        let (parts, stopped, text) = run(stream(&tokenizer, &["ru"]), &ids);
        assert!(stopped);
        assert_eq!((parts.concat().as_str(), text.as_str()), ("xt", "xt"));
    }

    #[test]
    fn of_two_stops_the_first_in_the_text_counts() {
        let tokenizer = small();
        for stops in [["ab", "abc"], ["abc", "ab"]] {
            let (_, stopped, text) = run(stream(&tokenizer, &stops), &encode(&tokenizer, "x abd"));
            assert!(stopped);
            assert_eq!(text, "x ");
        }
        // "tru" is complete first, and "xtrue!" can no longer be.
        let (_, _, text) = run(stream(&tokenizer, &["xtrue!", "tru"]), &encode(&tokenizer, "xtrue!"));
        assert_eq!(text, "x");
        // In one token, the one that begins first.
        let (_, _, text) = run(stream(&tokenizer, &["rue", "tr"]), &encode(&tokenizer, "xtrue!"));
        assert_eq!(text, "x");
    }

    #[test]
    fn a_stop_that_does_not_come_is_given_in_the_end() {
        let tokenizer = small();
        let (parts, stopped, text) = run(stream(&tokenizer, &["aab"]), &encode(&tokenizer, "xaaaa"));
        assert!(!stopped);
        assert_eq!((parts.concat().as_str(), text.as_str()), ("xaa", "xaaaa"));
    }

    #[test]
    fn a_stop_ends_before_a_broken_character() {
        let tokenizer = small();
        let mut ids = encode(&tokenizer, "xSTOP");
        ids.push(tokenizer.token_id("ã").unwrap());
        let (_, stopped, text) = run(stream(&tokenizer, &["STOP"]), &ids);
        assert!(stopped);
        assert_eq!(text, "x");
    }

    #[test]
    fn characters_come_whole() {
        for tokenizer in [small(), metaspace()] {
            let said = "🙂日本語のテキスト🙂";
            let (parts, _, text) = run(stream(&tokenizer, &[]), &encode(&tokenizer, said));
            assert_eq!(text.trim_start(), said);
            assert!(parts.len() > said.chars().count());
            assert!(!parts.concat().contains(BROKEN), "{parts:?}");
            assert_eq!(parts.concat(), text, "complete characters are not held back");
            let (_, stopped, text) = run(stream(&tokenizer, &["語の"]), &encode(&tokenizer, said));
            assert!(stopped);
            assert_eq!(text.trim_start(), "🙂日本");
        }
    }

    #[test]
    fn special_and_unknown_tokens_are_no_text() {
        for (tokenizer, end) in [(small(), "<|end|>"), (metaspace(), "</s>")] {
            let end = tokenizer.token_id(end).unwrap();
            let mut ids = Vec::new();
            for id in encode(&tokenizer, "Hello world STOP") {
                ids.extend([end, id, end, 1_000_000]);
            }
            let (_, stopped, text) = run(stream(&tokenizer, &["STOP"]), &ids);
            assert!(stopped);
            assert_eq!(text.trim_start(), "Hello world ");
        }
    }

    #[test]
    fn spaces_at_the_start_of_words_are_kept() {
        let tokenizer = metaspace();
        let ids: Vec<u32> = ["▁Hello", "▁", "▁a", "▁world", "a", "▁"].map(|t| tokenizer.token_id(t).unwrap()).to_vec();
        let (parts, _, text) = run(stream(&tokenizer, &[]), &ids);
        assert_eq!(text, "Hello  a worlda ");
        assert_eq!(parts, ["Hello", " ", " a", " world", "a", " "]);
    }

    #[test]
    fn the_whole_wins_where_a_decoder_changes_its_mind() {
        let tokenizer = metaspace();
        let ids = ["a", "<0xE3>", "<0x81>", "<0x82>", "<0xFF>"].map(|t| tokenizer.token_id(t).unwrap());
        let mut stream = stream(&tokenizer, &[]);
        let mut taken = String::new();
        for id in ids {
            stream.push(id).unwrap();
            taken += &stream.take();
        }
        assert_eq!(taken, "aあ");
        let broken = "\u{FFFD}".repeat(4);
        assert_eq!(stream.finish(), (format!("a{broken}"), broken));
    }

    #[test]
    fn broken_bytes_are_not_waited_for_forever() {
        let tokenizer = small();
        let byte = tokenizer.token_id("Ģ").unwrap();
        assert_eq!(tokenizer.decode(&[byte], true).unwrap(), "\u{FFFD}");
        let mut ids = vec![byte; 1000];
        ids.extend(encode(&tokenizer, "end 🙂"));
        let (parts, _, text) = run(stream(&tokenizer, &[]), &ids);
        assert_eq!(text, "\u{FFFD}".repeat(1000) + "end 🙂");
        assert!(parts[..1000].concat().chars().count() > 1000 - 2 * MAX_WAITING);
    }

    #[test]
    fn parts_of_random_ids_make_the_whole() {
        let mut tokenizers = vec![(small(), 256)];
        tokenizers.extend(samples::smollm2().map(|t| (Arc::new(t), 49152)));
        let mut random = 7u64;
        let mut next = || {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (random >> 33) as u32
        };
        for (tokenizer, vocab_size) in tokenizers {
            for _ in 0..300 {
                // Small ids are single bytes, most from 128 on broken ones.
                let range = [0..vocab_size, 0..256, 128..256][next() as usize % 3].clone();
                let ids: Vec<u32> =
                    (0..next() % 100).map(|_| range.start + next() % (range.end - range.start)).collect();
                run(stream(&tokenizer, &[]), &ids);
                run(stream(&tokenizer, &["e", "the end", "\u{e9}"]), &ids);
            }
        }
    }
}
