//! The scoring rules: which position, which head, which transform. As data.

use std::fmt;
use std::sync::Arc;

use crate::backend::{Output, Want};
use crate::error::{Error, Result};
use crate::model::{Head, ModelSpec};
use crate::text::{EncodeOptions, Tokenizer};

/// How a sequence becomes a score.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rule {
    /// transformers' `*ForSequenceClassification`: `score.weight` · h at the rightmost token that is not the padding
    /// token, raw logits. The head's arithmetic is f32.
    Sequence,
    /// Softmax over the next-token logits of a few labels after the last token; the score is the first label's
    /// probability. Only the labels' rows of the language-model head are read.
    Judge {
        /// Each must be one token of the tokenizer.
        labels: Vec<String>,
    },
}

/// The names a rule is chosen by, for messages.
const RULES: &str = "sequence, judge:LABEL,LABEL[,…]";

impl Rule {
    /// `sequence`, or `judge:yes,no`.
    ///
    /// # Errors
    /// `Argument` for anything else.
    pub fn parse(text: &str) -> Result<Rule> {
        match text.split_once(':') {
            None if text == "sequence" => Ok(Rule::Sequence),
            None if text == "judge" => Ok(Rule::Judge { labels: vec!["yes".into(), "no".into()] }),
            Some(("judge", list)) => {
                let labels: Vec<String> = list.split(',').map(str::to_owned).collect();
                let twice = (1..labels.len()).any(|i| labels[..i].contains(&labels[i]));
                if labels.len() < 2 || twice || labels.iter().any(String::is_empty) {
                    return Err(Error::argument(format!(
                        "rule {text:?}: judge needs two or more different labels, as in judge:yes,no"
                    )));
                }
                Ok(Rule::Judge { labels })
            }
            _ => Err(Error::argument(format!("rule {text:?} is not one of: {RULES}"))),
        }
    }

    /// The rule that a checkpoint's head implies.
    ///
    /// # Errors
    /// `Argument` for a language model, which has none: name one.
    pub fn for_model(spec: &ModelSpec) -> Result<Rule> {
        match spec.head {
            Head::SequenceClassification { .. } => Ok(Rule::Sequence),
            Head::LanguageModel { .. } => Err(Error::argument(format!(
                "{} has no reward head, so the rule must be named, for instance judge:yes,no",
                spec.architecture
            ))),
        }
    }

    /// Binds the rule to a model: labels become tokens.
    ///
    /// # Errors
    /// `Argument` if the rule does not fit the model's head or a label is not one token.
    pub(crate) fn bind(&self, spec: &ModelSpec, tokenizer: Option<&Tokenizer>) -> Result<BoundRule> {
        match (self, &spec.head) {
            (Rule::Sequence, Head::SequenceClassification { labels }) => {
                Ok(BoundRule { rule: self.clone(), labels: labels.clone(), want: Want::Score, skip: spec.pad_token_id })
            }
            (Rule::Judge { labels }, Head::LanguageModel { .. }) => {
                if labels.len() < 2 {
                    return Err(Error::argument(format!("rule judge: {} labels, it needs two or more", labels.len())));
                }
                let tokenizer =
                    tokenizer.ok_or_else(|| Error::argument("rule judge: the model has no tokenizer.json"))?;
                let tokens: Vec<u32> = labels.iter().map(|l| label_token(l, tokenizer, spec)).collect::<Result<_>>()?;
                if let Some(i) = (1..tokens.len()).find(|&i| tokens[..i].contains(&tokens[i])) {
                    return Err(Error::argument(format!(
                        "rule judge: the label {:?} is the same token as another",
                        labels[i]
                    )));
                }
                Ok(BoundRule {
                    rule: self.clone(),
                    labels: labels.clone(),
                    want: Want::Tokens(Arc::from(tokens)),
                    skip: None,
                })
            }
            _ => Err(Error::argument(format!("rule {self} does not fit {}", spec.architecture))),
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Rule::Sequence => f.write_str("sequence"),
            Rule::Judge { labels } => write!(f, "judge:{}", labels.join(",")),
        }
    }
}

/// A label as one token: its exact spelling in the vocabulary, or its encoding.
fn label_token(label: &str, tokenizer: &Tokenizer, spec: &ModelSpec) -> Result<u32> {
    let ids = match tokenizer.token_id(label) {
        Some(id) => vec![id],
        None => tokenizer.encode(label, EncodeOptions::default())?,
    };
    match ids[..] {
        [id] if (id as usize) < spec.vocab_size => Ok(id),
        [id] => Err(Error::argument(format!(
            "rule judge: the label {label:?} is token {id}, beyond the model's vocabulary"
        ))),
        _ => Err(Error::argument(format!(
            "rule judge: the label {label:?} is {} tokens {ids:?}, it must be one",
            ids.len()
        ))),
    }
}

