//! Guided decoding through llguidance: which tokens may come next so that the text becomes what was asked for.
//!
//! A mask is a function of the guide and of the sequence's own tokens: every sequence has a parser of its own, with its
//! own caches, so that no limit of the parser can depend on what others sample.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, INVALID_TOKEN, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory, token_bytes_from_tokenizer_json};

use crate::engine::panic_text;
use crate::error::{Error, ErrorKind, Result};
use crate::text::Tokenizer;

/// Bytes of a guide's text at most.
const MAX_TEXT: usize = 1 << 20;

/// What a sampled text must be. Special tokens never belong to it; the model's end-of-sequence tokens may follow once it
/// is complete, and where nothing else can follow the sequence ends.
///
/// An answer that `max_tokens` cuts off is the beginning of such a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Guide {
    /// JSON that satisfies this JSON schema (draft 2020-12 as far as llguidance goes; what it does not know is an error).
    /// White space between the parts is the model's choice, unless the schema says `"x-guidance":
    /// {"whitespace_flexible": false}`.
    JsonSchema(String),
    /// Text that matches this regular expression as a whole (the syntax of Rust's `regex`, without look-around; classes such as
    /// `\d` are Unicode's).
    Regex(String),
    /// Text of this grammar, in llguidance's dialect of Lark; it begins at the rule `start`.
    Grammar(String),
}

impl Guide {
    fn text(&self) -> &str {
        match self {
            Guide::JsonSchema(text) | Guide::Regex(text) | Guide::Grammar(text) => text,
        }
    }

    const fn name(&self) -> &'static str {
        match self {
            Guide::JsonSchema(_) => "JSON schema",
            Guide::Regex(_) => "regular expression",
            Guide::Grammar(_) => "grammar",
        }
    }

    fn grammar(&self) -> Result<TopLevelGrammar> {
        Ok(match self {
            Guide::JsonSchema(text) => {
                let schema = serde_json::from_str(text)
                    .map_err(|e| Error::argument(format!("the JSON schema is not valid JSON: {e}")))?;
                TopLevelGrammar::from_json_schema(schema)
            }
            Guide::Regex(text) => TopLevelGrammar::from_regex(text),
            Guide::Grammar(text) => TopLevelGrammar::from_lark(text.clone()),
        })
    }
}

/// The bytes of a model's tokens: what guides are compiled against.
pub(crate) struct GuideVocabulary {
    factory: ParserFactory,
    size: usize,
}

impl GuideVocabulary {
    /// Takes a while (some hundred milliseconds for a large vocabulary): once a model.
    pub(crate) fn new(tokenizer: &Tokenizer, size: usize, eos_token_ids: &[u32]) -> Result<Self> {
        let build = || {
            let json = tokenizer.to_json()?;
            let unsupported = |e| Error::unsupported(format!("guides: tokenizer.json: {e}"));
            let mut bytes = token_bytes_from_tokenizer_json(&json).map_err(unsupported)?;
            // Tokens without bytes are never allowed: those of a padded vocabulary.
            bytes.resize(size, Vec::new());
            let eos: Vec<u32> = eos_token_ids.iter().copied().filter(|t| (*t as usize) < size).collect();
            let vocab_size = u32::try_from(size).map_err(|_| Error::limit(format!("a vocabulary of {size} tokens")))?;
            let info = TokRxInfo::new(vocab_size, eos.first().copied().unwrap_or(INVALID_TOKEN));
            let mut trie = TokTrie::from(&info, &bytes);
            if !eos.is_empty() {
                trie = trie.with_eos_tokens(&eos);
            }
            let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
            let mut factory = ParserFactory::new_simple(&env).map_err(unsupported)?;
            factory.quiet();
            Ok(GuideVocabulary { factory, size })
        };
        caught("preparing guides", build)
    }

