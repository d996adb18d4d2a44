//! config.json → [`ModelSpec`]: every number checked where it enters, every unknown choice refused by name.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::families::{Biases, FAMILIES, Family, NEUTRAL, Window};
use super::rope::{Rope, RopeKind};
use super::spec::{AttentionBias, Head, ModelSpec};
use crate::error::{Error, Result};

const MAX_LAYERS: u64 = 1024;
const MAX_WIDTH: u64 = 1 << 16;
const MAX_MLP_WIDTH: u64 = 1 << 20;
const MAX_HEADS: u64 = 1024;
const MAX_HEAD_DIM: u64 = 1024;
const MAX_VOCAB: u64 = 1 << 20;
const MAX_LABELS: u64 = 1 << 16;
const MAX_POSITIONS: u64 = 1 << 31;

// The kinds of `layer_types`.
const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";

/// Reads config.json, and generation_config.json where there is one (its `eos_token_id` wins, as in transformers).
///
/// # Errors
/// `Format` for a value of the wrong type or range, `Limit` for one beyond this version's bounds, `Unsupported` for an
/// architecture, activation, rope type or other choice that this version does not compute.
pub fn parse_config(config: &[u8], generation_config: Option<&[u8]>) -> Result<ModelSpec> {
    let object = |text: &[u8], name: &str| -> Result<Map<String, Value>> {
        serde_json::from_slice(text).map_err(|e| Error::format(format!("{name}: not a JSON object: {e}")))
    };
    let map = object(config, "config.json")?;
    let fields = Fields { map: &map, place: "config.json" };
    let mut spec = fields.spec()?;
    if let Some(text) = generation_config {
        let map = object(text, "generation_config.json")?;
        let generation = Fields { map: &map, place: "generation_config.json" };
        if let Some(ids) = generation.token_ids("eos_token_id")? {
            spec.eos_token_ids = ids;
        }
    }
    Ok(spec)
}

struct Fields<'a> {
    map: &'a Map<String, Value>,
    place: &'static str,
}

