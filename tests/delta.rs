//! Deltas between checkpoints: right to the last bit, readable by and from what slime uses, and refused when damaged.
//!
//! tests/delta holds checkpoints and deltas that make.py wrote with safetensors, zstandard and xxhash.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rewardrt::weights::{
    Checkpoint, Delta, DeltaOptions, DeltaReport, Dtype, Encoding, LoadOptions, publish, write_delta,
};
use rewardrt::{Error, ErrorKind};
use serde_json::{Value, json};

use ErrorKind::{Argument, Format, Limit, NotFound, Shape, Unsupported};

const INDEX: &str = "model.safetensors.index.json";
const FILE: &str = "model-00000-of-00001.safetensors";

/// Dtype, shape, bytes.
type Tensors = BTreeMap<String, (String, Vec<usize>, Vec<u8>)>;

/// A safetensors file with this `__metadata__`.
fn file(metadata: &Value, tensors: &Tensors) -> Vec<u8> {
    let mut header = json!({"__metadata__": metadata});
    let mut data = Vec::new();
    for (name, (dtype, shape, bytes)) in tensors {
        let ends = [data.len(), data.len() + bytes.len()];
        header[name] = json!({"dtype": dtype, "shape": shape, "data_offsets": ends});
        data.extend_from_slice(bytes);
    }
    let header = header.to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
}

fn parts(file: &[u8]) -> (Value, Tensors) {
    let (length, rest) = file.split_first_chunk().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let header: BTreeMap<String, Value> = serde_json::from_slice(header).unwrap();
    let number = |v: &Value| v.as_u64().unwrap() as usize;
    let mut tensors = Tensors::new();
    for (name, entry) in header.iter().filter(|(name, _)| *name != "__metadata__") {
        let shape = entry["shape"].as_array().unwrap().iter().map(number).collect();
        let bytes = data[number(&entry["data_offsets"][0])..number(&entry["data_offsets"][1])].to_vec();
        tensors.insert(name.clone(), (entry["dtype"].as_str().unwrap().into(), shape, bytes));
    }
    (header.get("__metadata__").cloned().unwrap_or_default(), tensors)
}

fn read(path: &Path) -> Tensors {
    parts(&std::fs::read(path).unwrap()).1
}

fn write(path: &Path, tensors: &Tensors) -> PathBuf {
    std::fs::write(path, file(&json!({"format": "pt"}), tensors)).unwrap();
    path.to_owned()
}

/// The checkpoint that `delta` makes of `base`.
fn applied(delta: &Delta, base: &Tensors) -> Result<Tensors, Error> {
    let mut result = base.clone();
    for tensor in delta.tensors() {
        let (_, _, bytes) = &base[tensor.name];
        let mut out = vec![0xaa; bytes.len()];
        delta.apply(tensor.name, bytes, &mut out)?;
        result.get_mut(tensor.name).unwrap().2 = out;
    }
    Ok(result)
}

fn open(folder: &Path) -> Result<Delta, Error> {
    let mapped = Delta::open(folder, &LoadOptions::default());
    let read = Delta::open(folder, &LoadOptions { use_mmap: false, ..LoadOptions::default() });
    assert_eq!(mapped.as_ref().err().map(Error::kind), read.as_ref().err().map(Error::kind));
    mapped
}

/// Numbers that look random, the same in every run.
fn random(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed;
    move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        state >> 33
    }
}

/// Weights of every dtype and of odd sizes.
fn checkpoint() -> Tensors {
    let mut next = random(1);
    let mut tensors = Tensors::new();
    let shapes: [(&str, &[usize]); 5] =
        [("matrix", &[37, 129]), ("row", &[1001]), ("one", &[1]), ("scalar", &[]), ("empty", &[0, 4])];
    for dtype in Dtype::ALL {
        for (name, shape) in shapes {
            let values: Vec<f32> =
                (0..shape.iter().product::<usize>()).map(|_| (next() % 2001) as f32 / 1e5 - 0.01).collect();
            tensors.insert(
                format!("{}.{name}", dtype.name()),
                (dtype.name().into(), shape.to_vec(), dtype.from_f32(&values)),
            );
        }
    }
    // A quantised checkpoint has bytes; the same for half an MiB, so that a frame has several parts and blocks.
    tensors.insert("bytes".into(), ("U8".into(), vec![7], (0..7).collect()));
    tensors.insert("large".into(), ("I8".into(), vec![600_001], (0..600_001).map(|_| next() as u8).collect()));
    tensors
}