    /// Compiles a guide.
    ///
    /// # Errors
    /// `Argument`, with what the compiler says, for one that does not parse; `Limit` for one that is too large.
    pub(crate) fn compile(&self, guide: &Guide) -> Result<CompiledGuide> {
        let length = guide.text().len();
        if length > MAX_TEXT {
            return Err(Error::limit(format!(
                "the {} has {length} bytes, at most {MAX_TEXT} are allowed",
                guide.name()
            )));
        }
        let compile = || {
            let parser = self.factory.create_parser(guide.grammar()?);
            let mut matcher = Matcher::new(parser);
            // What cannot begin cannot be sampled.
            let first = matcher.compute_mask_or_eos();
            match (matcher.get_error(), first) {
                (None, Ok(mask)) if !mask.is_zero() || matcher.is_accepting().unwrap_or(false) => Ok(matcher),
                (None, Ok(_)) => Err(Error::argument(format!("no text satisfies the {}", guide.name()))),
                (Some(e), _) => Err(Error::argument(format!("the {}: {e}", guide.name()))),
                (None, Err(e)) => Err(Error::argument(format!("the {}: {e}", guide.name()))),
            }
        };
        let matcher = caught("compiling a guide", compile)?;
        Ok(CompiledGuide { matcher: Arc::new(Mutex::new(matcher)), size: self.size })
    }
}

/// A guide before its first token. Cheap to clone.
#[derive(Clone)]
pub(crate) struct CompiledGuide {
    matcher: Arc<Mutex<Matcher>>,
    size: usize,
}

impl CompiledGuide {
    pub(crate) fn start(&self) -> GuideState {
        let matcher = self.matcher.lock().unwrap_or_else(PoisonError::into_inner).deep_clone();
        GuideState { matcher, size: self.size }
    }
}

/// Where one sequence stands in its guide.
pub(crate) struct GuideState {
    matcher: Matcher,
    size: usize,
}

impl Clone for GuideState {
    fn clone(&self) -> Self {
        GuideState { matcher: self.matcher.deep_clone(), size: self.size }
    }
}

impl GuideState {
    /// The tokens that may come next: one bit each, ⌈V / 32⌉ words.
    ///
    /// # Errors
    /// `Limit` if the guide takes more work at this place than is allowed.
    pub(crate) fn mask(&mut self) -> Result<Vec<u32>> {
        let allowed = self.matcher.compute_mask_or_eos().map_err(limit)?;
        let mut mask = allowed.as_slice().to_vec();
        mask.resize(self.size.div_ceil(32), 0);
        if let Some(last) = mask.last_mut()
            && !self.size.is_multiple_of(32)
        {
            *last &= (1 << (self.size % 32)) - 1;
        }
        Ok(mask)
    }

    /// Takes a token that the mask allowed.
    ///
    /// # Errors
    /// `Limit` as above.
    pub(crate) fn accept(&mut self, token: u32) -> Result<()> {
        self.matcher.consume_token(token).map_err(limit)
    }

    /// True if the text is complete and nothing but an end of sequence can follow, or one was taken.
    pub(crate) fn is_finished(&self) -> bool {
        self.matcher.is_stopped()
    }

    /// Takes back the last `tokens` tokens.
    ///
    /// # Errors
    /// `Internal` if there were fewer.
    pub(crate) fn rollback(&mut self, tokens: usize) -> Result<()> {
        self.matcher.rollback(tokens).map_err(|e| Error::internal(format!("a guide cannot go back: {e}")))
    }
}

fn limit(error: impl std::fmt::Display) -> Error {
    // Its first line; the parser's state follows.
    let text = error.to_string();
    Error::limit(format!("the guide cannot go on: {}", text.lines().next().unwrap_or_default()))
}

