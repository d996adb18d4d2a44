//! Every way a delta can be damaged: an error that says where, before a wrong byte is used.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;

use common::deltas::{ENCODINGS, FILE, INDEX, Pair, Tensors, applied, open, read};
use rewardrt::ErrorKind;
use rewardrt::weights::{Delta, Encoding, LoadOptions};
use serde_json::{Value, json};

use ErrorKind::{Format, Limit, NotFound, Shape, Unsupported};

/// Opening, or else applying, must fail.
#[track_caller]
fn refused(encoding: Encoding, damage: impl FnOnce(&Pair), kind: ErrorKind, says: &str) {
    let (pair, old) = Pair::small(encoding);
    damage(&pair);
    let e = open(&pair.out()).and_then(|delta| applied(&delta, &old)).map(|_| ()).expect_err("it was accepted");
    assert_eq!(e.kind(), kind, "{e}");
    assert!(e.to_string().contains(says), "{e}\ndoes not say {says:?}");
    assert!(e.to_string().starts_with(pair.out().to_str().unwrap()), "{e}\ndoes not say where");
}

#[track_caller]
fn bad_index(change: impl FnOnce(&mut Value), kind: ErrorKind, says: &str) {
    refused(Encoding::Xor, |pair| pair.edit_index(change), kind, says);
}

#[test]
fn index_without_a_field() {
    for field in ["version", "base_version", "compression_format", "checksum_format"] {
        let remove = |v: &mut Value| drop(v["metadata"].as_object_mut().unwrap().remove(field));
        bad_index(remove, Format, &format!("missing field `{field}`"));
    }
    bad_index(|v| drop(v["metadata"].as_object_mut().unwrap().remove("delta_encoding")), Format, "a whole checkpoint");
    bad_index(|v| drop(v.as_object_mut().unwrap().remove("weight_map")), Format, "missing field `weight_map`");
    refused(Encoding::Xor, |pair| std::fs::write(pair.out().join(INDEX), "{").unwrap(), Format, "not a valid index");
}

#[test]
fn index_with_an_unknown_format() {
    bad_index(
        |v| v["metadata"]["delta_encoding"] = "deltas".into(),
        Unsupported,
        "\"deltas\"; xor and overwrite are read",
    );
    bad_index(|v| v["metadata"]["compression_format"] = "lz4".into(), Unsupported, "\"lz4\"; zstd is read");
    bad_index(|v| v["metadata"]["checksum_format"] = "blake3".into(), Unsupported, "\"blake3\"; xxh3-128 and adler32");
}

#[test]
fn index_with_versions_out_of_order() {
    bad_index(
        |v| v["metadata"]["base_version"] = "000001".into(),
        Format,
        "base_version is 1, it must be below version 1",
    );
    bad_index(|v| v["metadata"]["version"] = 0.into(), Format, "base_version is 0, it must be below version 0");
    for version in
        [json!("-1"), json!(-1), json!("1.0"), json!(1.5), json!(""), json!(null), json!("99999999999999999999")]
    {
        bad_index(|v| v["metadata"]["version"] = version, Format, "it must be digits");
    }
    let (pair, _) = Pair::small(Encoding::Xor);
    pair.edit_index(|v| v["metadata"]["version"] = 12.into());
    assert_eq!(open(&pair.out()).unwrap().version(), 12, "a number is read as well");
    let named = pair.folder.path().join("weight_v000013");
    std::fs::rename(pair.out(), &named).unwrap();
    let e = open(&named).map(|_| ()).unwrap_err();
    assert!(e.to_string().contains("called \"weight_v000013\", of version 12 it must be \"weight_v000012\""), "{e}");
}

