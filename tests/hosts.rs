//! C programs against the shared library: strict compilers, sanitizers, symbols. `make test` builds the library first.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]
#![cfg(target_os = "linux")]

mod common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::checkpoints::{save, tensors, trained};
use common::{golden, smollm2};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The folder with librewardrt.so: where this test's own binary is built.
fn library() -> PathBuf {
    let folder = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().to_owned();
    let file = folder.join("librewardrt.so");
    assert!(file.exists(), "{} is not there: run `cargo build --release --workspace` first", file.display());
    folder
}

fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{command:?}\n{}\n{}", text(&output.stdout), text(&output.stderr));
    output
}

fn compile(source: &str, target: &Path, flags: &[&str]) {
    let library = library();
    let strict = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-g"];
    run(Command::new("cc")
        .args(strict)
        .args(flags)
        .arg("-I")
        .arg(root().join("ffi/include"))
        .arg(root().join(source))
        .arg("-o")
        .arg(target)
        .arg("-L")
        .arg(&library)
        .args(["-lrewardrt", &format!("-Wl,-rpath,{}", library.display())]));
}

const SANITIZERS: [&str; 4] =
    ["-std=c99", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-D_GNU_SOURCE"];

fn compile_sanitized(source: &str, target: &Path) {
    compile(source, target, &SANITIZERS);
    // That the sanitizer is really in the program, not just asked for.
    let symbols = run(Command::new("nm").arg(target));
    assert!(String::from_utf8_lossy(&symbols.stdout).contains("__asan_init"), "ASan is not in {}", target.display());
}

#[test]
fn the_header_compiles_alone_in_every_standard() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("twice.c");
    let text = "#include \"rewardrt.h\"\n#include \"rewardrt.h\"\n\
        rrt_open_opts a = RRT_OPEN_OPTS_INIT; rrt_model_opts b = RRT_MODEL_OPTS_INIT;\n\
        rrt_sample_req c = RRT_SAMPLE_REQ_INIT; rrt_score_req d = RRT_SCORE_REQ_INIT;\n\
        rrt_update_opts e = RRT_UPDATE_OPTS_INIT; rrt_tensor_desc f = RRT_TENSOR_DESC_INIT;\n\
        rrt_adapter_opts g = RRT_ADAPTER_OPTS_INIT;\n";
    std::fs::write(&source, text).unwrap();
    for (compiler, language, standard) in [
        ("cc", "c", "c99"),
        ("cc", "c", "c11"),
        ("cc", "c", "c17"),
        ("cc", "c", "c2x"),
        ("c++", "c++", "c++11"),
        ("c++", "c++", "c++17"),
        ("c++", "c++", "c++20"),
    ] {
        run(Command::new(compiler)
            .args(["-x", language, &format!("-std={standard}"), "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-c"])
            .arg("-I")
            .arg(root().join("ffi/include"))
            .arg(&source)
            .arg("-o")
            .arg(folder.path().join("twice.o")));
    }
}

#[test]
fn exported_symbols_are_the_prototypes() {
    let symbols = run(Command::new("nm").args(["-D", "--defined-only"]).arg(library().join("librewardrt.so")));
    let exported: BTreeSet<String> = String::from_utf8_lossy(&symbols.stdout)
        .lines()
        .filter_map(|line| line.split_whitespace().last().map(str::to_owned))
        .collect();
    let header = std::fs::read_to_string(root().join("ffi/include/rewardrt.h")).unwrap();
    let declared: BTreeSet<String> = header
        .lines()
        .filter(|line| !line.starts_with([' ', '/', '*', '#']) && !line.starts_with("typedef"))
        .filter_map(|line| line.split_once('(')?.0.split([' ', '*']).next_back().map(str::to_owned))
        .filter(|name| name.starts_with("rrt_"))
        .collect();
    assert!(declared.len() >= 45, "{declared:?}");
    assert_eq!(exported, declared);
}

#[test]
fn a_careless_host_gets_errors() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("abi");
    compile_sanitized("tests/hosts/abi.c", &program);
    // Without a Vulkan driver: its own leaks are none of ours.
    let output = run(without_vulkan(&program).arg(golden("llama-gqa-9-3")));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "ok\n");
}

#[test]
fn the_example_samples_and_scores() {
    let Some(model) = smollm2() else { return };
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("sample_and_score");
    compile_sanitized("ffi/examples/sample_and_score.c", &program);
    let output = run(Command::new(&program).arg(&model).arg("cpu"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(text.lines().filter(|l| l.starts_with("yes 0.")).count(), 4, "{text}");
    assert!(text.contains("Paris"), "{text}");
}

#[test]
fn the_example_takes_new_weights() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("update");
    compile_sanitized("ffi/examples/update.c", &program);
    let next = folder.path().join("next");
    save(&trained(&tensors(&golden("llama-gqa-9-3")), 1), &golden("llama-gqa-9-3"), &next);
    let output = run(without_vulkan(&program).arg(golden("llama-gqa-9-3")).arg(&next).arg("cpu"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 3, "{text}");
    let tokens = |i: usize| lines[i].strip_prefix(&format!("version {i}:")).unwrap();
    assert!(tokens(0) != tokens(1) && tokens(1) != tokens(2), "{text}");
}

/// Valgrind sees what ASan cannot: reads of uninitialised memory, and leaks inside the library.
#[test]
fn valgrind_finds_nothing() {
    if Command::new("valgrind").arg("--version").output().is_err() {
        assert!(std::env::var_os("CI").is_none(), "valgrind must be there in CI");
        eprintln!("SKIPPED: valgrind is not installed");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("abi");
    compile("tests/hosts/abi.c", &program, &["-std=c99", "-D_GNU_SOURCE"]);
    let kinds = ["--errors-for-leak-kinds=definite", "--show-leak-kinds=definite"];
    run(without_vulkan(Path::new("valgrind"))
        .args(["--leak-check=full", "--error-exitcode=9", "--quiet"])
        .args(kinds)
        .arg(&program)
        .arg(golden("llama-gqa-9-3"))
        .env("ABI_NO_FORK", "1"));
}

fn without_vulkan(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env("VK_DRIVER_FILES", "/dev/null").env("VK_ICD_FILENAMES", "/dev/null");
    command
}