/// Changes one byte in `every`.
fn changed(old: &Tensors, every: u64) -> Tensors {
    let (mut next, mut new) = (random(2), old.clone());
    for (_, (_, _, bytes)) in new.iter_mut().filter(|(name, _)| !name.ends_with("row")) {
        for byte in bytes {
            if next() % every == 0 {
                *byte ^= 1 + (next() % 255) as u8;
            }
        }
    }
    new
}

struct Pair {
    folder: tempfile::TempDir,
    old: PathBuf,
    new: PathBuf,
}

impl Pair {
    fn new(old: &Tensors, new: &Tensors) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (old, new) =
            (write(&folder.path().join("old.safetensors"), old), write(&folder.path().join("new.safetensors"), new));
        Pair { folder, old, new }
    }

    fn out(&self) -> PathBuf {
        self.folder.path().join("delta")
    }

    fn write(&self, options: &DeltaOptions) -> Result<DeltaReport, Error> {
        write_delta(&self.old, &self.new, &self.out(), options, |_, _| {})
    }

    /// A delta of small tensors, to be damaged.
    fn small(encoding: Encoding) -> (Self, Tensors) {
        let old: Tensors = BTreeMap::from([
            ("a".into(), ("BF16".into(), vec![8, 50], (0..800).map(|i| (i * 7) as u8).collect())),
            ("b".into(), ("F32".into(), vec![3], vec![1; 12])),
        ]);
        let mut new = old.clone();
        new.values_mut().for_each(|(_, _, bytes)| bytes.iter_mut().step_by(9).for_each(|b| *b = !*b));
        let pair = Pair::new(&old, &new);
        pair.write(&DeltaOptions { encoding, ..DeltaOptions::default() }).unwrap();
        (pair, old)
    }

    fn edit_index(&self, change: impl FnOnce(&mut Value)) {
        let path = self.out().join(INDEX);
        let mut index = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut index);
        std::fs::write(path, index.to_string()).unwrap();
    }

    fn edit_file(&self, change: impl FnOnce(&mut Value, &mut Tensors)) {
        let path = self.out().join(FILE);
        let (mut metadata, mut tensors) = parts(&std::fs::read(&path).unwrap());
        change(&mut metadata, &mut tensors);
        std::fs::write(path, file(&metadata, &tensors)).unwrap();
    }

    /// Replaces the frame of "a".
    fn edit_frame(&self, change: impl FnOnce(&[u8]) -> Vec<u8>) {
        self.edit_file(|_, tensors| {
            let (_, shape, bytes) = tensors.get_mut("a").unwrap();
            *bytes = change(bytes);
            *shape = vec![bytes.len()];
        });
    }
}

const ENCODINGS: [Encoding; 2] = [Encoding::Xor, Encoding::Overwrite];

