//! Guided decoding: which tokens may come next so that the text stays inside a JSON schema, a regular expression or a
//! grammar.
//!
//! llguidance compiles the guide to a byte-level parser and walks the vocabulary's trie with it. A mask depends on the
//! guide and on the sequence's own tokens alone: each sequence has its own lexer, because a lexer that sequences shared
//! would charge whoever comes first for the states that all of them use, and the limits would trip on one's neighbours.

use std::sync::Arc;

use llguidance::api::{StopReason, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};

use crate::engine::panic_text;
use crate::error::{Error, ErrorKind, Result};
use crate::text::Tokenizer;

/// Longest text of a guide, in bytes.
pub(crate) const MAX_SOURCE: usize = 1 << 20;
/// Lexer states of one sequence, 1 to 2 KiB each: a sequence cannot take the host's memory.
const MAX_LEXER_STATES: usize = 50_000;
/// Longest message of the compiler that is passed on, in bytes.
const MAX_MESSAGE: usize = 1000;
/// How llguidance says that no token may follow.
const NO_TOKEN: &str = "NoExtensionBias";
/// Most rules and groups of a grammar: each takes some 3 KiB of the compiler's stack.
const MAX_GRAMMAR_PARTS: usize = 10_000;
/// Stack for compiling: rules, groups and references are followed by recursion.
const COMPILE_STACK: usize = 256 << 20;

/// What a sampled text must be.
///
/// The guide holds for the completion alone, from its first byte to its last. Special tokens are never part of it; the
/// model's end-of-sequence tokens are allowed where the text is complete, and nothing else is once it cannot go on. A
/// completion that ends for another reason (`max_tokens`, a stop string) is a beginning of such a text.
///
/// Needs a byte-level or byte-fallback tokenizer. A guide is at most 1 MiB of text, a grammar at most 10,000 rules and
/// groups (counted as its characters `:`, `(`, `[`, `{`); what a guide may cost to compile and for each token is
/// limited too. The syntax of all three is llguidance 1.9's:
/// <https://github.com/guidance-ai/llguidance/tree/main/docs>.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Guide {
    /// JSON that satisfies this JSON schema (draft 2020-12 and older; keywords that are not implemented are errors, as
    /// are references out of the schema, and `oneOf` unless its options exclude each other visibly). Properties come in
    /// the schema's order.
    ///
    /// White space is free between tokens of JSON, as much as the model likes. A key `"x-guidance"` at the top of the
    /// schema says otherwise: `{"whitespace_flexible": false}` forbids it, `{"whitespace_pattern": " ?"}` gives its
    /// regular expression; `item_separator` and `key_separator` are there as well.
    JsonSchema(String),
    /// Text that matches this regular expression as a whole. The syntax is the `regex` crate's, without word
    /// boundaries. `^` at the beginning and `$` at the end say what holds anyway, elsewhere they are errors; laziness
    /// has no effect. Classes are Unicode's: `\d` is a digit of any script, `[0-9]` is not.
    Regex(String),
    /// Text of this grammar, in llguidance's Lark dialect, from its rule `start`. The attributes `stop` and
    /// `max_tokens` and tokens by name or number are refused, `temperature` and `capture` have no effect.
    Grammar(String),
}

impl Guide {
    /// Text that is one of these.
    ///
    /// # Errors
    /// `Argument` if there are none.
    pub fn choices<T: AsRef<str>>(choices: &[T]) -> Result<Self> {
        if choices.is_empty() {
            return Err(Error::argument("a guide needs at least one choice"));
        }
        let escaped: Vec<_> = choices.iter().map(|choice| fancy_regex::escape(choice.as_ref())).collect();
        Ok(Guide::Regex(format!("(?:{})", escaped.join("|"))))
    }

    fn name_and_source(&self) -> (&'static str, &str) {
        match self {
            Guide::JsonSchema(source) => ("JSON schema", source),
            Guide::Regex(source) => ("regular expression", source),
            Guide::Grammar(source) => ("grammar", source),
        }
    }

    fn parse(&self) -> Result<TopLevelGrammar> {
        Ok(match self {
            Guide::JsonSchema(source) => TopLevelGrammar::from_json_schema(
                serde_json::from_str(source).map_err(|e| Error::argument(format!("not valid JSON: {e}")))?,
            ),
            Guide::Regex(source) => TopLevelGrammar::from_regex(source),
            Guide::Grammar(source) => TopLevelGrammar::from_lark(source.clone()),
        })
    }
}

