//! The checksum of a tensor's new bytes.

use std::fmt;

use xxhash_rust::xxh3::Xxh3;

use crate::error::{Error, Result};

/// Which checksum a delta has; the same for all its tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Algorithm {
    Xxh3,
    Adler32,
}

impl Algorithm {
    pub(super) fn parse(name: &str) -> Result<Self> {
        match name {
            "xxh3-128" => Ok(Algorithm::Xxh3),
            "adler32" => Ok(Algorithm::Adler32),
            _ => Err(Error::unsupported(format!("checksum_format is {name:?}; xxh3-128 and adler32 are read"))),
        }
    }

    pub(super) const fn name(self) -> &'static str {
        match self {
            Algorithm::Xxh3 => "xxh3-128",
            Algorithm::Adler32 => "adler32",
        }
    }

    const fn digits(self) -> usize {
        match self {
            Algorithm::Xxh3 => 32,
            Algorithm::Adler32 => 8,
        }
    }
}

/// A checksum; its text is hexadecimal, the highest digit first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Checksum {
    algorithm: Algorithm,
    value: u128,
}

impl Checksum {
    pub(super) fn parse(algorithm: Algorithm, text: &str) -> Result<Self> {
        let hexadecimal = text.len() == algorithm.digits() && text.bytes().all(|b| b.is_ascii_hexdigit());
        match u128::from_str_radix(text, 16) {
            Ok(value) if hexadecimal => Ok(Checksum { algorithm, value }),
            _ => Err(Error::format(format!(
                "its checksum is {text:?}; {} has {} hexadecimal digits",
                algorithm.name(),
                algorithm.digits()
            ))),
        }
    }

    pub(super) fn check(&self, got: &Checksum) -> Result<()> {
        if got == self {
            return Ok(());
        }
        Err(Error::format(format!(
            "with the delta its {} is {got}, it should be {self}: the base is another one, or the delta is damaged",
            self.algorithm.name()
        )))
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:0width$x}", self.value, width = self.algorithm.digits())
    }
}

/// A checksum of bytes that come in parts.
pub(super) enum Hasher {
    // On the heap: it is some 600 bytes.
    Xxh3(Box<Xxh3>),
    Adler32 { low: u32, high: u32 },
}

impl Hasher {
    pub(super) fn new(algorithm: Algorithm) -> Self {
        match algorithm {
            Algorithm::Xxh3 => Hasher::Xxh3(Box::new(Xxh3::new())),
            Algorithm::Adler32 => Hasher::Adler32 { low: 1, high: 0 },
        }
    }

    pub(super) fn update(&mut self, bytes: &[u8]) {
        match self {
            Hasher::Xxh3(state) => state.update(bytes),
            Hasher::Adler32 { low, high } => {
                // The most bytes whose sums stay below 2^32 (RFC 1950).
                for part in bytes.chunks(5552) {
                    for &byte in part {
                        *low += u32::from(byte);
                        *high += *low;
                    }
                    *low %= 65521;
                    *high %= 65521;
                }
            }
        }
    }

    pub(super) fn finish(self) -> Checksum {
        match self {
            Hasher::Xxh3(state) => Checksum { algorithm: Algorithm::Xxh3, value: state.digest128() },
            Hasher::Adler32 { low, high } => {
                Checksum { algorithm: Algorithm::Adler32, value: u128::from(high << 16 | low) }
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn text(algorithm: Algorithm, parts: &[&[u8]]) -> String {
        let mut hasher = Hasher::new(algorithm);
        parts.iter().for_each(|part| hasher.update(part));
        hasher.finish().to_string()
    }

    /// Python: `xxhash.xxh3_128(…).hexdigest()`, `f"{zlib.adler32(…):08x}"`.
    #[test]
    fn known_values() {
        assert_eq!(text(Algorithm::Xxh3, &[b"abcd"]), "8d6b60383dfa90c21be79eecd1b1353d");
        assert_eq!(text(Algorithm::Xxh3, &[b"", b"a", b"bcd"]), "8d6b60383dfa90c21be79eecd1b1353d");
        assert_eq!(text(Algorithm::Adler32, &[b"abcd"]), "03d8018b");
        assert_eq!(text(Algorithm::Adler32, &[]), "00000001");
        assert_eq!(text(Algorithm::Adler32, &[&[255; 5000], &[255; 15000]]), "9f51d664");
    }

    #[test]
    fn malformed() {
        for text in ["", "8d6b60383dfa90c21be79eecd1b1353", "+d6b60383dfa90c21be79eecd1b1353d", "03d8018b"] {
            let e = Checksum::parse(Algorithm::Xxh3, text).unwrap_err();
            assert!(e.to_string().contains("has 32 hexadecimal digits"), "{e}");
        }
    }
}