/// The crate guards its matcher against its own panics, but not its compiler.
fn caught<T>(what: &str, f: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| {
        Err(Error::new(ErrorKind::Argument, format!("{what}: the compiler panicked: {}", panic_text(&*panic))))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use serde_json::Value;

    use super::*;

    /// Bytes as tokens, two longer ones, an end of sequence, and padding: 300 in all.
    fn byte_tokenizer() -> Tokenizer {
        let visible = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let mut next = 0x100;
        let mut vocab = serde_json::Map::new();
        for b in 0..=255u8 {
            let c = if visible(b) {
                char::from(b)
            } else {
                next += 1;
                char::from_u32(next - 1).unwrap()
            };
            vocab.insert(c.to_string(), (b as u32).into());
        }
        vocab.insert("\":".into(), 256.into());
        vocab.insert("true".into(), 257.into());
        let json = serde_json::json!({
            "version": "1.0", "normalizer": null, "post_processor": null, "truncation": null, "padding": null,
            "added_tokens": [{"id": 258, "content": "<eos>", "special": true, "single_word": false, "lstrip": false,
                              "rstrip": false, "normalized": false}],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "vocab": vocab, "merges": [], "dropout": null, "unk_token": null,
                      "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
                      "byte_fallback": false, "ignore_merges": false},
        });
        Tokenizer::from_json(json.to_string().as_bytes()).unwrap()
    }

    struct Lcg(u64);
    impl Lcg {
        fn below(&mut self, n: usize) -> usize {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) as usize % n
        }
    }

    fn tokens(mask: &[u32]) -> Vec<u32> {
        (0..32 * mask.len() as u32).filter(|t| mask[*t as usize / 32] >> (t % 32) & 1 == 1).collect()
    }

    /// Follows random allowed tokens, visible ones rather than white space, until the guide is done.
    fn walk(
        guide: &CompiledGuide,
        (tokenizer, blank): (&Tokenizer, &[bool]),
        eos: u32,
        random: &mut Lcg,
    ) -> Option<String> {
        let mut state = guide.start();
        let mut ids = Vec::new();
        for _ in 0..200 {
            let mut allowed = tokens(&state.mask().unwrap());
            let blank = |t: &u32| blank[*t as usize];
            if allowed.len() > 1 && random.below(20) > 0 && !allowed.iter().all(blank) {
                allowed.retain(|t| !blank(t));
            }
            let token =
                if allowed.contains(&eos) && random.below(3) == 0 { eos } else { allowed[random.below(allowed.len())] };
            state.accept(token).unwrap();
            if token != eos {
                ids.push(token);
            }
            if state.is_finished() {
                return Some(tokenizer.decode(&ids, false).unwrap());
            }
        }
        None
    }

    const SCHEMA: &str = r#"{"type": "object", "additionalProperties": false, "required": ["name", "age", "flags"],
        "properties": {"name": {"enum": ["Ada", "Grace"]}, "age": {"type": "integer", "minimum": 0, "maximum": 120},
                       "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}}}"#;

    fn check_person(text: &str) {
        let v: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{text:?}: {e}"));
        assert!(["Ada", "Grace"].contains(&v["name"].as_str().unwrap()), "{text}");
        assert!((0..=120).contains(&v["age"].as_i64().unwrap()), "{text}");
        let flags = v["flags"].as_array().unwrap();
        assert!(flags.len() <= 3 && flags.iter().all(Value::is_boolean), "{text}");
        assert_eq!(v.as_object().unwrap().len(), 3);
    }

    fn vocabularies() -> Vec<(Tokenizer, GuideVocabulary, u32)> {
        let bytes = byte_tokenizer();
        let vocabulary = GuideVocabulary::new(&bytes, 300, &[258]).unwrap();
        let mut all = vec![(bytes, vocabulary, 258)];
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache/smollm2");
        match Tokenizer::from_folder(&folder) {
            Ok(Some(tokenizer)) => {
                let vocabulary = GuideVocabulary::new(&tokenizer, 49_152, &[2]).unwrap();
                all.push((tokenizer, vocabulary, 2));
            }
            _ => {
                assert!(std::env::var_os("CI").is_none(), "SmolLM2's tokenizer must be there in CI");
                eprintln!("SKIPPED: no tokenizer at {}; `make model` fetches it", folder.display());
            }
        }
        all
    }

    #[test]
    fn random_texts_satisfy_their_guides() {
        for (tokenizer, vocabulary, eos) in vocabularies() {
            let mut random = Lcg(7);
            let is_blank = |t: u32| tokenizer.decode(&[t], false).is_ok_and(|text| text.trim().is_empty());
            let blank: Vec<bool> = (0..vocabulary.size as u32).map(is_blank).collect();
            let texts_of = (&tokenizer, &blank[..]);
            let compile = |guide: Guide| vocabulary.compile(&guide).unwrap();
            let person = compile(Guide::JsonSchema(SCHEMA.into()));
            let texts: Vec<String> = (0..100).filter_map(|_| walk(&person, texts_of, eos, &mut random)).collect();
            assert!(texts.len() > 90, "{} of 100", texts.len());
            texts.iter().for_each(|t| check_person(t));
            let regex = compile(Guide::Regex(r"[a-c]{2,5}\d?".into()));
            for _ in 0..50 {
                let text = walk(&regex, texts_of, eos, &mut random).unwrap();
                let letters = text.trim_end_matches(char::is_numeric);
                assert!(text[letters.len()..].chars().count() <= 1 && (2..=5).contains(&letters.len()), "{text:?}");
                assert!(letters.chars().all(|c| ('a'..='c').contains(&c)), "{text:?}");
            }
            let nested = compile(Guide::Grammar("start: \"(\" start \")\" | \"x\"".into()));
            for _ in 0..50 {
                if let Some(text) = walk(&nested, texts_of, eos, &mut random) {
                    let depth = text.find('x').unwrap();
                    assert_eq!(text, format!("{}x{}", "(".repeat(depth), ")".repeat(depth)));
                }
            }
        }
    }

    #[test]
    fn states_go_back_and_part() {
        for (_, vocabulary, eos) in vocabularies() {
            let mut random = Lcg(3);
            let mut state = vocabulary.compile(&Guide::JsonSchema(SCHEMA.into())).unwrap().start();
            for _ in 0..20 {
                let mask = state.mask().unwrap();
                let allowed: Vec<u32> = tokens(&mask).into_iter().filter(|t| *t != eos).collect();
                let mut other = state.clone();
                let mut taken = 0;
                for _ in 0..4 {
                    let next = tokens(&other.mask().unwrap());
                    other.accept(next[random.below(next.len())]).unwrap();
                    taken += 1;
                    if other.is_finished() {
                        break;
                    }
                }
                if !other.is_finished() {
                    other.rollback(taken).unwrap();
                    assert_eq!(other.mask().unwrap(), mask);
                }
                assert_eq!(state.mask().unwrap(), mask, "a clone is its own");
                state.accept(allowed[random.below(allowed.len())]).unwrap();
                if state.is_finished() {
                    break;
                }
            }
        }
    }

    #[test]
    fn special_and_padded_tokens_are_never_allowed() {
        let tokenizer = byte_tokenizer();
        let vocabulary = GuideVocabulary::new(&tokenizer, 300, &[258]).unwrap();
        let anything = vocabulary.compile(&Guide::Regex("(.|\n)*".into())).unwrap();
        let mask = anything.start().mask().unwrap();
        assert_eq!(mask.len(), 10);
        assert!(tokens(&mask).iter().all(|t| *t <= 258) && tokens(&mask).contains(&258));
        // Without an end-of-sequence token there is just nothing to end with.
        let endless = GuideVocabulary::new(&tokenizer, 300, &[]).unwrap();
        let mut state = endless.compile(&Guide::Regex("ab".into())).unwrap().start();
        for (byte, finished) in [(b'a', false), (b'b', true)] {
            assert_eq!(tokens(&state.mask().unwrap()), [u32::from(byte)]);
            state.accept(byte.into()).unwrap();
            assert_eq!(state.is_finished(), finished);
        }
        let mut state = endless.compile(&Guide::Regex("a*".into())).unwrap().start();
        assert_eq!(tokens(&state.mask().unwrap()), [u32::from(b'a')]);
    }

    #[test]
    fn what_does_not_compile_says_why() {
        let vocabulary = GuideVocabulary::new(&byte_tokenizer(), 300, &[258]).unwrap();
        for (guide, says) in [
            (Guide::JsonSchema("{\"type\": }".into()), "line 1 column 10"),
            (Guide::JsonSchema("{\"type\": \"strong\"}".into()), "strong"),
            (Guide::Regex("(a".into()), "regular expression"),
            (Guide::Grammar("begin: \"x\"".into()), "start"),
            (Guide::JsonSchema("false".into()), "JSON schema"),
        ] {
            let error = vocabulary.compile(&guide).map(|_| ()).unwrap_err();
            assert!(error.kind() == ErrorKind::Argument && error.to_string().contains(says), "{guide:?}: {error}");
        }
        let error = vocabulary.compile(&Guide::Regex("a".repeat(MAX_TEXT + 1))).map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Limit);
    }
}