/// Token bytes of a model's vocabulary: what guides are compiled against. Built once a model, on the first guided
/// request.
pub(crate) struct GuideVocabulary {
    factory: ParserFactory,
    tokens: Arc<Tokens>,
}

/// Which ids are text, and which end a sequence.
struct Tokens {
    vocab_size: usize,
    /// One bit a token, as in a mask.
    text: Vec<u32>,
    end: Vec<u32>,
}

impl Tokens {
    fn is_end(&self, token: u32) -> bool {
        bit(&self.end, token)
    }
}

impl GuideVocabulary {
    /// Reads the bytes of every token. Ids of `eos_token_ids` beyond `vocab_size` are left out.
    ///
    /// # Errors
    /// `Unsupported` for a tokenizer whose tokens are not bytes (neither byte-level nor byte-fallback).
    pub(crate) fn new(tokenizer: &Tokenizer, vocab_size: usize, eos_token_ids: &[u32]) -> Result<Self> {
        let unsupported = |e: String| Error::unsupported(format!("guides need the bytes of every token: {e}"));
        let json = tokenizer.to_json()?;
        let build = || {
            let mut words = llguidance::token_bytes_from_tokenizer_json(&json)?;
            words.resize(vocab_size, Vec::new());
            // A special token starts with the marker, which is no byte of UTF-8; without bytes no guide can reach it.
            words.iter_mut().filter(|w| w.first() == Some(&TokTrie::SPECIAL_TOKEN_MARKER)).for_each(Vec::clear);
            let mut tokens = Tokens { vocab_size, text: empty_mask(vocab_size), end: empty_mask(vocab_size) };
            let size = u32::try_from(vocab_size)?;
            eos_token_ids.iter().filter(|id| **id < size).for_each(|id| set(&mut tokens.end, *id));
            (0..size)
                .zip(&words)
                .filter(|(id, word)| !word.is_empty() && !eos_token_ids.contains(id))
                .for_each(|(id, _)| set(&mut tokens.text, id));
            // The parser's end of sequence is an id beyond the vocabulary; it stands for all of the model's, or none.
            words.push([&[TokTrie::SPECIAL_TOKEN_MARKER], "<end>".as_bytes()].concat());
            let trie = TokTrie::from(&TokRxInfo::new(size + 1, size), &words);
            let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
            let mut factory = ParserFactory::new_simple(&env)?;
            factory.quiet();
            factory.limits_mut().verbose_errors = false;
            factory.limits_mut().max_lexer_states = MAX_LEXER_STATES;
            Ok(GuideVocabulary { factory, tokens: Arc::new(tokens) })
        };
        llguidance::panic_utils::catch_unwind(std::panic::AssertUnwindSafe(build))
            .map_err(|e| unsupported(message(&e.to_string())))
    }

    /// Compiles a guide.
    ///
    /// # Errors
    /// `Argument`, with the compiler's message, for a guide that does not parse, is too large, or that no text can
    /// begin.
    pub(crate) fn compile(&self, guide: &Guide) -> Result<CompiledGuide> {
        let (name, source) = guide.name_and_source();
        if source.len() > MAX_SOURCE {
            return Err(Error::argument(format!("{name}: {} bytes, at most {MAX_SOURCE}", source.len())));
        }
        if let Guide::Grammar(_) = guide {
            let parts = source.bytes().filter(|b| b":([{".contains(b)).count();
            if parts > MAX_GRAMMAR_PARTS {
                return Err(Error::argument(format!("{name}: {parts} rules and groups, at most {MAX_GRAMMAR_PARTS}")));
            }
        }
        let start = std::thread::scope(|scope| {
            std::thread::Builder::new()
                .stack_size(COMPILE_STACK)
                .spawn_scoped(scope, || self.start(guide))
                .map_err(|e| Error::new(ErrorKind::HostMemory, format!("cannot start a thread: {e}")))?
                .join()
                .map_err(|p| Error::argument(format!("the compiler panicked: {}", panic_text(&*p))))?
        });
        Ok(CompiledGuide { start: Arc::new(start.map_err(|e| e.at(name))?) })
    }

