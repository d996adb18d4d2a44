//! cos and sin of the rotary angles, by position; computed once, on the host, for both backends.

use crate::model::Rope;

pub(super) struct Angles {
    rope: Rope,
    /// [positions so far, 2, E/2] at the trained length.
    table: Vec<f32>,
}

impl Angles {
    pub(super) fn new(rope: Rope) -> Self {
        Angles { rope, table: Vec::new() }
    }

    /// The length of a forward from which on its angles depend on it, if they ever do.
    pub(super) fn length_dependent_above(&self) -> Option<usize> {
        self.rope.length_dependent_above()
    }

    /// Appends the angles of `position` in a forward over `forward_len` positions.
    pub(super) fn push(&mut self, position: usize, forward_len: usize, out: &mut Vec<f32>) {
        if self.rope.length_dependent_above().is_some_and(|trained| forward_len > trained) {
            let (frequencies, factor) = self.rope.frequencies(forward_len);
            push_angles(position, &frequencies, factor, out);
            return;
        }
        let width = self.rope.head_dim;
        let known = self.table.len() / width;
        if position >= known {
            let (frequencies, factor) = self.rope.frequencies(0);
            // Grow by doubling: no table is sized by the config's context.
            for p in known..(position + 1).max(2 * known) {
                push_angles(p, &frequencies, factor, &mut self.table);
            }
        }
        out.extend_from_slice(&self.table[position * width..(position + 1) * width]);
    }
}

fn push_angles(position: usize, frequencies: &[f32], factor: f32, out: &mut Vec<f32>) {
    let angle = |f: &f32| position as f32 * f;
    out.extend(frequencies.iter().map(|f| angle(f).cos() * factor));
    out.extend(frequencies.iter().map(|f| angle(f).sin() * factor));
}
