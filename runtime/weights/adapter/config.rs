//! adapter_config.json as PEFT writes it → which modules have factors, of which rank and scale.
//!
//! The rules by which names match are PEFT's own (`check_target_module_exists`, `get_pattern_key`): a list matches a
//! module's last components, a string the whole name as a regular expression.

use fancy_regex::{Regex, RegexBuilder};
use serde_json::{Map, Value};

use crate::error::{Error, ErrorKind, Result};

const PLACE: &str = "adapter_config.json";
const MAX_RANK: u64 = 1 << 16;
/// Names and patterns in a field.
const MAX_NAMES: usize = 4096;
const MAX_PATTERN_BYTES: usize = 4096;
/// Steps of one match that has to go back: real patterns take a few dozen.
const MAX_BACKTRACKS: usize = 10_000;

/// Fields that make the adapter another thing than W + scale · B · A. Off is null, false or empty.
const MUST_BE_OFF: &[(&str, &str)] = &[
    ("use_dora", "DoRA"),
    ("fan_in_fan_out", "weights stored as [in, out]"),
    ("lora_bias", "a bias on B"),
    ("layer_replication", "layers used more than once"),
    ("trainable_token_indices", "embeddings of single tokens"),
    ("target_parameters", "factors of parameters that are no linear module"),
    ("alora_invocation_tokens", "an adapter that begins at an invocation"),
    ("use_qalora", "QALoRA"),
    ("use_bdlora", "block-diagonal factors"),
    ("arrow_config", "routing between adapters"),
    ("kasa_config", "KaSA"),
    ("velora_config", "VeLoRA"),
    ("monteclora_config", "MonteCLoRA"),
    ("megatron_config", "Megatron's parallel layers"),
];

/// The ways to begin training that leave the base weights as they are.
const KEEPS_BASE: [&str; 4] = ["gaussian", "eva", "orthogonal", "mica"];

/// The module of a reward head.
pub(super) const SCORE: &str = "score";
/// What `modules_to_save` may name: PEFT adds both, whatever the model's head is called.
const HEADS: [&str; 2] = [SCORE, "classifier"];

/// Which modules a field names.
enum Names {
    /// `all-linear`.
    AllLinear,
    /// A regular expression for the whole name.
    Pattern(Regex),
    /// Names, or their last components.
    List(Vec<String>),
}

impl Names {
    fn matches(&self, field: &str, module: &str) -> Result<bool> {
        match self {
            Names::AllLinear => Ok(true),
            Names::Pattern(regex) => is_match(field, regex, module),
            Names::List(list) => Ok(list.iter().any(|name| is_name(name, module))),
        }
    }
}

