//! C and C++ programs against the library as another system links it: strict compilers, sanitizers, symbols, sweeps over every
//! function, the installed package. `make test` builds the library first.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]
#![cfg(target_os = "linux")]

mod common;
#[path = "hosts/header.rs"]
mod header;
#[path = "hosts/installed.rs"]
mod installed;
#[path = "hosts/interface.rs"]
mod interface;
#[path = "hosts/programs.rs"]
mod programs;
#[path = "hosts/sanitizers.rs"]
mod sanitizers;
#[path = "hosts/sweeps.rs"]
mod sweeps;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Once;

use common::golden;
use serde_json::{Map, Value, json};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The folder with librewardrt.so, where this test's own binary is built, and with the name that programs load it by.
fn library() -> PathBuf {
    static LINK: Once = Once::new();
    let folder = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().to_owned();
    let file = folder.join("librewardrt.so");
    assert!(file.exists(), "{} is not there: run `cargo build --release --workspace` first", file.display());
    LINK.call_once(|| {
        assert_fresh(&file);
        let link = folder.join("librewardrt.so.1");
        if !link.exists() {
            std::os::unix::fs::symlink("librewardrt.so", link).unwrap();
        }
    });
    folder
}

/// Fails if a source of the library was changed since it was built: the tests would be of another library. What it was built from
/// cargo has noted beside it, of this crate in `deps`, of all below it in the folder itself.
fn assert_fresh(library: &Path) {
    let built = library.metadata().unwrap().modified().unwrap();
    let folder = library.parent().unwrap();
    let mut seen = BTreeSet::new();
    for notes in [folder.join("deps/rewardrt.d"), folder.join("librewardrt.d")] {
        let text = std::fs::read_to_string(&notes).unwrap_or_else(|e| panic!("{}: {e}", notes.display()));
        let sources = text.lines().filter_map(|line| Some(line.split_once(": ")?.1)).flat_map(str::split_whitespace);
        seen.extend(sources.map(|source| root().join(source)));
    }
    for part in ["ffi/src/lib.rs", "runtime/lib.rs"] {
        assert!(seen.contains(&root().join(part)), "{part} is not in what cargo noted of {}", library.display());
    }
    for source in seen {
        let is_older = source.metadata().and_then(|m| m.modified()).is_ok_and(|changed| changed <= built);
        assert!(
            is_older,
            "{} was changed after {}: run `cargo build --release --workspace` first",
            source.display(),
            library.display()
        );
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}\n{}\n{}", text(&output.stdout), text(&output.stderr));
    output
}

/// Compiles a C or C++ file of this repository, or one at an absolute path, against the library where it was built.
fn compile(source: impl AsRef<Path>, target: &Path, flags: &[&str]) {
    let (library, source) = (library(), source.as_ref());
    let is_cpp = source.extension().is_some_and(|e| e == "cpp");
    let strict = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-g"];
    run(Command::new(if is_cpp { "c++" } else { "cc" })
        .args(strict)
        .args(flags)
        .arg("-I")
        .arg(root().join("ffi/include"))
        .arg(root().join(source))
        .arg("-o")
        .arg(target)
        .arg("-L")
        .arg(&library)
        .args(["-lrewardrt", "-lm", "-pthread", &format!("-Wl,-rpath,{}", library.display())]));
}

/// The same with the address and the undefined-behaviour sanitizer.
fn compile_sanitized(source: impl AsRef<Path>, target: &Path) {
    let standard = if source.as_ref().extension().is_some_and(|e| e == "cpp") { "-std=c++17" } else { "-std=c99" };
    compile(source, target, &[standard, "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-D_GNU_SOURCE"]);
    // That the sanitizers are really in the program, not just asked for.
    let symbols = text(&run(Command::new("nm").arg(target)).stdout);
    for symbol in ["__asan_init", "__ubsan_handle"] {
        assert!(symbols.contains(symbol), "{symbol} is not in {}", target.display());
    }
}

/// Without a Vulkan driver: its own leaks are none of ours.
fn without_vulkan(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env("VK_DRIVER_FILES", "/dev/null").env("VK_ICD_FILENAMES", "/dev/null");
    command
}

/// The golden model llama-wide with a tokenizer of bytes and a chat template, in `folder`.
fn talking_model(folder: &Path) -> PathBuf {
    std::fs::create_dir_all(folder).unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(golden("llama-wide").join(file), folder.join(file)).unwrap();
    }
    std::fs::write(folder.join("tokenizer.json"), tokenizer().to_string()).unwrap();
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";
    std::fs::write(folder.join("tokenizer_config.json"), json!({ "chat_template": template }).to_string()).unwrap();
    folder.to_owned()
}

/// GPT-2's letters for bytes, from id 3 on, and "yes" and "no".
fn tokenizer() -> Value {
    let printable = |b: &u8| matches!(b, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut others = (0x100u32..).filter_map(char::from_u32);
    let letter = |b: u8| if printable(&b) { char::from(b) } else { others.next().unwrap() };
    let mut vocab: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    vocab.extend((0..=u8::MAX).map(letter).map(String::from));
    let merges = [["y", "e"], ["ye", "s"], ["n", "o"]];
    vocab.extend(merges.iter().map(|m| m.concat()));
    let ids: Map<String, Value> = vocab.iter().enumerate().map(|(i, t)| (t.clone(), i.into())).collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let special = |id: usize| {
        json!({"id": id, "content": vocab[id], "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [special(0), special(1), special(2)],
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": ids, "merges": merges},
    })
}
