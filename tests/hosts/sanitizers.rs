//! That what watches the other tests really watches: a planted leak is found. And valgrind, which sees what ASan cannot.

use std::path::Path;
use std::process::Command;

use super::{compile, compile_sanitized, talking_model, text, without_vulkan};
use crate::common::golden;

/// The library allocates where the sanitizer sees it.
#[test]
fn a_planted_leak_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("leak");
    compile_sanitized("tests/hosts/leak.c", &program);
    let leak =
        |arguments: &[&str]| without_vulkan(&program).arg(golden("llama-gqa-9-3")).args(arguments).output().unwrap();
    let clean = leak(&["clean"]);
    assert!(clean.status.success(), "{}", text(&clean.stderr));
    let leaking = leak(&[]);
    let report = text(&leaking.stderr);
    assert_eq!(text(&leaking.stdout), "ok\n");
    assert!(!leaking.status.success() && report.contains("LeakSanitizer"), "{report}");
    assert!(report.contains("rrt_session_new"), "{report}");
}

/// Reads of uninitialised memory, and leaks inside the library.
#[test]
fn valgrind_finds_nothing() {
    if Command::new("valgrind").arg("--version").output().is_err() {
        assert!(std::env::var_os("CI").is_none(), "valgrind must be there in CI");
        eprintln!("SKIPPED: valgrind is not installed");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (small, talking) = (golden("llama-gqa-9-3"), talking_model(&folder.path().join("model")));
    let (cpu, once) = (Path::new("cpu"), Path::new("1"));
    let valgrind = |name: &str, source: &str, arguments: &[&Path]| {
        let program = folder.path().join(name);
        compile(source, &program, &["-std=c99", "-D_GNU_SOURCE"]);
        without_vulkan("valgrind".as_ref())
            .args(["--leak-check=full", "--error-exitcode=9", "--quiet"])
            .args(["--errors-for-leak-kinds=definite", "--show-leak-kinds=definite"])
            .arg(program)
            .args(arguments)
            .env("ABI_NO_FORK", "1")
            .output()
            .unwrap()
    };
    std::thread::scope(|scope| {
        let careless = scope.spawn(|| valgrind("abi", "tests/hosts/abi.c", &[&small, once]));
        let streams = valgrind("stream", "ffi/examples/stream.c", &[&talking, cpu]);
        assert!(streams.status.success(), "{}", text(&streams.stderr));
        // And it would have found something.
        let leaking = valgrind("leak", "tests/hosts/leak.c", &[&small]);
        assert_eq!(leaking.status.code(), Some(9), "{}", text(&leaking.stderr));
        let careless = careless.join().unwrap();
        assert!(careless.status.success(), "{}", text(&careless.stderr));
    });
}