#[test]
fn a_delta_gives_the_new_checkpoint_bit_for_bit() {
    let old = checkpoint();
    for (every, encoding) in [1, 3, 50].into_iter().flat_map(|every| ENCODINGS.map(|encoding| (every, encoding))) {
        let new = changed(&old, every);
        let pair = Pair::new(&old, &new);
        let options = DeltaOptions { encoding, base_version: 6, version: 7, ..DeltaOptions::default() };
        let mut seen = Vec::new();
        let report = write_delta(&pair.old, &pair.new, &pair.out(), &options, |done, total| seen.push((done, total)));
        let report = report.unwrap();
        let bytes: usize = old.values().map(|(_, _, bytes)| bytes.len()).sum();
        assert!(seen.is_sorted() && seen.last() == Some(&(bytes as u64, bytes as u64)), "{seen:?}");

        let delta = open(&pair.out()).unwrap();
        assert_eq!((delta.base_version(), delta.version()), (6, 7));
        let differ = old.iter().filter(|(name, tensor)| new[*name] != **tensor).map(|(name, _)| name.as_str());
        let differ: Vec<_> = differ.collect();
        assert!(differ.contains(&"BF16.matrix") && !differ.contains(&"F32.row") && !differ.contains(&"F16.empty"));
        assert_eq!(delta.tensors().map(|t| t.name).collect::<Vec<_>>(), differ);
        for tensor in delta.tensors() {
            let (dtype, shape, _) = &old[tensor.name];
            assert_eq!((tensor.layout, tensor.encoding), (Some((dtype.clone(), &shape[..])), encoding));
        }
        assert!(applied(&delta, &old).unwrap() == new, "{encoding:?}, a byte in {every}");
        let size: u64 =
            std::fs::read_dir(pair.out()).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
        let want = DeltaReport {
            tensors: old.len(),
            changed: differ.len(),
            unchanged: old.len() - differ.len(),
            bytes_old: bytes as u64,
            bytes_delta: size,
        };
        assert_eq!(report, want);
        delta.check_base(&Checkpoint::open(&pair.old, &LoadOptions::default()).unwrap()).unwrap();
        // Applied to what it made, `overwrite` changes nothing; `xor` would take it back, and does not pass.
        match encoding {
            Encoding::Overwrite => assert!(applied(&delta, &new).unwrap() == new),
            Encoding::Xor => assert_eq!(applied(&delta, &new).unwrap_err().kind(), Format),
        }
    }
}

#[test]
fn threads_and_files_do_not_change_what_is_in_a_delta() {
    let old = checkpoint();
    let new = changed(&old, 20);
    let files = |threads, file_bytes| {
        let pair = Pair::new(&old, &new);
        pair.write(&DeltaOptions { threads, file_bytes, ..DeltaOptions::default() }).unwrap();
        assert!(applied(&open(&pair.out()).unwrap(), &old).unwrap() == new);
        let names = std::fs::read_dir(pair.out()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        names.map(|name| (name.clone(), std::fs::read(pair.out().join(name)).unwrap())).collect::<BTreeMap<_, _>>()
    };
    assert_eq!(files(Some(1), 1 << 30), files(Some(3), 1 << 30));
    let many = files(None, 10_000);
    assert!(many.len() > 4 && many.contains_key(&format!("model-00000-of-{:05}.safetensors", many.len() - 1)));
    assert_eq!(many, files(Some(2), 10_000));
    // One file a tensor that changed.
    assert_eq!(files(None, 0).len(), old.iter().filter(|(name, tensor)| new[*name] != **tensor).count() + 1);
}

#[test]
fn nothing_changed() {
    let old = checkpoint();
    let pair = Pair::new(&old, &old);
    let report = pair.write(&DeltaOptions::default()).unwrap();
    assert_eq!((report.changed, report.unchanged), (0, old.len()));
    let delta = open(&pair.out()).unwrap();
    assert_eq!(delta.tensors().count(), 0);
    assert_eq!(std::fs::read_dir(pair.out()).unwrap().count(), 1, "the index alone");
}

/// Steps of an optimiser as they look in bf16: one element in a hundred moves by one unit in the last place.
#[test]
fn one_percent_of_a_bf16_checkpoint() {
    let mut next = random(3);
    let values: Vec<f32> = (0..2 << 20).map(|_| (next() % 65536) as f32 / 1e6 - 0.03).collect();
    let old: Tensors = BTreeMap::from([("w".into(), ("BF16".into(), vec![1024, 2048], Dtype::BF16.from_f32(&values)))]);
    let mut new = old.clone();
    for element in new.get_mut("w").unwrap().2.chunks_exact_mut(2).filter(|_| next() % 100 == 0) {
        element[0] = element[0].wrapping_add(1);
    }
    for (encoding, bound) in [(Encoding::Xor, 0.02), (Encoding::Overwrite, 0.025)] {
        let pair = Pair::new(&old, &new);
        let begin = std::time::Instant::now();
        let report = pair.write(&DeltaOptions { encoding, ..DeltaOptions::default() }).unwrap();
        let written = begin.elapsed();
        let delta = open(&pair.out()).unwrap();
        let mut out = vec![0; old["w"].2.len()];
        let begin = std::time::Instant::now();
        delta.apply("w", &old["w"].2, &mut out).unwrap();
        let ratio = report.bytes_delta as f64 / report.bytes_old as f64;
        println!(
            "{}: {} of {} bytes ({:.2} %), written in {written:.0?}, applied in {:.1?}",
            encoding.name(),
            report.bytes_delta,
            report.bytes_old,
            100.0 * ratio,
            begin.elapsed()
        );
        assert!(out == new["w"].2 && ratio < bound, "{ratio}");
    }
}

#[test]
fn what_slime_writes_is_read() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/delta");
    let mut state = read(&folder.join("state_0.safetensors"));
    for (version, encoding, count) in [(1, Encoding::Xor, 5), (2, Encoding::Overwrite, 5), (3, Encoding::Xor, 0)] {
        let delta = open(&folder.join(format!("weight_v{version:06}"))).unwrap();
        assert_eq!((delta.base_version(), delta.version()), (version - 1, version));
        assert!(
            delta
                .tensors()
                .all(|t| t.encoding == encoding && t.layout.is_none() && !["same", "empty"].contains(&t.name))
        );
        assert_eq!(delta.tensors().count(), count);
        let base = folder.join(format!("state_{}.safetensors", version - 1));
        delta.check_base(&Checkpoint::open(&base, &LoadOptions::default()).unwrap()).unwrap();
        state = applied(&delta, &state).unwrap();
        assert!(state == read(&folder.join(format!("state_{version}.safetensors"))), "version {version}");
    }
}