    fn start(&self, guide: &Guide) -> Result<GuideState> {
        let refused = |e: &dyn std::fmt::Display| Error::argument(message(&e.to_string()));
        let parser = self.factory.create_parser(guide.parse()?).map_err(|e| refused(&e))?;
        let lexer = parser.parser.grammar().lexer_spec();
        // The attributes count tokens or hide text, and a token that is named or numbered is other bytes to the parser
        // than the text has.
        if !lexer.can_rollback() {
            return Err(refused(&"the attributes stop and max_tokens are not supported"));
        }
        if lexer.special_token_rx.is_some() {
            return Err(refused(&"tokens by name or number are not supported, text is"));
        }
        let mut matcher = Matcher::new(Ok(parser));
        // Notices that the empty text is the only one.
        matcher.consume_tokens(&[]).map_err(|e| refused(&e))?;
        let mut state = GuideState { matcher, tokens: self.tokens.clone(), taken: 0, ended: false };
        // Finds what no text satisfies; every sequence inherits the work.
        state.mask().map_err(|e| refused(&e))?;
        Ok(state)
    }
}

/// A guide ready for sequences to follow. Cheap to clone.
#[derive(Clone)]
pub(crate) struct CompiledGuide {
    /// Never advanced, so that every sequence starts with the same lexer.
    start: Arc<GuideState>,
}

impl CompiledGuide {
    /// The state of a sequence that has sampled nothing.
    pub(crate) fn start(&self) -> GuideState {
        (*self.start).clone()
    }
}

/// Where one sequence stands in its guide. A clone is independent of it.
///
/// [`GuideState::mask`] comes before each [`GuideState::accept`]: it grants the work that a token may cost.
pub(crate) struct GuideState {
    matcher: Matcher,
    tokens: Arc<Tokens>,
    /// Tokens that the matcher has taken.
    taken: usize,
    /// An end of sequence came after them.
    ended: bool,
}

impl Clone for GuideState {
    fn clone(&self) -> Self {
        let GuideState { matcher, tokens, taken, ended } = self;
        // The matcher's plain clone shares its lexer.
        GuideState { matcher: matcher.deep_clone(), tokens: tokens.clone(), taken: *taken, ended: *ended }
    }
}

impl GuideState {
    /// The tokens that may come next: bit `id % 32` of word `id / 32`, `vocab_size.div_ceil(32)` words.
    ///
    /// Once the text is complete and cannot go on: the end-of-sequence tokens alone. All zero only where such a text
    /// meets a model without them.
    ///
    /// # Errors
    /// `Limit` if the guide costs too much here, or no token of the vocabulary goes on towards a complete text. The
    /// state then stays in that error.
    pub(crate) fn mask(&mut self) -> Result<Vec<u32>> {
        if self.is_finished() {
            return Ok(self.tokens.end.clone());
        }
        let allowed = self.matcher.compute_mask().map_err(|e| self.limit(&e.to_string()))?;
        let may_end = bit(allowed.as_slice(), self.tokens.vocab_size as u32);
        let ends = |end: u32| if may_end { end } else { 0 };
        let words = allowed.as_slice().iter().zip(&self.tokens.text).zip(&self.tokens.end);
        let mask: Vec<u32> = words.map(|((allowed, text), end)| allowed & text | ends(*end)).collect();
        if !may_end && mask.iter().all(|word| *word == 0) {
            return Err(self.limit(NO_TOKEN));
        }
        Ok(mask)
    }

    /// Takes a token that the mask allowed.
    ///
    /// # Errors
    /// `Internal` for a token that it did not, which changes nothing; `Limit` if the guide costs too much here.
    pub(crate) fn accept(&mut self, token: u32) -> Result<()> {
        let refused = || Error::internal(format!("guide: token {token} is not allowed here"));
        if self.tokens.is_end(token) {
            let complete = self.is_finished() || self.matcher.is_accepting().map_err(|e| self.limit(&e.to_string()))?;
            self.ended |= complete;
            return complete.then_some(()).ok_or_else(refused);
        }
        if self.ended || !bit(&self.tokens.text, token) {
            return Err(refused());
        }
        let taken = self.matcher.try_consume_tokens(&[token]).map_err(|e| self.limit(&e.to_string()))?;
        self.taken += taken;
        (taken == 1).then_some(()).ok_or_else(refused)
    }

