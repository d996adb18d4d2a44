//! Weights that come through the file system: deltas, folders that are followed, and processes killed on the way.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::checkpoints::{Owned, save, tensors, trained};
use common::updates::{fingerprint, fresh};
use common::{devices, golden, load, open, small};
use rewardrt::weights::{DeltaOptions, Encoding, PartialFolder, write_delta};
use rewardrt::{
    ErrorKind, FollowOptions, InFlight, LogprobRequest, Model, ModelOptions, Require, Storage, UpdateOptions,
};

const NAME: &str = "llama-gqa-9-3";

/// Step n of a training run.
fn step(n: u64) -> Vec<Owned> {
    let base = tensors(&golden(NAME));
    if n == 0 { base } else { trained(&base, n as u32) }
}

/// Of every hundredth value a bit flips: what a step of training does to a 16-bit checkpoint.
fn touched(tensors: &[Owned], salt: usize) -> Vec<Owned> {
    let change = |(i, t): (usize, &Owned)| {
        let mut new = t.clone();
        let size = t.dtype.size();
        for at in (salt..t.bytes.len() / size).step_by(100 + i % 3) {
            new.bytes[at * size] ^= 1;
        }
        new
    };
    tensors.iter().enumerate().map(change).collect()
}

fn loaded(device: &str, tensors: &[Owned]) -> Model {
    fresh(device, tensors, NAME, &small())
}

/// A chain of deltas comes to the same bits as the checkpoints it stands for.
#[test]
fn deltas_equal_full_loads() {
    let work = tempfile::tempdir().unwrap();
    let at = |name: &str| work.path().join(name);
    let states: Vec<Vec<Owned>> = {
        let first = step(0);
        let second = touched(&first, 3);
        let third = touched(&second, 7);
        vec![first, second, third]
    };
    for (i, state) in states.iter().enumerate() {
        save(state, &golden(NAME), &at(&format!("full-{i}")));
    }
    for encoding in [Encoding::Xor, Encoding::Overwrite] {
        for i in 0..2u64 {
            let options = DeltaOptions { encoding, base_version: i, version: i + 1, ..DeltaOptions::default() };
            let (old, new) = (at(&format!("full-{i}")), at(&format!("full-{}", i + 1)));
            let report = write_delta(&old, &new, &at(&format!("{encoding:?}-{}", i + 1)), &options, |_, _| {}).unwrap();
            println!("{encoding:?}: {} of {} bytes", report.bytes_delta, report.bytes_old);
        }
        for device in devices() {
            for storage in [Storage::Shadow, Storage::InPlace] {
                let how = UpdateOptions { storage, ..UpdateOptions::default() };
                let model = load(&open(&device, 2), NAME, &small());
                let mut late = model.update(&UpdateOptions::default()).ok();
                if let Some(late) = late.as_mut().filter(|_| storage == Storage::Shadow) {
                    // The second delta does not fit the first state.
                    let error = late.put_delta(&at(&format!("{encoding:?}-2"))).unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
                    assert!(
                        error.to_string().contains("from version 1 to 2") && error.to_string().contains("version 0")
                    );
                }
                drop(late);
                for i in 1..=2u64 {
                    let mut update = model.update(&how).unwrap();
                    assert_eq!(update.put_delta(&at(&format!("{encoding:?}-{i}"))).unwrap(), i);
                    update.commit(i).unwrap();
                    let expected = fingerprint(&loaded(&device, &states[i as usize]));
                    assert_eq!(fingerprint(&model), expected, "{device} {encoding:?} {storage:?} {i}");
                }
            }
        }
    }
}

/// A delta that was tampered with, or that is for other weights of the same version, changes nothing.
#[test]
fn wrong_deltas_are_refused() {
    let work = tempfile::tempdir().unwrap();
    let at = |name: &str| work.path().join(name);
    save(&step(0), &golden(NAME), &at("old"));
    save(&touched(&step(0), 1), &golden(NAME), &at("new"));
    write_delta(&at("old"), &at("new"), &at("delta"), &DeltaOptions::default(), |_, _| {}).unwrap();
    let other = loaded("cpu", &step(5));
    let before = fingerprint(&other);
    let mut update = other.update(&UpdateOptions::default()).unwrap();
    let error = update.put_delta(&at("delta")).unwrap_err();
    assert!(error.is_input() && error.to_string().contains("xxh3-128"), "{error}");
    // The update is as it was: whole tensors still can come.
    for tensor in step(6) {
        update.put(&tensor.data()).unwrap();
    }
    update.commit(1).unwrap();
    assert_ne!(fingerprint(&other), before);
    let model = load(&open("cpu", 2), NAME, &small());
    let before = fingerprint(&model);
    let file = std::fs::read_dir(at("delta")).unwrap().map(|e| e.unwrap().path());
    let file = file.filter(|p| p.extension().is_some_and(|e| e == "safetensors")).min().unwrap();
    let bytes = std::fs::read(&file).unwrap();
    for from_end in [1, 5, 40] {
        let mut tampered = bytes.clone();
        let at_byte = tampered.len() - from_end;
        tampered[at_byte] ^= 0x10;
        std::fs::write(&file, &tampered).unwrap();
        let mut update = model.update(&UpdateOptions::default()).unwrap();
        let error = update.put_delta(&at("delta")).unwrap_err();
        assert!(error.to_string().contains("delta"), "{error}");
        drop(update);
        assert_eq!(fingerprint(&model), before);
    }
}