#[test]
fn index_and_files_that_disagree() {
    bad_index(|v| drop(v["weight_map"].as_object_mut().unwrap().remove("a")), Format, "the index does not list it");
    bad_index(|v| v["weight_map"]["c"] = FILE.into(), Format, "tensor \"c\" is mapped to");
    bad_index(|v| v["weight_map"]["a"] = "../a.safetensors".into(), Format, "without a folder");
    bad_index(|v| drop(v["tensors"].as_object_mut().unwrap().remove("a")), Format, "\"a\" is not in \"tensors\"");
    bad_index(|v| v["tensors"]["c"] = v["tensors"]["a"].clone(), Format, "\"c\" is not in \"weight_map\"");
    let extra = |metadata: &mut Value, tensors: &mut Tensors| {
        metadata["c"] = metadata["a"].clone();
        tensors.insert("c".into(), tensors["a"].clone());
    };
    refused(Encoding::Xor, |pair| pair.edit_file(extra), Format, "tensor \"c\": the index does not list it");
    let missing = |_: &mut Value, tensors: &mut Tensors| drop(tensors.remove("a"));
    refused(Encoding::Xor, |pair| pair.edit_file(missing), Format, "tensor \"a\" is mapped to");
    let gone = |pair: &Pair| std::fs::remove_file(pair.out().join(FILE)).unwrap();
    refused(Encoding::Xor, gone, NotFound, FILE);
    let other = "model-00001-of-00002.safetensors";
    let unlisted = |pair: &Pair| {
        std::fs::copy(pair.out().join(FILE), pair.out().join(other)).unwrap();
    };
    refused(Encoding::Xor, unlisted, Format, other);
    let cut = |pair: &Pair| {
        let bytes = std::fs::read(pair.out().join(FILE)).unwrap();
        std::fs::write(pair.out().join(FILE), &bytes[..bytes.len() - 1]).unwrap();
    };
    refused(Encoding::Xor, cut, Format, "not a valid safetensors file");
}

#[test]
fn declared_tensors_that_cannot_be() {
    bad_index(|v| v["tensors"]["a"]["dtype"] = "Q4_K".into(), Format, "Q4_K");
    bad_index(|v| v["tensors"]["a"]["shape"] = json!([-1]), Format, "not the index of a delta");
    bad_index(|v| v["tensors"]["a"]["shape"] = json!([1, 1, 1, 1, 1, 1, 1, 1, 1]), Limit, "\"a\": it has 9 dimensions");
    bad_index(|v| v["tensors"]["a"]["shape"] = json!([1u64 << 40, 1u64 << 40]), Limit, "does not fit in memory");
    bad_index(|v| v["tensors"]["a"]["shape"] = json!([8, 51]), Shape, "it has 800 bytes in the base, 816 in the delta");
}

#[test]
fn frames_that_are_no_frames() {
    let dtype = |_: &mut Value, tensors: &mut Tensors| tensors.get_mut("a").unwrap().0 = "I8".into();
    refused(Encoding::Xor, |pair| pair.edit_file(dtype), Format, "it is I8 [");
    let shape = |_: &mut Value, tensors: &mut Tensors| tensors.get_mut("a").unwrap().1.push(1);
    refused(Encoding::Xor, |pair| pair.edit_file(shape), Format, "a frame is U8 with one dimension");
    for frame in [&b""[..], b"\x28\xb5\x2f", b"not zstd"] {
        refused(Encoding::Xor, |pair| pair.edit_frame(|_| frame.to_vec()), Format, "magic number of a zstd frame");
    }
    for encoding in ENCODINGS {
        refused(encoding, |pair| pair.edit_frame(|f| [f, b"x"].concat()), Format, "1 bytes follow its zstd frame");
        refused(encoding, |pair| pair.edit_frame(|f| [f, f].concat()), Format, "bytes follow its zstd frame");
    }
}

/// No cut and no flipped bit passes, and all of them are errors that say which tensor.
#[test]
fn frames_that_are_damaged_anywhere() {
    for encoding in ENCODINGS {
        let (pair, old) = Pair::small(encoding);
        let whole = read(&pair.out().join(FILE))["a"].2.clone();
        let damaged = |frame: Vec<u8>| {
            pair.edit_frame(|_| frame);
            let delta = Delta::open(&pair.out(), &LoadOptions::default());
            let e = delta.and_then(|delta| applied(&delta, &old)).map(|_| ()).err();
            e.inspect(|e| assert!(e.kind() == Format && e.to_string().contains("tensor \"a\": "), "{e}"))
        };
        for cut in 0..whole.len() {
            assert!(damaged(whole[..cut].to_vec()).is_some(), "{encoding:?}: cut at {cut}");
        }
        for bit in 0..8 * whole.len() {
            let mut frame = whole.clone();
            frame[bit / 8] ^= 1 << (bit % 8);
            // Bits without a meaning may be anything; what comes out must then be right all the same.
            if damaged(frame).is_none() {
                let result = applied(&open(&pair.out()).unwrap(), &old).unwrap();
                assert!(result == read(&pair.new), "{encoding:?}: bit {bit} flipped");
            }
        }
        assert!(damaged(whole).is_none());
    }
}