#[test]
fn what_is_a_delta() {
    let (pair, _) = Pair::small(Encoding::Xor);
    let options = LoadOptions::default();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    assert!(Delta::is_delta(&pair.out(), &options).unwrap());
    for whole in ["llama-shards", "llama-tied"] {
        assert!(!Delta::is_delta(&golden.join(whole), &options).unwrap(), "{whole}");
    }
    assert_eq!(Delta::is_delta(Path::new("/nowhere"), &options).unwrap_err().kind(), NotFound);
    let e = open(&golden.join("llama-shards")).map(|_| ()).unwrap_err();
    assert!(e.kind() == Format && e.to_string().contains("a whole checkpoint, not a delta"), "{e}");
    assert_eq!(open(&golden.join("llama-tied")).map(|_| ()).unwrap_err().kind(), NotFound);
    let e = Checkpoint::open(&pair.out(), &options).map(|_| ()).unwrap_err();
    assert!(e.kind() == Unsupported && e.to_string().contains("a delta between checkpoints"), "{e}");
}

#[test]
fn a_delta_follows_its_base_alone() {
    let (pair, old) = Pair::small(Encoding::Xor);
    let delta = open(&pair.out()).unwrap();
    // Another base of the same shapes, other shapes and dtypes, a tensor less.
    let mut other = old.clone();
    other.get_mut("a").unwrap().2[799] ^= 1;
    let e = applied(&delta, &other).unwrap_err();
    assert!(e.kind() == Format && e.to_string().contains("the base is another one, or the delta is damaged"), "{e}");
    other = old.clone();
    other.insert("a".into(), ("BF16".into(), vec![50, 8], vec![0; 800]));
    other.remove("b");
    other.insert("c".into(), ("F32".into(), vec![3], vec![0; 12]));
    let base = Checkpoint::open(&write(&pair.folder.path().join("x.safetensors"), &other), &LoadOptions::default());
    let e = delta.check_base(&base.unwrap()).unwrap_err();
    assert_eq!(e.kind(), Shape);
    let says = "the delta does not fit the base (2 differences):\n  tensor \"a\" is BF16 [50, 8] in the base, BF16 [8, 50] \
                in the delta\n  tensor \"b\" is not in the base";
    assert_eq!(e.to_string(), says);

    let fails = |name: &str, base: usize, out: usize, kind, says: &str| {
        let e = delta.apply(name, &vec![0; base], &mut vec![0; out]).unwrap_err();
        assert!(e.kind() == kind && e.to_string().contains(says), "{e}");
    };
    fails("a", 799, 799, Shape, "model-00000-of-00001.safetensors: tensor \"a\": it has 799 bytes in the base, 800");
    fails("a", 800, 801, Argument, "`out` has 801 bytes, the tensor 800");
    fails("c", 12, 12, NotFound, "tensor \"c\" is not in the delta to version 1");
}

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