impl Fields<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    fn wrong(&self, key: &str, want: &str) -> Error {
        let value = self.map.get(key).map_or("nothing".to_owned(), ToString::to_string);
        Error::format(format!("{}: {key:?} is {value}, it must be {want}", self.place))
    }

    fn integer(&self, key: &str, max: u64) -> Result<Option<usize>> {
        self.integer_in(key, 1..=max)
    }

    fn integer_in(&self, key: &str, range: RangeInclusive<u64>) -> Result<Option<usize>> {
        let (min, max) = range.clone().into_inner();
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64() {
            Some(n) if range.contains(&n) => {
                usize::try_from(n).map(Some).map_err(|_| self.wrong(key, "a number that fits this machine"))
            }
            Some(n) if n > max => {
                Err(Error::limit(format!("{}: {key:?} is {n}, at most {max} is allowed", self.place)))
            }
            _ => Err(self.wrong(key, &format!("an integer from {min} to {max}"))),
        }
    }

    fn required(&self, key: &str, max: u64) -> Result<usize> {
        self.integer(key, max)?.ok_or_else(|| self.wrong(key, &format!("an integer from 1 to {max}")))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_f64().filter(|n| n.is_finite()).map(Some).ok_or_else(|| self.wrong(key, "a finite number"))
    }

    fn positive(&self, key: &str) -> Result<Option<f64>> {
        match self.number(key)? {
            Some(n) if n <= 0.0 => Err(self.wrong(key, "greater than 0")),
            other => Ok(other),
        }
    }

    fn flag(&self, key: &str) -> Result<bool> {
        match self.get(key) {
            None => Ok(false),
            Some(Value::Bool(b)) => Ok(*b),
            Some(_) => Err(self.wrong(key, "true or false")),
        }
    }

    fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(_) => Err(self.wrong(key, "a string")),
        }
    }

    fn token_ids(&self, key: &str) -> Result<Option<Vec<u32>>> {
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let want = "a token id or a list of token ids";
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(list)) => {
                list.iter().map(id).collect::<Option<Vec<_>>>().map(Some).ok_or_else(|| self.wrong(key, want))
            }
            Some(value) => id(value).map(|id| Some(vec![id])).ok_or_else(|| self.wrong(key, want)),
        }
    }

    fn spec(&self) -> Result<ModelSpec> {
        let (architecture, family, classifies) = self.family()?;
        self.refuse_unknown_choices(family)?;

        let hidden_size = self.required("hidden_size", MAX_WIDTH)?;
        let heads = self.required("num_attention_heads", MAX_HEADS)?;
        let kv_heads = match (self.integer("num_key_value_heads", MAX_HEADS)?, family.default_kv_heads) {
            (Some(n), _) => n,
            (None, Some(default)) if !self.map.contains_key("num_key_value_heads") => default,
            (None, _) => heads,
        };
        if !heads.is_multiple_of(kv_heads) {
            return Err(self.wrong("num_key_value_heads", &format!("a divisor of num_attention_heads = {heads}")));
        }
        let head_dim = match self.integer("head_dim", MAX_HEAD_DIM)? {
            Some(n) => n,
            None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => return Err(self.wrong("hidden_size", &format!("a multiple of num_attention_heads = {heads}"))),
        };
        if !head_dim.is_multiple_of(2) {
            return Err(Error::unsupported(format!("config.json: a head size of {head_dim}; rope needs an even one")));
        }
        let rms_norm_eps = match self.number("rms_norm_eps")? {
            Some(eps) if eps < 0.0 => return Err(self.wrong("rms_norm_eps", "0 or greater")),
            eps => eps.unwrap_or(1e-6) as f32,
        };
        let max_positions =
            self.integer("max_position_embeddings", MAX_POSITIONS)?.unwrap_or(family.default_max_positions);
        let layers = self.required("num_hidden_layers", MAX_LAYERS)?;
        let head = if classifies {
            Head::SequenceClassification { labels: self.labels()? }
        } else {
            Head::LanguageModel { tied: self.flag("tie_word_embeddings")? }
        };
        Ok(ModelSpec {
            architecture,
            vocab_size: self.required("vocab_size", MAX_VOCAB)?,
            hidden_size,
            intermediate_size: self.required("intermediate_size", MAX_MLP_WIDTH)?,
            layers,
            heads,
            kv_heads,
            head_dim,
            rms_norm_eps,
            attention_bias: match family.biases {
                Biases::AttentionInputs => AttentionBias::Inputs,
                Biases::Configured if self.flag("attention_bias")? => AttentionBias::All,
                Biases::Configured | Biases::Never => AttentionBias::Never,
            },
            mlp_bias: family.biases == Biases::Configured && self.flag("mlp_bias")?,
            sliding_window: self.sliding_window(family, layers)?,
            rope: self.rope(head_dim, max_positions)?,
            max_positions,
            head,
            // Old Llama exports say −1 for none.
            pad_token_id: match self.get("pad_token_id").and_then(Value::as_i64) {
                Some(id) if id < 0 => None,
                _ => self.token_ids("pad_token_id")?.and_then(|ids| ids.first().copied()),
            },
            eos_token_ids: match self.map.contains_key("eos_token_id") {
                true => self.token_ids("eos_token_id")?.unwrap_or_default(),
                false => family.default_eos_token_ids.to_vec(),
            },
        })
    }

    fn family(&self) -> Result<(String, &'static Family, bool)> {
        let known = || {
            let names = FAMILIES.iter().flat_map(|f| [f.causal_lm, f.sequence_classification]);
            names.collect::<Vec<_>>().join(", ")
        };
        let list = self.get("architectures").and_then(Value::as_array);
        let Some(name) = list.and_then(|l| l.first()).and_then(Value::as_str) else {
            return Err(self.wrong("architectures", &format!("a list with one of: {}", known())));
        };
        for family in FAMILIES {
            if name == family.causal_lm || name == family.sequence_classification {
                return Ok((name.to_owned(), family, name == family.sequence_classification));
            }
        }
        Err(Error::unsupported(format!("config.json: architecture {name:?}; this version knows {}", known())))
    }

    fn refuse_unknown_choices(&self, family: &Family) -> Result<()> {
        for (key, neutral) in NEUTRAL {
            if let Some(value) = self.get(key).filter(|v| !neutral.admits(v)) {
                return Err(Error::unsupported(format!(
                    "config.json: {key:?} is {value}; this version computes only {}",
                    neutral.describe()
                )));
            }
        }
        for key in ["attention_bias", "mlp_bias"] {
            let value = self.flag(key)?;
            if let Some(fixed) = family.biases.fixed(key).filter(|fixed| self.get(key).is_some() && value != *fixed) {
                return Err(Error::unsupported(format!(
                    "config.json: {key:?} is {value}, it must be {fixed} or absent: {} has {}",
                    family.causal_lm,
                    family.biases.describe()
                )));
            }
        }
        Ok(())
    }

    fn labels(&self) -> Result<Vec<String>> {
        if let Some(Value::Object(map)) = self.get("id2label") {
            let label = |i: usize| map.get(&i.to_string()).and_then(Value::as_str).map(str::to_owned);
            let labels: Option<Vec<String>> = (0..map.len()).map(label).collect();
            return labels
                .filter(|l| !l.is_empty() && l.len() as u64 <= MAX_LABELS)
                .ok_or_else(|| self.wrong("id2label", "an object with the keys \"0\", \"1\", … and string values"));
        }
        // transformers' default is 2 labels, which is rarely what a reward model meant; it is what the head has then.
        let count = self.integer("num_labels", MAX_LABELS)?.unwrap_or(2);
        Ok((0..count).map(|i| format!("LABEL_{i}")).collect())
    }

    /// The window of every layer, or of none.
    fn sliding_window(&self, family: &Family, layers: usize) -> Result<Option<usize>> {
        let kind = self.layer_type(layers)?;
        let window = |default: usize| match self.map.contains_key("sliding_window") {
            true => self.integer("sliding_window", MAX_POSITIONS),
            false => Ok(Some(default)),
        };
        let window = match family.window {
            Window::Never => None,
            Window::EveryLayer { default } => window(default)?,
            Window::FromLayer { .. } if !self.flag("use_sliding_window")? => None,
            Window::FromLayer { default, default_first } => match (kind, window(default)?) {
                // Here `layer_types` decides; elsewhere it may only say what the other keys say.
                (Some(FULL), _) | (_, None) => None,
                (Some(_), window) => window,
                (None, window) if self.every_layer_slides(default_first, layers)? => window,
                (None, _) => None,
            },
        };
        let computed = if window.is_some() { SLIDING } else { FULL };
        if let Some(kind) = kind.filter(|kind| *kind != computed) {
            return Err(Error::unsupported(format!(
                "config.json: \"layer_types\" is all {kind:?}, it must be all {computed:?} or absent: {} has {}",
                family.causal_lm,
                family.window.describe()
            )));
        }
        Ok(window)
    }

    /// What `layer_types` says of every layer.
    fn layer_type(&self, layers: usize) -> Result<Option<&str>> {
        let key = "layer_types";
        let Some(value) = self.get(key) else { return Ok(None) };
        let kinds: Option<Vec<&str>> = value.as_array().and_then(|list| list.iter().map(Value::as_str).collect());
        match kinds.as_deref() {
            Some([first, rest @ ..]) if rest.len() + 1 == layers => match rest.iter().all(|kind| kind == first) {
                true => Ok(Some(first)),
                false => Err(Error::unsupported(format!(
                    "config.json: {key:?} is {value}; this version computes only all {FULL:?} or all {SLIDING:?}"
                ))),
            },
            _ => Err(self.wrong(key, &format!("a list of num_hidden_layers = {layers} strings"))),
        }
    }

    /// Whether the layers from `max_window_layers` on, which slide, are all there are; false if there are none.
    fn every_layer_slides(&self, default_first: usize, layers: usize) -> Result<bool> {
        let key = "max_window_layers";
        match self.integer_in(key, 0..=MAX_LAYERS)?.unwrap_or(default_first) {
            0 => Ok(true),
            first if first >= layers => Ok(false),
            first => Err(Error::unsupported(format!(
                "config.json: {key:?} is {first}, so with \"use_sliding_window\" the layers below {first} do not slide and \
                 the others do; this version computes only 0 (all slide) or at least num_hidden_layers = {layers} (none does)"
            ))),
        }
    }

    /// Reads the old spelling (`rope_theta` + `rope_scaling`) and the newer one (`rope_parameters`), with
    /// transformers' precedence: a non-empty `rope_scaling` replaces `rope_parameters`.
    fn rope(&self, head_dim: usize, max_positions: usize) -> Result<Rope> {
        let empty = Map::new();
        let mut place = "rope_scaling";
        let mut map = &empty;
        for key in ["rope_parameters", "rope_scaling"] {
            match self.get(key) {
                Some(Value::Object(object)) if !object.is_empty() => (place, map) = (key, object),
                None | Some(Value::Object(_)) => {}
                Some(_) => return Err(self.wrong(key, "an object")),
            }
        }
        let params = Fields { map, place: "config.json" };
        let in_place = |e: Error| e.at(place);
        let kind = match params.text("rope_type").map_err(in_place)? {
            Some(kind) => kind,
            None => params.text("type").map_err(in_place)?.unwrap_or("default"),
        };
        if params.number("partial_rotary_factor").map_err(in_place)?.is_some_and(|f| f != 1.0) {
            return Err(Error::unsupported(format!("config.json: {place}: partial_rotary_factor other than 1")));
        }
        let theta = match params.positive("rope_theta").map_err(in_place)? {
            Some(theta) => theta,
            None => self.positive("rope_theta")?.unwrap_or(10_000.0),
        };
        let factor = || -> Result<f64> {
            let want = || params.wrong("factor", "a number greater than 0").at(place);
            params.positive("factor").map_err(in_place)?.ok_or_else(want)
        };
        let original = || -> Result<usize> {
            let key = "original_max_position_embeddings";
            if let Some(n) = self.integer(key, MAX_POSITIONS)? {
                return Ok(n);
            }
            Ok(params.integer(key, MAX_POSITIONS).map_err(in_place)?.unwrap_or(max_positions))
        };
        let kind = match kind {
            "default" => RopeKind::Default,
            "linear" => RopeKind::Linear { factor: factor()? },
            "dynamic" if head_dim <= 2 => {
                return Err(Error::unsupported(format!(
                    "config.json: {place}: dynamic rope with a head size of {head_dim}"
                )));
            }
            "dynamic" => RopeKind::Dynamic { factor: factor()?, max_positions },
            "llama3" => {
                let required = |key: &str| {
                    let want = || params.wrong(key, "a number greater than 0").at(place);
                    params.positive(key).map_err(in_place)?.ok_or_else(want)
                };
                let (low, high) = (required("low_freq_factor")?, required("high_freq_factor")?);
                if high <= low {
                    return Err(params
                        .wrong("high_freq_factor", &format!("greater than low_freq_factor = {low}"))
                        .at(place));
                }
                RopeKind::Llama3 {
                    factor: factor()?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_max_positions: original()?,
                }
            }
            "yarn" => params.yarn(max_positions, original()?, theta).map_err(in_place)?,
            other => {
                return Err(Error::unsupported(format!(
                    "config.json: {place}: rope type {other:?}; this version computes default, linear, dynamic, yarn and llama3"
                )));
            }
        };
        Ok(Rope { theta, head_dim, kind })
    }

    fn yarn(&self, max_positions: usize, original_max_positions: usize, theta: f64) -> Result<RopeKind> {
        if theta == 1.0 {
            return Err(Error::format("rope_theta is 1, yarn needs another base"));
        }
        let factor = match self.positive("factor")? {
            Some(factor) => factor,
            None => max_positions as f64 / original_max_positions as f64,
        };
        let nonzero = |key: &str| self.number(key).map(|n| n.filter(|n| *n != 0.0));
        let mscale_of = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
        let attention_factor = match (self.number("attention_factor")?, nonzero("mscale")?, nonzero("mscale_all_dim")?)
        {
            (Some(given), _, _) => given,
            (None, Some(mscale), Some(all)) => mscale_of(mscale) / mscale_of(all),
            _ => mscale_of(1.0),
        };
        let beta = |key: &str, default: f64| -> Result<f64> {
            match nonzero(key)? {
                Some(beta) if beta < 0.0 => Err(self.wrong(key, "greater than 0")),
                beta => Ok(beta.unwrap_or(default)),
            }
        };
        Ok(RopeKind::Yarn {
            factor,
            attention_factor,
            beta_fast: beta("beta_fast", 32.0)?,
            beta_slow: beta("beta_slow", 1.0)?,
            truncate: self.get("truncate").is_none_or(|v| v.as_bool().unwrap_or(true)),
            original_max_positions,
        })
    }
}
