//! Deltas between checkpoints: right to the last bit, and readable by and from what slime uses.
//!
//! tests/delta holds checkpoints and deltas that make.py wrote with safetensors, zstandard and xxhash.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::deltas::{ENCODINGS, Pair, Tensors, applied, changed, checkpoint, open, random, read, write};
use rewardrt::ErrorKind::{Argument, Format, NotFound, Shape, Unsupported};
use rewardrt::weights::{
    Checkpoint, Delta, DeltaOptions, DeltaReport, Dtype, Encoding, LoadOptions, publish, write_delta,
};

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
    for element in new.get_mut("w").unwrap().2.chunks_exact_mut(2).filter(|_| next().is_multiple_of(100)) {
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