    /// Nothing but an end of sequence can follow, or one was taken.
    pub(crate) fn is_finished(&self) -> bool {
        self.ended || self.matcher.stop_reason() == StopReason::NoExtension
    }

    fn limit(&self, error: &str) -> Error {
        let why =
            if error.starts_with(NO_TOKEN) { "no token of the vocabulary may follow".into() } else { message(error) };
        Error::limit(format!("the guide cannot go on after {} tokens: {why}", self.taken))
    }
}

/// The part of llguidance's error that is for a person: no backtrace, no dump of its state, not all of a long guide.
fn message(error: &str) -> String {
    let end = ["\n<backtrace>", "\n<non-verbose/>"].iter().filter_map(|mark| error.find(mark)).min();
    let text = error[..end.unwrap_or(error.len())].trim_end();
    let short = &text[..text.floor_char_boundary(MAX_MESSAGE)];
    if short.len() < text.len() { format!("{short} ...") } else { short.into() }
}

fn empty_mask(vocab_size: usize) -> Vec<u32> {
    vec![0; vocab_size.div_ceil(32)]
}

fn bit(mask: &[u32], token: u32) -> bool {
    mask.get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
}

fn set(mask: &mut [u32], token: u32) {
    mask[token as usize / 32] |= 1 << (token % 32);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SCHEMA: &str = r#"{
        "type": "object",
        "properties": {
            "colour": {"enum": ["red", "green", "blue"]},
            "count": {"type": "integer", "minimum": 3, "maximum": 120},
            "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}
        },
        "required": ["colour", "count", "flags"],
        "additionalProperties": false
    }"#;

    /// A vocabulary, the tokenizer it is of, and its size in the model.
    struct Case {
        tokenizer: Tokenizer,
        vocabulary: GuideVocabulary,
        vocab_size: usize,
        eos: Vec<u32>,
    }

    impl Case {
        fn new(tokenizer: Tokenizer, vocab_size: usize, eos: &[u32]) -> Case {
            let vocabulary = GuideVocabulary::new(&tokenizer, vocab_size, eos).unwrap();
            Case { tokenizer, vocabulary, vocab_size, eos: eos.to_vec() }
        }

        fn start(&self, guide: &Guide) -> GuideState {
            self.vocabulary.compile(guide).unwrap().start()
        }

        /// The error of a guide that must not compile.
        fn refusal(&self, guide: Guide) -> String {
            let error = self.vocabulary.compile(&guide).err().unwrap_or_else(|| panic!("{guide:?} compiled"));
            assert_eq!(error.kind(), ErrorKind::Argument, "{error}");
            error.to_string()
        }

        /// Follows random allowed tokens, seldom white space, to the end.
        fn follow(&self, state: &mut GuideState, random: &mut Random) -> String {
            self.follow_with_rare(state, random, |text| text.trim().is_empty())
        }

        /// Follows random allowed tokens, seldom `rare` ones, to the end.
        fn follow_with_rare(&self, state: &mut GuideState, random: &mut Random, rare: fn(&str) -> bool) -> String {
            let mut ids = Vec::new();
            while !state.is_finished() {
                let mask = state.mask().unwrap();
                assert_eq!(mask.len(), self.vocab_size.div_ceil(32));
                let allowed = bits(&mask);
                assert!(allowed.iter().all(|id| (*id as usize) < self.vocab_size));
                let mut id = random.pick(&allowed);
                for _ in 0..8 {
                    if rare(&self.tokenizer.decode(&[id], false).unwrap()) {
                        id = random.pick(&allowed);
                    }
                }
                state.accept(id).unwrap();
                if !self.eos.contains(&id) {
                    assert!(self.tokenizer.is_text(id));
                    ids.push(id);
                }
                assert!(ids.len() < 3000, "{}", self.tokenizer.decode(&ids, true).unwrap());
            }
            assert_eq!(bits(&state.mask().unwrap()), self.eos);
            self.tokenizer.decode(&ids, true).unwrap()
        }
    }

    struct Random(u64);

    impl Random {
        fn next(&mut self) -> usize {
            self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (self.0 >> 33) as usize
        }

        fn pick(&mut self, ids: &[u32]) -> u32 {
            ids[self.next() % ids.len()]
        }
    }

    fn bits(mask: &[u32]) -> Vec<u32> {
        (0..mask.len() as u32 * 32).filter(|id| bit(mask, *id)).collect()
    }

    /// 256 bytes, some longer tokens, two special tokens; the model's vocabulary is larger.
    fn small() -> Case {
        let tokenizer = Tokenizer::from_json(crate::text::samples::byte_level().as_bytes()).unwrap();
        let eos = tokenizer.token_id("<|end|>").unwrap();
        let pad = tokenizer.token_id("<|pad|>").unwrap();
        assert!(tokenizer.vocab_size() < 300);
        Case::new(tokenizer, 300, &[eos.min(pad), eos.max(pad)])
    }

    fn cases() -> Vec<Case> {
        let mut cases = vec![small()];
        if let Some(tokenizer) = crate::text::samples::smollm2() {
            let eos = tokenizer.token_id("<|im_end|>").unwrap();
            cases.push(Case::new(tokenizer, 49152, &[eos]));
        }
        cases
    }

    fn check_json(text: &str) {
        let value: serde_json::Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text:?}"));
        assert!(["red", "green", "blue"].contains(&value["colour"].as_str().unwrap()), "{text}");
        assert!((3..=120).contains(&value["count"].as_i64().unwrap()), "{text}");
        let flags = value["flags"].as_array().unwrap();
        assert!(flags.len() <= 3 && flags.iter().all(serde_json::Value::is_boolean), "{text}");
        assert_eq!(value.as_object().unwrap().len(), 3, "{text}");
    }

    #[test]
    fn texts_of_a_schema_satisfy_it() {
        for case in cases() {
            let compiled = case.vocabulary.compile(&Guide::JsonSchema(SCHEMA.into())).unwrap();
            let mut random = Random(1);
            for _ in 0..200 {
                check_json(&case.follow(&mut compiled.start(), &mut random));
            }
        }
    }

    #[test]
    fn white_space_is_the_schemas_to_say() {
        let case = small();
        let tight = SCHEMA.replacen('{', r#"{"x-guidance": {"whitespace_flexible": false},"#, 1);
        let mut state = case.start(&Guide::JsonSchema(tight));
        let text = case.follow(&mut state, &mut Random(2));
        check_json(&text);
        assert!(!text.contains(char::is_whitespace), "{text:?}");
        let space = case.tokenizer.token_id("\u{120}").unwrap();
        let open = case.tokenizer.token_id("{").unwrap();
        for (schema, free) in [
            (SCHEMA.to_owned(), true),
            (SCHEMA.replacen('{', r#"{"x-guidance": {"whitespace_flexible": false},"#, 1), false),
        ] {
            let mut state = case.start(&Guide::JsonSchema(schema));
            state.accept(open).unwrap();
            assert_eq!(bit(&state.mask().unwrap(), space), free);
        }
    }

    #[test]
    fn texts_of_a_regex_match_it_as_a_whole() {
        for case in cases() {
            let compiled = case.vocabulary.compile(&Guide::Regex(r"^[a-c]{2,5}\d?$".into())).unwrap();
            let mut random = Random(3);
            for _ in 0..200 {
                let text = case.follow(&mut compiled.start(), &mut random);
                // \d is a digit of any script.
                let letters = text.trim_end_matches(char::is_numeric);
                assert!(
                    (2..=5).contains(&letters.len()) && letters.bytes().all(|b| (b'a'..=b'c').contains(&b)),
                    "{text}"
                );
                assert!(text.chars().count() - letters.len() <= 1, "{text}");
            }
        }
    }

    #[test]
    fn choices_are_taken_literally() {
        let choices = ["yes", "no (never)", "a.b*", r"\d+", "[x]", "50% & #1\n", "ja|nein", "é"];
        assert!(Guide::choices::<&str>(&[]).is_err());
        for case in cases() {
            let compiled = case.vocabulary.compile(&Guide::choices(&choices).unwrap()).unwrap();
            let mut random = Random(6);
            let mut seen = std::collections::BTreeSet::new();
            for _ in 0..400 {
                seen.insert(case.follow_with_rare(&mut compiled.start(), &mut random, |_| false));
            }
            assert_eq!(seen, choices.iter().map(|c| (*c).to_owned()).collect());
        }
    }

    #[test]
    fn grammars_may_recurse() {
        let grammar = r#"
            start: pair
            pair: "(" (pair | NAME) "," (pair | NAME) ")"
            NAME: /[xyz]/
        "#;
        /// What follows a pair or a name.
        fn item(text: &str) -> Option<&str> {
            match text.strip_prefix('(') {
                Some(pair) => item(item(pair)?.strip_prefix(',')?)?.strip_prefix(')'),
                None => text.strip_prefix(['x', 'y', 'z']),
            }
        }
        for case in cases() {
            let compiled = case.vocabulary.compile(&Guide::Grammar(grammar.into())).unwrap();
            let mut random = Random(4);
            for _ in 0..50 {
                let text = case.follow_with_rare(&mut compiled.start(), &mut random, |text| text.contains('('));
                assert!(text.starts_with('('), "{text}");
                assert_eq!(item(&text), Some(""), "{text}");
            }
        }
    }

    #[test]
    fn a_clone_goes_its_own_way() {
        for case in cases() {
            let mut state = case.start(&Guide::JsonSchema(SCHEMA.into()));
            let mut random = Random(5);
            for _ in 0..30 {
                let mask = state.mask().unwrap();
                let mut fork = state.clone();
                for _ in 0..4 {
                    let allowed = bits(&fork.mask().unwrap());
                    if fork.is_finished() || fork.accept(random.pick(&allowed)).is_err() {
                        break;
                    }
                }
                assert_eq!(state.mask().unwrap(), mask);
                if state.is_finished() {
                    break;
                }
                state.accept(random.pick(&bits(&mask))).unwrap();
            }
        }
    }

    #[test]
    fn all_ends_are_allowed_where_the_text_is_complete() {
        let case = small();
        let mut state = case.start(&Guide::Regex("ab?".into()));
        let [a, b] = ["a", "b"].map(|t| case.tokenizer.token_id(t).unwrap());
        let end = case.eos[0];
        assert!(state.accept(end).is_err(), "not complete");
        state.accept(a).unwrap();
        let mask = state.mask().unwrap();
        assert_eq!(bits(&mask).iter().filter(|id| case.eos.contains(id)).count(), 2, "all ends are allowed");
        let mut other = state.clone();
        state.accept(end).unwrap();
        assert!(state.is_finished());
        assert!(state.accept(b).is_err());
        other.accept(b).unwrap();
        assert!(other.is_finished(), "nothing can follow");
        assert_eq!(bits(&other.mask().unwrap()), case.eos);
    }

    #[test]
    fn a_model_without_an_end_gets_an_empty_mask_there() {
        let tokenizer = Tokenizer::from_json(crate::text::samples::byte_level().as_bytes()).unwrap();
        let case = Case::new(tokenizer, 300, &[]);
        let mut state = case.start(&Guide::Regex("a".into()));
        state.accept(case.tokenizer.token_id("a").unwrap()).unwrap();
        assert!(state.is_finished());
        assert!(bits(&state.mask().unwrap()).is_empty());
    }

    #[test]
    fn the_empty_text_ends_at_once() {
        let case = small();
        let mut state = case.start(&Guide::Regex("".into()));
        assert!(state.is_finished());
        assert_eq!(bits(&state.mask().unwrap()), case.eos);
    }

    #[test]
    fn what_no_text_satisfies_is_refused() {
        let case = small();
        let empty = case.refusal(Guide::JsonSchema(r#"{"type": "integer", "minimum": 5, "maximum": 4}"#.into()));
        assert!(empty.contains("minimum (5) is greater than maximum (4)"), "{empty}");
        for guide in [Guide::Regex(r"[^\x00-\u{10FFFF}]".into()), Guide::Grammar("start: A\nA: /a/ & /b/".into())] {
            let empty = case.refusal(guide);
            assert!(empty.contains("no token of the vocabulary may follow"), "{empty}");
        }
    }

    #[test]
    fn refusals_say_why() {
        let schema = |text: &str| Guide::JsonSchema(text.into());
        let regex = |text: &str| Guide::Regex(text.into());
        let grammar = |text: &str| Guide::Grammar(text.into());
        let refused = [
            (schema("{\n\"type\": "), "line 2 column 8"),
            (schema(&format!("{}1{}", "[".repeat(500), "]".repeat(500))), "recursion limit"),
            (schema("[]"), "schema must be an object or boolean"),
            (schema(r#"{"type": "strin"}"#), "Invalid type: strin"),
            (schema(r#"{"$ref": "http://other/schema"}"#), "http://other/schema"),
            (schema(r##"{"$ref": "#/$defs/none"}"##), "'/$defs/none' does not exist"),
            (schema(r#"{"x-guidance": {"spaces": 1}}"#), "unknown field `spaces`"),
            (schema(r#"{"type": "array", "uniqueItems": true}"#), "uniqueItems"),
            (schema(r#"{"oneOf": [{"type": "string"}, {"type": "string"}]}"#), "oneOf"),
            (regex("(a"), "unclosed group"),
            (regex(r"\ba"), "lookarounds not supported"),
            (regex("a^b"), "lookarounds not supported"),
            (regex(&"(".repeat(100_000)), "invalid regex"),
            (grammar(""), "no start rule"),
            (grammar("begin: /a/"), "no start rule"),
            (grammar("start: other"), "unknown name: \"other\""),
            (grammar("start: /a"), "lexer error"),
            (grammar("start: <|end|>"), "unknown special token: \"<|end|>\""),
            (grammar("start: \"a\" <[97]>"), "by name or number"),
            (grammar("start: a\na[max_tokens=3]: /a+/"), "max_tokens are not supported"),
            (grammar("start: a\na[stop=\"x\"]: /a+/"), "stop and max_tokens"),
            (grammar(&format!("start: {}", "(".repeat(1000))), "too deeply nested"),
            (grammar(&"a: b\n".repeat(MAX_GRAMMAR_PARTS + 1)), "rules and groups"),
            (grammar(&"x".repeat(MAX_SOURCE + 1)), "at most 1048576"),
        ];
        let case = small();
        for (guide, why) in refused {
            let error = case.refusal(guide);
            assert!(error.contains(why), "{error:?} does not say {why:?}");
            assert!(error.len() < MAX_MESSAGE + 50 && !error.contains("<backtrace>"), "{error}");
        }
    }

    /// Each rule costs the compiler stack.
    #[test]
    fn the_longest_chain_of_rules_compiles() {
        let last = MAX_GRAMMAR_PARTS - 2;
        let rules: String = (0..last).map(|i| format!("r{i}: r{}\n", i + 1)).collect();
        let mut state = small().start(&Guide::Grammar(format!("start: r0\n{rules}r{last}: \"a\"")));
        assert_eq!(bits(&state.mask().unwrap()).len(), 1);
    }

    #[test]
    fn tokens_that_are_no_bytes_are_unsupported() {
        let json = r#"{"model": {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}, "added_tokens": []}"#;
        let tokenizer = Tokenizer::from_json(json.as_bytes()).unwrap();
        let error = GuideVocabulary::new(&tokenizer, 2, &[]).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    }

    #[test]
    fn byte_fallback_tokenizers_can_be_guided() {
        let tokenizer = Tokenizer::from_json(crate::text::samples::metaspace().as_bytes()).unwrap();
        let eos = tokenizer.token_id("</s>").unwrap();
        let vocab_size = tokenizer.vocab_size();
        let case = Case::new(tokenizer, vocab_size, &[eos]);
        let mut state = case.start(&Guide::Regex("a( world| あ)".into()));
        let allowed = |state: &mut GuideState| bits(&state.mask().unwrap());
        let id = |token: &str| case.tokenizer.token_id(token).unwrap();
        assert_eq!(allowed(&mut state), [id("a"), id("<0x61>")]);
        state.accept(id("a")).unwrap();
        assert_eq!(allowed(&mut state), [id("▁"), id("▁world"), id("<0x20>")]);
        for byte in ["▁", "<0xE3>", "<0x81>", "<0x82>"] {
            assert!(!state.is_finished());
            state.accept(id(byte)).unwrap();
        }
        assert!(state.is_finished());
        assert_eq!(allowed(&mut state), [eos]);
    }
}
