//! Hosts in C and C++: what a careless one gets, what every function does, and the examples.

use std::path::Path;
use std::process::Command;

use super::{compile_sanitized, root, run, talking_model, text, without_vulkan};
use crate::common::checkpoints::{save, tensors, trained};
use crate::common::{golden, smollm2};

/// Compiles with the sanitizers and runs; what it prints.
fn host(source: impl AsRef<Path>, arguments: &[&Path]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("host");
    compile_sanitized(source, &program);
    text(&run(without_vulkan(&program).args(arguments)).stdout)
}

#[test]
fn a_careless_host_gets_errors() {
    assert_eq!(host("tests/hosts/abi.c", &[&golden("llama-gqa-9-3")]), "ok\n");
}

#[test]
fn every_function_does_what_the_header_says() {
    let folder = tempfile::tempdir().unwrap();
    let model = talking_model(&folder.path().join("model"));
    let classifier = golden("llama-labels-3");
    for program in ["sampling", "events", "scoring", "adapters"] {
        let source = format!("tests/hosts/features/{program}.c");
        assert_eq!(host(source, &[&model, &classifier]), "ok\n", "{program}");
    }
    let next = folder.path().join("next");
    save(&trained(&tensors(&model), 1), &model, &next);
    let followed = folder.path().join("followed");
    std::fs::create_dir(&followed).unwrap();
    assert_eq!(host("tests/hosts/features/upkeep.c", &[&model, &classifier, &next, &followed]), "ok\n");
}

#[test]
fn the_example_samples_and_scores() {
    let Some(model) = smollm2() else { return };
    let text = host("ffi/examples/sample_and_score.c", &[&model, Path::new("cpu")]);
    assert_eq!(text.lines().filter(|l| l.starts_with("yes 0.")).count(), 4, "{text}");
    assert!(text.contains("Paris"), "{text}");
}

#[test]
fn the_example_streams() {
    // A model whose steps take a while: a tiny one may be done before its host looks.
    let Some(model) = smollm2() else { return };
    let text = host("ffi/examples/stream.c", &[&model, Path::new("cpu")]);
    let ended = text.lines().filter(|l| l.starts_with("answer ")).count();
    assert_eq!(ended, 3, "{text}");
    // In pieces, not at once.
    assert!(text.lines().filter(|l| l.starts_with("[1]")).count() > 1, "{text}");
}

#[test]
fn the_example_takes_new_weights() {
    let folder = tempfile::tempdir().unwrap();
    let next = folder.path().join("next");
    save(&trained(&tensors(&golden("llama-gqa-9-3")), 1), &golden("llama-gqa-9-3"), &next);
    let text = host("ffi/examples/update.c", &[&golden("llama-gqa-9-3"), &next, Path::new("cpu")]);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 3, "{text}");
    let tokens = |i: usize| lines[i].strip_prefix(&format!("version {i}:")).unwrap();
    assert!(tokens(0) != tokens(1) && tokens(1) != tokens(2), "{text}");
}

#[test]
fn the_example_rolls_out() {
    let folder = tempfile::tempdir().unwrap();
    let model = talking_model(&folder.path().join("model"));
    let text = host("ffi/examples/rollout.c", &[&model, &model, Path::new("cpu")]);
    let answers: Vec<Vec<f64>> = text
        .lines()
        .filter(|l| l.starts_with("prompt "))
        .map(|l| l.split_whitespace().filter_map(|w| w.parse().ok()).collect())
        .collect();
    assert_eq!(answers.len(), 8, "{text}");
    // GRPO's formula, of what it printed.
    for group in answers.chunks(4) {
        let mean = group.iter().map(|a| a[1]).sum::<f64>() / 4.0;
        let std = (group.iter().map(|a| (a[1] - mean).powi(2)).sum::<f64>() / 3.0).sqrt();
        for a in group {
            let (want, slack) = ((a[1] - mean) / (std + 1e-4), 1e-4 / (std + 1e-4) + 1e-3);
            assert!((a[2] - want).abs() < slack, "{a:?}: {want}\n{text}");
        }
    }
    assert_eq!(text.lines().filter(|l| l.starts_with("group ")).count(), 2, "{text}");
}

#[test]
fn the_example_serves() {
    let text = host("ffi/examples/serve.cpp", &[&golden("llama-gqa-9-3"), Path::new("cpu"), Path::new("12")]);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 3, "{text}");
    for line in lines {
        assert_eq!(line.split_whitespace().count(), 25, "{text}");
        assert!(line.ends_with(" RRT_OK"), "{text}");
    }
}

/// The program of docs/c.md.
#[test]
fn the_pages_program_runs() {
    let folder = tempfile::tempdir().unwrap();
    let page = std::fs::read_to_string(root().join("docs/c.md")).unwrap();
    let program = page.split("```c\n").nth(1).unwrap().split("```").next().unwrap();
    let source = folder.path().join("page.c");
    std::fs::write(&source, program).unwrap();
    let model = talking_model(&folder.path().join("model"));
    let printed = host(&source, &[&model]);
    assert_eq!(printed.lines().count(), 4, "{printed}");
    assert!(printed.lines().all(|line| line.contains("reward")), "{printed}");
}

/// Loaded by hand and unloaded, twice: nothing of it is left that runs.
#[test]
fn the_library_can_be_unloaded() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("unload");
    run(Command::new("cc")
        .args(["-std=c99", "-Wall", "-Wextra", "-Werror", "-g", "-D_GNU_SOURCE", "-I"])
        .arg(root().join("ffi/include"))
        .arg(root().join("tests/hosts/unload.c"))
        .arg("-o")
        .arg(&program)
        .args(["-ldl", "-pthread"]));
    let library = super::library().join("librewardrt.so");
    let output = run(without_vulkan(&program).arg(library).arg(golden("llama-gqa-9-3")));
    assert_eq!(text(&output.stdout), "ok\n");
}
