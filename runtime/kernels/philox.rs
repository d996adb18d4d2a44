//! Philox4x32-10 (Salmon et al., SC'11): random numbers as a function of a key and a counter, nothing else.
//!
//! key = (seed, stream), counter = (sample, position), their upper halves in the counter: 256 bits in, so that two
//! draws that differ in any of the four never share a block. The shader of `sample` gets the uniform from here, so
//! both backends draw the same one.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Ten rounds.
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let wide = |i: usize, c: u32| u64::from(MULTIPLIERS[i]) * u64::from(c);
        let (a, b) = (wide(0, counter[0]), wide(1, counter[2]));
        let high = |w: u64| (w >> 32) as u32;
        counter = [high(b) ^ counter[1] ^ key[0], b as u32, high(a) ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// Names one draw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draw {
    /// The request's seed.
    pub seed: u64,
    /// Which prompt of the request.
    pub stream: u64,
    /// Which sample of the prompt.
    pub sample: u32,
    /// The position of the token to be sampled.
    pub position: u32,
}

impl Draw {
    /// A uniform number in [0, 1), a multiple of 2^−24.
    pub fn uniform(self) -> f32 {
        let halves = |v: u64| (v as u32, (v >> 32) as u32);
        let ((seed, seed_high), (stream, stream_high)) = (halves(self.seed), halves(self.stream));
        let block = philox4x32([self.sample, self.position, seed_high, stream_high], [seed, stream]);
        (block[0] >> 8) as f32 * (1.0 / 16_777_216.0)
    }
}

#[cfg(test)]
mod tests {
    use super::philox4x32;

    /// The known answers published with Random123 (kat_vectors, philox4x32 10).
    #[test]
    fn random123_known_answers() {
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        let ones = u32::MAX;
        assert_eq!(philox4x32([ones; 4], [ones; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox4x32([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }
}