/// Saves a step's checkpoint as a trainer does.
fn publish(dir: &Path, n: u64) {
    let folder = PartialFolder::create(&dir.join(format!("step_{n}"))).unwrap();
    save(&step(n), &golden(NAME), folder.path());
    folder.publish().unwrap();
}

fn fast() -> FollowOptions {
    let update = UpdateOptions { in_flight: InFlight::Keep, ..UpdateOptions::default() };
    FollowOptions { interval: Duration::from_millis(5), update }
}

#[test]
fn a_folder_is_followed() {
    for device in devices() {
        let dir = tempfile::tempdir().unwrap();
        let model = load(&open(&device, 2), NAME, &small());
        let wait = Duration::from_secs(60);
        publish(dir.path(), 1);
        let follower = model.follow(dir.path(), &fast()).unwrap();
        follower.wait_for(1, wait).unwrap();
        assert_eq!(fingerprint(&model), fingerprint(&loaded(&device, &step(1))), "{device}");
        // What is not complete, or no step, is left alone.
        for name in ["step_9.partial-1", "step_x", "other", "step_"] {
            save(&step(9), &golden(NAME), &dir.path().join(name));
        }
        let half = dir.path().join("step_8");
        std::fs::create_dir(&half).unwrap();
        let whole = std::fs::read(dir.path().join("other/model.safetensors")).unwrap();
        std::fs::write(half.join("model.safetensors"), &whole[..whole.len() / 2]).unwrap();
        publish(dir.path(), 2);
        publish(dir.path(), 3);
        std::thread::sleep(Duration::from_millis(50));
        let error = follower.last_error().unwrap();
        assert!(error.to_string().contains("step_8"), "{error}");
        std::fs::remove_dir_all(&half).unwrap();
        follower.wait_for(3, wait).unwrap();
        // Wherever a version came from.
        follower.wait_for(2, Duration::ZERO).unwrap();
        assert_eq!(fingerprint(&model), fingerprint(&loaded(&device, &step(3))), "{device}");
        // A delta leads on.
        let options = DeltaOptions { base_version: 3, version: 4, ..DeltaOptions::default() };
        let next = tempfile::tempdir().unwrap();
        save(&touched(&step(3), 2), &golden(NAME), next.path());
        write_delta(&dir.path().join("step_3"), next.path(), &dir.path().join("step_4"), &options, |_, _| {}).unwrap();
        follower.wait_for(4, wait).unwrap();
        assert_eq!(fingerprint(&model), fingerprint(&loaded(&device, &touched(&step(3), 2))), "{device}");
        assert!(follower.last_error().is_none() && follower.updates() >= 3);
        drop(follower);
        publish(dir.path(), 5);
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(model.weights_version(), 4, "nobody follows any more");
    }
    let model = load(&open("cpu", 1), NAME, &small());
    let zero = FollowOptions { interval: Duration::ZERO, ..fast() };
    let error = model.follow(&std::env::temp_dir(), &zero).map(|_| ()).unwrap_err();
    assert!(error.kind() == ErrorKind::Argument && error.to_string().contains("interval is 0"), "{error}");
    let error = model.follow(Path::new("/nowhere"), &fast()).map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

const CHILD: &str = "REWARDRT_TEST_CHILD";

/// Not a test of its own: what the processes do that [`killed_at_any_time`] kills.
#[test]
fn child() {
    let Ok(what) = std::env::var(CHILD) else { return };
    let (role, dir) = what.split_once(' ').unwrap();
    let dir = Path::new(dir);
    match role {
        // A trainer that begins where the last one was killed.
        "save" => {
            let mut n = newest(dir) + 1;
            loop {
                publish(dir, n);
                n += 1;
            }
        }
        // A runtime that follows it, and says what it computes under which version.
        _ => {
            let model = load(&open("cpu", 1), NAME, &small());
            let _follower = model.follow(dir, &fast()).unwrap();
            loop {
                let texts = LogprobRequest { sequences: vec![(6..30).collect()], ..LogprobRequest::default() };
                let got = model.logprobs(&texts).unwrap().wait().unwrap().remove(0);
                let bits: Vec<String> = got.logprobs.iter().flatten().map(|l| format!("{:08x}", l.to_bits())).collect();
                let line = format!("{} {}\n", got.weight_version, bits.concat());
                std::io::stdout().write_all(line.as_bytes()).unwrap();
            }
        }
    }
}

fn newest(dir: &Path) -> u64 {
    let number =
        |e: std::io::Result<std::fs::DirEntry>| e.unwrap().file_name().to_str()?.strip_prefix("step_")?.parse().ok();
    std::fs::read_dir(dir).unwrap().filter_map(number).max().unwrap_or(0)
}

/// A trainer is killed while it saves and a runtime while it updates, a hundred times at random moments: what can be found
/// is a whole step, and what was computed belongs to the version that it names.
#[test]
fn killed_at_any_time() {
    const ROUNDS: usize = 100;
    let dir = tempfile::tempdir().unwrap();
    let spawn = |role: &str| {
        Command::new(std::env::current_exe().unwrap())
            .args(["child", "--exact", "--nocapture", "--test-threads=1"])
            .env(CHILD, format!("{role} {}", dir.path().display()))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    };
    let (mut seen, mut random) = (std::collections::BTreeMap::new(), 12345u32);
    for _ in 0..ROUNDS {
        let (mut saver, mut runtime) = (spawn("save"), spawn("follow"));
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        std::thread::sleep(Duration::from_micros(u64::from(random % 80_000)));
        saver.kill().unwrap();
        runtime.kill().unwrap();
        saver.wait().unwrap();
        let lines: Vec<String> = BufReader::new(runtime.stdout.take().unwrap()).lines().map_while(Result::ok).collect();
        runtime.wait().unwrap();
        for line in lines {
            // The last line may be cut.
            let Some((version, bits)) = line.split_once(' ').filter(|(_, bits)| bits.len() == 8 * 23) else { continue };
            let Ok(version) = version.parse::<u64>() else { continue };
            let known = seen.entry(version).or_insert_with(|| bits.to_owned());
            assert_eq!(known, bits, "version {version} computed two things");
        }
        let n = newest(dir.path());
        if n > 0 {
            assert!(tensors(&dir.path().join(format!("step_{n}"))) == step(n), "step {n} is not whole");
        }
        // Old steps go, as a trainer's would.
        for entry in std::fs::read_dir(dir.path()).unwrap() {
            let path = entry.unwrap().path();
            if path != dir.path().join(format!("step_{n}")) {
                std::fs::remove_dir_all(path).unwrap();
            }
        }
    }
    println!("{ROUNDS} rounds, {} steps saved, {} versions computed with", newest(dir.path()), seen.len());
    assert!(seen.len() > 1 && newest(dir.path()) > 1);
    for (version, bits) in seen {
        let texts = LogprobRequest { sequences: vec![(6..30).collect()], ..LogprobRequest::default() };
        let got = loaded("cpu", &step(version)).logprobs(&texts).unwrap().wait().unwrap().remove(0);
        let expected: Vec<String> = got.logprobs.iter().flatten().map(|l| format!("{:08x}", l.to_bits())).collect();
        assert_eq!(bits, expected.concat(), "version {version}");
    }
}

/// Some tensors by delta, and a limit that the delta's tensors exceed.
#[test]
fn deltas_keep_to_the_memory_budget() {
    let work = tempfile::tempdir().unwrap();
    save(&touched(&step(0), 1), &golden(NAME), &work.path().join("new"));
    write_delta(&golden(NAME), &work.path().join("new"), &work.path().join("d"), &DeltaOptions::default(), |_, _| {})
        .unwrap();
    let held = load(&open("cpu", 1), NAME, &small()).memory().allocated();
    let model = load(&open("cpu", 1), NAME, &ModelOptions { memory: Some(held + 1000), ..small() });
    let mut update = model.update(&UpdateOptions { require: Require::Subset, ..UpdateOptions::default() }).unwrap();
    let error = update.put_delta(&work.path().join("d")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Limit, "{error}");
}
