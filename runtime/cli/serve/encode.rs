//! Text to ids, the way the stacks do it whose clients ask here.

use rewardrt::{EncodeOptions, Model, Tokenizer};

use super::error::{ApiError, ApiResult};
use super::fields::Prompts;

/// Encodes a text that may have been rendered by a chat template: special tokens in it are recognised, and where both
/// the text and the tokenizer put the first one (BOS), there is one.
pub fn rendered(tokenizer: &Tokenizer, text: &str, add_special: bool) -> ApiResult<Vec<u32>> {
    let encode = |add_special| tokenizer.encode(text, EncodeOptions { add_special, parse_special: true });
    let mut ids = encode(add_special)?;
    let twice = matches!(ids[..], [a, b, ..] if a == b && tokenizer.special_tokens().any(|(id, _)| id == a));
    // It may be the text alone that has it twice.
    if add_special && twice && encode(false)?.len() < ids.len() {
        ids.remove(0);
    }
    Ok(ids)
}

/// Ids of prompts that are texts or ids.
pub fn prompts(model: &Model, prompts: Prompts, add_special: bool) -> ApiResult<Vec<Vec<u32>>> {
    let texts = match prompts {
        Prompts::Text(text) => vec![text],
        Prompts::Texts(texts) => texts,
        Prompts::Ids(ids) => return Ok(vec![ids]),
        Prompts::Lists(lists) => return Ok(lists),
    };
    let tokenizer = model.tokenizer().map_err(ApiError::from)?;
    texts.iter().map(|text| rendered(tokenizer, text, add_special)).collect()
}