#[test]
fn checkpoints_that_do_not_match() {
    let old = checkpoint();
    let mut new = old.clone();
    new.remove("bytes");
    new.insert("more".into(), ("U8".into(), vec![1], vec![0]));
    new.get_mut("BF16.matrix").unwrap().1 = vec![129, 37];
    new.get_mut("F16.one").unwrap().0 = "BF16".into();
    let pair = Pair::new(&old, &new);
    let e = pair.write(&DeltaOptions::default()).unwrap_err();
    assert_eq!(e.kind(), Shape);
    for says in [
        "differ in more than their bytes (4 differences)",
        "tensor \"bytes\" is in the old one alone",
        "tensor \"more\" is in the new one alone",
        "tensor \"BF16.matrix\" is BF16 [37, 129], then BF16 [129, 37]",
        "tensor \"F16.one\" is F16 [1], then BF16 [1]",
    ] {
        assert!(e.to_string().contains(says), "{e}\ndoes not say {says:?}");
    }
    assert_eq!(std::fs::read_dir(pair.folder.path()).unwrap().count(), 2, "nothing is left behind");
}

#[test]
fn options_that_cannot_be() {
    let (old, options) = (checkpoint(), DeltaOptions::default());
    let pair = Pair::new(&old, &changed(&old, 9));
    let fails = |out: &Path, options: DeltaOptions, says: &str| {
        let e = write_delta(&pair.old, &pair.new, out, &options, |_, _| {}).unwrap_err();
        assert!(e.kind() == Argument && e.to_string().contains(says), "{e}\ndoes not say {says:?}");
    };
    let out = pair.out();
    fails(&out, DeltaOptions { base_version: 1, ..options.clone() }, "base version is 1, it must be below the version");
    for level in [0, -1, 20] {
        fails(&out, DeltaOptions { level, ..options.clone() }, "it must be from 1 to 19");
    }
    fails(&out, DeltaOptions { threads: Some(0), ..options.clone() }, "threads is 0");
    fails(pair.folder.path(), options.clone(), "it exists; name a folder that does not");
    fails(&pair.folder.path().join("weight_v000002"), options.clone(), "it must be \"weight_v000001\"");
    let named = pair.folder.path().join("weight_v000001");
    write_delta(&pair.old, &pair.new, &named, &options, |_, _| {}).unwrap();
    fails(&named, options, "it exists");
    assert_eq!(std::fs::read_dir(pair.folder.path()).unwrap().count(), 3, "nothing is left behind");
}

#[test]
fn publishing_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let (partial, step) = (folder.path().join(".step_1"), folder.path().join("step_1"));
    std::fs::create_dir_all(partial.join("inner")).unwrap();
    std::fs::write(partial.join("config.json"), "{}").unwrap();
    std::fs::write(partial.join("inner/file"), "x").unwrap();
    publish(&partial, &step).unwrap();
    assert!(!partial.exists() && step.join("inner/file").exists());
    std::fs::create_dir(&partial).unwrap();
    let e = publish(&partial, &step).unwrap_err();
    assert!(e.kind() == Argument && e.to_string().contains("it exists"), "{e}");
    assert_eq!(publish(&folder.path().join("nothing"), &folder.path().join("step_2")).unwrap_err().kind(), NotFound);
}