/// True if `name` is the module's name or its last components.
fn is_name(name: &str, module: &str) -> bool {
    module.strip_suffix(name).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

/// What an adapter is, before its tensors are looked at.
pub(super) struct AdapterConfig {
    rank: usize,
    alpha: f64,
    rank_stabilised: bool,
    targets: Names,
    excluded: Option<Names>,
    layers: Option<Vec<u64>>,
    /// How the list of layers may be called; empty: anyhow.
    layers_patterns: Vec<Regex>,
    ranks: Vec<(Regex, usize)>,
    alphas: Vec<(Regex, f64)>,
    /// It replaces the score head.
    pub saves_score: bool,
    /// It may have a score head without saying so: PEFT adds it for this kind of task.
    pub may_save_score: bool,
}

impl AdapterConfig {
    /// # Errors
    /// `Format` for a value of the wrong type or range, `Limit` beyond this version's bounds, `Unsupported` (with every
    /// such field) for an adapter of another kind.
    pub(super) fn parse(text: &[u8]) -> Result<Self> {
        let map: Map<String, Value> =
            serde_json::from_slice(text).map_err(|e| Error::format(format!("{PLACE}: not a JSON object: {e}")))?;
        let fields = Fields(&map);
        fields.refuse_other_kinds()?;
        let task = fields.get("task_type").and_then(Value::as_str);
        let targets = fields
            .names("target_modules")?
            .ok_or_else(|| fields.wrong("target_modules", "a list of names, a regular expression or \"all-linear\""))?;
        let layers = fields.layers()?;
        let by_list = matches!(targets, Names::List(_));
        if layers.is_some() && !by_list {
            return Err(fields.wrong("layers_to_transform", "null where \"target_modules\" is a string"));
        }
        let layers_patterns = match fields.get("layers_pattern") {
            None => Vec::new(),
            Some(Value::String(one)) => vec![one.clone()],
            Some(_) => fields.list("layers_pattern")?,
        };
        let index_after = |name: &String| pattern("layers_pattern", &format!(r"^(?:|.*?\.)(?:{name})\.(\d+)\."));
        let alpha = |value: &Value| value.as_f64().filter(|a| a.is_finite());
        Ok(AdapterConfig {
            rank: fields.rank()?,
            alpha: match fields.get("lora_alpha") {
                None => 8.0,
                Some(value) => alpha(value).ok_or_else(|| fields.wrong("lora_alpha", "a finite number"))?,
            },
            rank_stabilised: match fields.get("use_rslora") {
                None => false,
                Some(Value::Bool(on)) => *on,
                Some(_) => return Err(fields.wrong("use_rslora", "true or false")),
            },
            excluded: fields.names("exclude_modules")?,
            layers,
            layers_patterns: layers_patterns
                .iter()
                .filter(|n| !n.is_empty())
                .map(index_after)
                .collect::<Result<_>>()?,
            ranks: fields.patterns("rank_pattern", &format!("a rank from 1 to {MAX_RANK}"), |v| {
                v.as_u64().filter(|r| (1..=MAX_RANK).contains(r)).map(|r| r as usize)
            })?,
            alphas: fields.patterns("alpha_pattern", "a finite number", alpha)?,
            saves_score: fields.saves_score()?,
            may_save_score: task == Some("SEQ_CLS"),
            targets,
        })
    }

    /// True if the linear module has factors.
    pub(super) fn targets(&self, module: &str) -> Result<bool> {
        if let Some(excluded) = &self.excluded
            && excluded.matches("exclude_modules", module)?
        {
            return Ok(false);
        }
        if (self.saves_score || self.may_save_score) && is_name(SCORE, module) {
            return Ok(false);
        }
        if let Names::List(list) = &self.targets
            && list.iter().any(|name| name == module)
        {
            return Ok(true);
        }
        if !self.targets.matches("target_modules", module)? {
            return Ok(false);
        }
        let Some(layers) = &self.layers else { return Ok(true) };
        Ok(self.layer_of(module)?.is_some_and(|layer| layers.contains(&layer)))
    }

    /// True if a string meant every linear module but the heads.
    pub(super) fn is_all_linear(&self) -> bool {
        matches!(self.targets, Names::AllLinear)
    }

    /// The number of the layer that a module is in.
    fn layer_of(&self, module: &str) -> Result<Option<u64>> {
        if self.layers_patterns.is_empty() {
            // The first component that is a number, after at least two others.
            let number = module.split('.').skip(2).find_map(|part| part.parse().ok());
            return Ok(number);
        }
        for regex in &self.layers_patterns {
            let found = regex.captures(module).map_err(|e| too_much("layers_pattern", regex, &e))?;
            if let Some(found) = found.as_ref().and_then(|c| c.get(1)) {
                return Ok(found.as_str().parse().ok());
            }
        }
        Ok(None)
    }

    /// The rank of a module's factors.
    pub(super) fn rank_of(&self, module: &str) -> Result<usize> {
        first_match("rank_pattern", &self.ranks, module).map(|found| found.unwrap_or(self.rank))
    }

    /// What B · A · x is multiplied by.
    pub(super) fn scale_of(&self, module: &str) -> Result<f32> {
        let rank = self.rank_of(module)? as f64;
        let alpha = first_match("alpha_pattern", &self.alphas, module)?.unwrap_or(self.alpha);
        let scale = (if self.rank_stabilised { alpha / rank.sqrt() } else { alpha / rank }) as f32;
        if !scale.is_finite() {
            return Err(Error::format(format!(
                "{PLACE}: the scale of {module} is alpha {alpha:?} over rank {rank}, beyond the range of f32"
            )));
        }
        Ok(scale)
    }
}

/// The value of the first pattern that a module's name, or the end of it, matches.
fn first_match<T: Copy>(field: &str, patterns: &[(Regex, T)], module: &str) -> Result<Option<T>> {
    for (regex, value) in patterns {
        if is_match(field, regex, module)? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

fn is_match(field: &str, regex: &Regex, module: &str) -> Result<bool> {
    regex.is_match(module).map_err(|e| too_much(field, regex, &e))
}

fn too_much(field: &str, regex: &Regex, error: &fancy_regex::Error) -> Error {
    Error::limit(format!("{PLACE}: {field:?}: {:?} takes too long to match: {error}", regex.as_str()))
}

fn pattern(field: &str, text: &str) -> Result<Regex> {
    if text.len() > MAX_PATTERN_BYTES {
        return Err(Error::limit(format!(
            "{PLACE}: {field:?} has a pattern of {} bytes, at most {MAX_PATTERN_BYTES} are allowed",
            text.len()
        )));
    }
    RegexBuilder::new(text)
        .backtrack_limit(MAX_BACKTRACKS)
        .build()
        .map_err(|e| Error::format(format!("{PLACE}: {field:?}: {text:?} is not a regular expression: {e}")))
}

struct Fields<'a>(&'a Map<String, Value>);

impl Fields<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    fn wrong(&self, key: &str, want: &str) -> Error {
        let value = self.0.get(key).map_or("not there".to_owned(), |v| format!("{v}"));
        Error::format(format!("{PLACE}: {key:?} is {value}, it must be {want}"))
    }

    fn refuse_other_kinds(&self) -> Result<()> {
        let mut problems = Vec::new();
        let off = |v: &Value| match v {
            Value::Null | Value::Bool(false) => true,
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            _ => false,
        };
        match self.get("peft_type") {
            Some(Value::String(kind)) if kind == "LORA" => {}
            other => {
                let value = other.map_or("nothing".to_owned(), ToString::to_string);
                problems.push(format!("\"peft_type\" is {value}, it must be \"LORA\""));
            }
        }
        for (key, what) in MUST_BE_OFF {
            if let Some(value) = self.get(key).filter(|v| !off(v)) {
                problems.push(format!("{key:?} is {value}, it must be off: {what} is not computed"));
            }
        }
        match self.get("bias") {
            None => {}
            Some(Value::String(none)) if none == "none" => {}
            Some(value) => problems.push(format!("\"bias\" is {value}, it must be \"none\": biases are not adapted")),
        }
        match self.get("init_lora_weights") {
            None | Some(Value::Bool(_)) => {}
            Some(Value::String(way)) if KEEPS_BASE.contains(&way.as_str()) => {}
            Some(way) => problems.push(format!(
                "\"init_lora_weights\" is {way}, which changes the base weights; save the adapter with path_initial_model_for_weight_conversion, which makes it true"
            )),
        }
        for name in self.saved_modules()? {
            if !HEADS.contains(&name.as_str()) {
                problems.push(format!("\"modules_to_save\" names {name:?}; only a score head can be replaced"));
            }
        }
        if problems.is_empty() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Unsupported, format!("{PLACE}: {}", problems.join("; "))))
    }

    fn saved_modules(&self) -> Result<Vec<String>> {
        if self.get("modules_to_save").is_some() { self.list("modules_to_save") } else { Ok(Vec::new()) }
    }

    fn saves_score(&self) -> Result<bool> {
        Ok(self.saved_modules()?.iter().any(|name| name == SCORE))
    }

    fn rank(&self) -> Result<usize> {
        match self.get("r") {
            None => Ok(8),
            Some(value) => match value.as_u64() {
                Some(rank) if rank > MAX_RANK => {
                    Err(Error::limit(format!("{PLACE}: \"r\" is {rank}, at most {MAX_RANK} is allowed")))
                }
                Some(rank) if rank > 0 => Ok(rank as usize),
                _ => Err(self.wrong("r", &format!("an integer from 1 to {MAX_RANK}"))),
            },
        }
    }

    fn layers(&self) -> Result<Option<Vec<u64>>> {
        let want = "the number of a layer, or a list of them";
        match self.get("layers_to_transform") {
            None => Ok(None),
            Some(Value::Array(list)) if list.is_empty() => Ok(None),
            Some(Value::Array(list)) => {
                let numbers: Option<Vec<u64>> = list.iter().map(Value::as_u64).collect();
                numbers.map(Some).ok_or_else(|| self.wrong("layers_to_transform", want))
            }
            Some(one) => one.as_u64().map(|n| Some(vec![n])).ok_or_else(|| self.wrong("layers_to_transform", want)),
        }
    }

    fn list(&self, key: &str) -> Result<Vec<String>> {
        let list = self.get(key).and_then(Value::as_array);
        let names: Option<Vec<String>> = list.and_then(|l| l.iter().map(|v| v.as_str().map(str::to_owned)).collect());
        match names {
            Some(names) if names.len() > MAX_NAMES => {
                Err(Error::limit(format!("{PLACE}: {key:?} has {} names, at most {MAX_NAMES}", names.len())))
            }
            Some(names) => Ok(names),
            None => Err(self.wrong(key, "a list of names")),
        }
    }

    fn names(&self, key: &str) -> Result<Option<Names>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(list)) if list.is_empty() => Ok(None),
            Some(Value::String(text)) if key == "target_modules" && text.eq_ignore_ascii_case("all-linear") => {
                Ok(Some(Names::AllLinear))
            }
            Some(Value::String(text)) => Ok(Some(Names::Pattern(pattern(key, &format!(r"\A(?:{text})\z"))?))),
            Some(_) => Ok(Some(Names::List(self.list(key)?))),
        }
    }

    /// The patterns of an object, in its order, with their values.
    fn patterns<T>(&self, key: &str, want: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Vec<(Regex, T)>> {
        let map = match self.get(key) {
            None => return Ok(Vec::new()),
            Some(Value::Object(map)) => map,
            Some(_) => return Err(self.wrong(key, "an object")),
        };
        if map.len() > MAX_NAMES {
            return Err(Error::limit(format!("{PLACE}: {key:?} has {} patterns, at most {MAX_NAMES}", map.len())));
        }
        let one = |(name, value): (&String, &Value)| {
            let read = read(value)
                .ok_or_else(|| Error::format(format!("{PLACE}: {key:?}: {name:?} is {value}, it must be {want}")))?;
            Ok((pattern(key, &format!(r"\A(?:.*\.)?(?:{name})\z"))?, read))
        };
        map.iter().map(one).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<AdapterConfig> {
        AdapterConfig::parse(text.as_bytes())
    }

    #[test]
    fn names_match_as_in_peft() {
        let q = "model.layers.1.self_attn.q_proj";
        let config = |targets: &str| {
            parse(&format!(r#"{{"peft_type": "LORA", "target_modules": {targets}}}"#)).unwrap().targets(q).unwrap()
        };
        assert!(config(r#"["q_proj"]"#) && config(r#"["self_attn.q_proj"]"#) && config(r#""all-linear""#));
        assert!(config(r#"["model.layers.1.self_attn.q_proj"]"#) && config(r#"".*\\.(q|v)_proj""#));
        assert!(!config(r#"["proj"]"#) && !config(r#"["k_proj"]"#) && !config(r#""q_proj""#));
        assert!(config(r#""^(?!.*mlp).*_proj""#), "a look-ahead, which PEFT's users write");
    }

    #[test]
    fn layers_ranks_and_alphas_follow_their_patterns() {
        let config = parse(
            r#"{"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "r": 8,
                "lora_alpha": 16, "rank_pattern": {"^model.layers.1.self_attn.v_proj": 2, "v_proj": 4},
                "alpha_pattern": {"self_attn.v_proj": 3}, "exclude_modules": ["layers.7.self_attn.q_proj"]}"#,
        )
        .unwrap();
        let [q0, q1, v1] = ["0.self_attn.q_proj", "1.self_attn.q_proj", "1.self_attn.v_proj"]
            .map(|name| format!("model.layers.{name}"));
        assert!(!config.targets(&q0).unwrap() && config.targets(&q1).unwrap());
        assert_eq!((config.rank_of(&q1).unwrap(), config.scale_of(&q1).unwrap()), (8, 2.0));
        assert_eq!(
            (config.rank_of(&v1).unwrap(), config.scale_of(&v1).unwrap()),
            (2, 1.5),
            "the first pattern that fits"
        );
        let v0 = "model.layers.0.self_attn.v_proj";
        assert_eq!((config.rank_of(v0).unwrap(), config.scale_of(v0).unwrap()), (4, 0.75));
    }
}
