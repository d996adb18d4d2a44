//! Prompt lookup (Saxena 2023): the tokens that followed the last occurrence of the sequence's own ending are guessed to
//! follow again. No second model; good where a text quotes itself.

/// The longest ending that is looked for; shorter ones are tried after it.
const LONGEST: usize = 3;

/// Up to `most` tokens that may come after `tokens`.
pub(super) fn prompt_lookup(tokens: &[u32], most: usize) -> &[u32] {
    for length in (1..=LONGEST.min(tokens.len().saturating_sub(1))).rev() {
        let (earlier, ending) = (&tokens[..tokens.len() - 1], &tokens[tokens.len() - length..]);
        if let Some(at) = earlier.windows(length).rposition(|w| w == ending) {
            let start = at + length;
            return &tokens[start..tokens.len().min(start + most)];
        }
    }
    &[]
}

#[cfg(test)]
mod tests {
    use super::prompt_lookup;

    #[test]
    fn the_latest_and_longest_match_wins() {
        assert_eq!(prompt_lookup(&[1, 2, 3, 9, 8, 2, 3, 7, 1, 2, 3], 2), [9, 8]);
        assert_eq!(prompt_lookup(&[5, 3, 6, 3, 7, 3], 4), [7, 3]);
        assert_eq!(prompt_lookup(&[4, 4], 3), [4]);
        assert!(prompt_lookup(&[1, 2, 3], 3).is_empty());
        assert!(prompt_lookup(&[1], 3).is_empty() && prompt_lookup(&[4, 4], 0).is_empty());
    }
}