#[test]
fn frames_of_another_length() {
    let frame = |bytes: Vec<u8>| zstd::bulk::compress(&bytes, 1).unwrap();
    // 1 GiB of zeros in some 30 kB: nothing of its size is allocated.
    let bomb = || zstd::stream::encode_all(std::io::Read::take(std::io::repeat(0), 1 << 30), 1).unwrap();
    let xor = |bytes: Vec<u8>, says| refused(Encoding::Xor, |pair| pair.edit_frame(|_| bytes), Format, says);
    xor(frame(vec![0; 799]), "its frame holds 799 bytes, it should hold 800");
    xor(frame(vec![]), "its frame holds 0 bytes, it should hold 800");
    xor(frame(vec![0; 801]), "its frame holds more than the 800 bytes that it should hold");
    xor(bomb(), "its frame holds more than the 800 bytes that it should hold");
    let overwrite = |n: u32, places: &[u32], values: &[u8], says: &str| {
        let places: Vec<u8> = places.iter().flat_map(|p| p.to_le_bytes()).collect();
        let bytes = frame([&n.to_le_bytes(), &places[..], values].concat());
        refused(Encoding::Overwrite, |pair| pair.edit_frame(|_| bytes), Format, says);
    };
    overwrite(801, &[], &[], "its frame changes 801 bytes, the tensor has 800");
    overwrite(u32::MAX, &[], &[], "its frame changes 4294967295 bytes, the tensor has 800");
    overwrite(2, &[0, 1], &[1], "its frame holds 13 bytes, it should hold 14");
    overwrite(2, &[0], &[], "its frame holds 8 bytes, it should hold 14");
    overwrite(2, &[0, 1], &[1, 1, 1], "its frame holds more than the 14 bytes that it should hold");
    overwrite(2, &[0, 800], &[1, 1], "its frame changes byte 800, the tensor has 800");
    overwrite(1, &[u32::MAX], &[1], "its frame changes byte 4294967295, the tensor has 800");
    refused(Encoding::Overwrite, |pair| pair.edit_frame(|_| frame(vec![1, 0])), Format, "its frame holds 2 bytes");
}

/// A frame may not ask for more than 8 MiB of window, whatever it holds.
#[test]
fn a_frame_that_wants_a_large_window() {
    // Magic number, no content size, window descriptor 2^(10 + 14) = 16 MiB, one empty last block.
    let frame = b"\x28\xb5\x2f\xfd\x00\x70\x01\x00\x00".to_vec();
    refused(Encoding::Xor, |pair| pair.edit_frame(|_| frame), Format, "too much memory");
    // 8 MiB are read; it holds nothing.
    let frame = b"\x28\xb5\x2f\xfd\x00\x68\x01\x00\x00".to_vec();
    refused(Encoding::Xor, |pair| pair.edit_frame(|_| frame), Format, "its frame holds 0 bytes");
}

#[test]
fn checksums_that_are_wrong() {
    let zero = "0".repeat(32);
    let other = |m: &mut Value, _: &mut Tensors| m["a"] = zero.clone().into();
    refused(Encoding::Xor, |pair| pair.edit_file(other), Format, &format!("it should be {zero}"));
    let none = |m: &mut Value, _: &mut Tensors| drop(m.as_object_mut().unwrap().remove("a"));
    refused(Encoding::Xor, |pair| pair.edit_file(none), Format, "\"a\": __metadata__ has no checksum for it");
    let short = |m: &mut Value, _: &mut Tensors| m["a"] = "12ab".into();
    refused(Encoding::Xor, |pair| pair.edit_file(short), Format, "\"12ab\"; xxh3-128 has 32 hexadecimal digits");
    bad_index(|v| v["metadata"]["checksum_format"] = "adler32".into(), Format, "adler32 has 8 hexadecimal digits");
}

#[test]
fn limits_of_a_delta() {
    let (pair, _) = Pair::small(Encoding::Xor);
    let mut options = LoadOptions::default();
    options.limits.index_bytes = 100;
    assert_eq!(Delta::open(&pair.out(), &options).map(|_| ()).unwrap_err().kind(), Limit);
    options = LoadOptions::default();
    options.limits.header_bytes = 100;
    assert_eq!(Delta::open(&pair.out(), &options).map(|_| ()).unwrap_err().kind(), Limit);
}