/// Where a rule is read more than once a sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Steps {
    /// After these tokens of each sequence, counted from its first, in rising order; there may be none.
    At(Vec<Vec<usize>>),
    /// After each token with this id that is not of the sequence's prompt.
    After {
        /// What ends a step.
        id: u32,
        /// For each sequence, how many leading tokens are a prompt; empty: 0 for all.
        prompt_lens: Vec<usize>,
    },
}

impl Steps {
    pub(crate) fn check(&self, sequences: &[Vec<u32>]) -> Result<()> {
        let fits = |name: &str, count: usize| match count == sequences.len() {
            true => Ok(()),
            false => Err(Error::argument(format!("{count} {name} for {} sequences", sequences.len()))),
        };
        match self {
            Steps::At(places) => {
                fits("lists of steps", places.len())?;
                for (i, (places, tokens)) in places.iter().zip(sequences).enumerate() {
                    if let Some(place) = places.iter().find(|p| **p >= tokens.len()) {
                        return Err(Error::argument(format!(
                            "sequence {i} has {} tokens, but a step at {place}",
                            tokens.len()
                        )));
                    }
                    if let Some(pair) = places.windows(2).find(|pair| pair[0] >= pair[1]) {
                        return Err(Error::argument(format!(
                            "sequence {i}: the step at {} comes after the one at {}, steps must rise",
                            pair[1], pair[0]
                        )));
                    }
                }
                Ok(())
            }
            Steps::After { prompt_lens, .. } if prompt_lens.is_empty() => Ok(()),
            Steps::After { prompt_lens, .. } => {
                fits("prompt_lens", prompt_lens.len())?;
                match (0..sequences.len()).find(|&i| prompt_lens[i] > sequences[i].len()) {
                    None => Ok(()),
                    Some(i) => Err(Error::argument(format!(
                        "sequence {i} has {} tokens but a prompt_len of {}",
                        sequences[i].len(),
                        prompt_lens[i]
                    ))),
                }
            }
        }
    }

    /// Where the steps of sequence `i` are; after [`Steps::check`].
    pub(crate) fn places(&self, i: usize, tokens: &[u32]) -> Vec<usize> {
        match self {
            Steps::At(places) => places[i].clone(),
            Steps::After { id, prompt_lens } => {
                let prompt_len = prompt_lens.get(i).copied().unwrap_or(0);
                (prompt_len..tokens.len()).filter(|&p| tokens[p] == *id).collect()
            }
        }
    }
}

/// The score of one step of a sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// The token after which it was read, counted from the sequence's first.
    pub position: usize,
    /// What the rule says of the sequence up to there.
    pub score: Score,
}

/// A rule that knows its model.
#[derive(Clone)]
pub(crate) struct BoundRule {
    pub rule: Rule,
    labels: Vec<String>,
    want: Want,
    /// A token that the pooled position must not be.
    skip: Option<u32>,
}

/// A sequence's score.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// The first label's value: the scalar a trainer takes.
    pub score: f32,
    /// Every label's value, in label order: raw logits for `sequence`, probabilities for `judge`.
    pub values: Vec<f32>,
}

impl Score {
    /// Of a sequence without steps.
    pub(crate) fn none(labels: usize) -> Self {
        Score { score: f32::NAN, values: vec![f32::NAN; labels] }
    }
}

impl BoundRule {
    pub(crate) fn labels(&self) -> &[String] {
        &self.labels
    }

    /// Which positions are read: those of the steps, or the rule's own. As in transformers, a sequence of nothing but
    /// padding is read at position 0.
    pub(crate) fn wants(&self, tokens: &[u32], steps: Option<Vec<usize>>) -> Vec<(usize, Want)> {
        let own = || match self.skip {
            Some(pad) => tokens.iter().rposition(|t| *t != pad).unwrap_or(0),
            None => tokens.len() - 1,
        };
        steps.unwrap_or_else(|| vec![own()]).into_iter().map(|p| (p, self.want.clone())).collect()
    }

    pub(crate) fn read(&self, output: &Output) -> Result<Score> {
        let Output::Logits(logits) = output else {
            return Err(Error::internal("a score without its logits"));
        };
        let values = match self.rule {
            Rule::Sequence => logits.clone(),
            Rule::Judge { .. } => softmax(logits),
        };
        let score = values.first().copied().ok_or_else(|| Error::internal("a score without labels"))?;
        Ok(Score { score, values })
    }
}

fn softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f32> = logits.iter().map(|l| (l - max).exp()).collect();
    let total: f32 = weights.iter().sum();
    weights.iter().map(|w| w / total).collect()
}
