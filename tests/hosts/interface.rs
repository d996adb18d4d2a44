//! The header and the library, compared with each other, with what was released, and with every language standard.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;
use std::process::Command;

use super::header::{HEADER, constants, functions, functions_of, initialiser_bodies, initialisers, sized_structs};
use super::{compile, library, root, run, text, without_vulkan};
use crate::common::golden;

const STANDARDS: [(&str, &str, &str); 7] = [
    ("cc", "c", "c99"),
    ("cc", "c", "c11"),
    ("cc", "c", "c17"),
    ("cc", "c", "c2x"),
    ("c++", "c++", "c++11"),
    ("c++", "c++", "c++17"),
    ("c++", "c++", "c++20"),
];

/// Alone, twice in one file and in two files that are linked, with every initialiser, without a warning.
#[test]
fn the_header_compiles_alone_in_every_standard() {
    let folder = tempfile::tempdir().unwrap();
    let mut first = "#include \"rewardrt.h\"\n#include \"rewardrt.h\"\n".to_owned();
    let with_initialisers: BTreeSet<String> = initialisers().into_iter().map(|(_, name)| name).collect();
    assert!(with_initialisers.len() >= 10 && with_initialisers.is_subset(&sized_structs()), "{with_initialisers:?}");
    for (name, kind) in initialisers() {
        writeln!(first, "{kind} make_{kind}(void) {{ {kind} x = {name}; return x; }}").unwrap();
    }
    let files = [("one", first), ("two", "#include \"rewardrt.h\"\nint main(void) { return RRT_OK; }\n".to_owned())];
    for (name, text) in &files {
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    std::thread::scope(|scope| {
        for (compiler, language, standard) in STANDARDS {
            let folder = folder.path();
            scope.spawn(move || {
                run(Command::new(compiler)
                    .args(["-x", language, &format!("-std={standard}"), "-Wall", "-Wextra", "-Wpedantic", "-Werror"])
                    .arg("-Wno-missing-field-initializers")
                    .arg("-I")
                    .arg(root().join("ffi/include"))
                    .args([folder.join("one"), folder.join("two")])
                    .arg("-o")
                    .arg(folder.join(standard)));
            });
        }
    });
}

fn exported() -> BTreeSet<String> {
    let symbols = run(Command::new("nm").args(["-D", "--defined-only"]).arg(library().join("librewardrt.so")));
    text(&symbols.stdout).lines().filter_map(|line| line.split_whitespace().last().map(str::to_owned)).collect()
}

/// ffi/abi/symbols.txt changes only when somebody means it.
#[test]
fn exported_symbols_are_the_list_and_the_prototypes() {
    let list = std::fs::read_to_string(root().join("ffi/abi/symbols.txt")).unwrap();
    let listed: BTreeSet<String> = list.lines().map(str::to_owned).collect();
    let declared: BTreeSet<String> = functions().into_iter().map(|f| f.name).collect();
    assert!(listed.iter().all(|name| name.starts_with("rrt_")), "{listed:?}");
    assert_eq!(declared, listed, "the header's prototypes and ffi/abi/symbols.txt");
    assert_eq!(exported(), listed, "the library's symbols and ffi/abi/symbols.txt");
}

/// Numbers are append-only: what ffi/abi/constants.txt says stays as it is.
#[test]
fn constants_have_the_numbers_that_they_had() {
    let folder = tempfile::tempdir().unwrap();
    let mut source = "#include <stdio.h>\n#include \"rewardrt.h\"\nint main(void) {\n".to_owned();
    for name in constants() {
        writeln!(source, "    printf(\"{name} %lld\\n\", (long long){name});").unwrap();
    }
    let file = folder.path().join("constants.c");
    std::fs::write(&file, source + "    return 0;\n}\n").unwrap();
    let program = folder.path().join("constants");
    compile(&file, &program, &["-std=c99"]);
    let pinned = std::fs::read_to_string(root().join("ffi/abi/constants.txt")).unwrap();
    assert!(pinned.lines().count() > 90);
    assert_eq!(text(&run(&mut Command::new(&program)).stdout), pinned);
}

/// Every function writes `err`, and comes last with it.
#[test]
fn the_header_keeps_its_own_rules() {
    let without = ["rrt_abi_check"];
    for f in functions() {
        if f.returns == "rrt_status" && !without.contains(&f.name.as_str()) {
            let last = f.parameters.last().unwrap();
            assert_eq!((last.kind.as_str(), last.name.as_str()), ("rrt_error*", "err"), "{}", f.name);
        }
        let by_value =
            f.parameters.iter().find(|p| !p.is_pointer() && p.kind.starts_with("rrt_") && p.kind != "rrt_status");
        assert!(by_value.is_none(), "{} takes a struct by value", f.name);
        assert!(f.parameters.iter().all(|p| p.kind != "int" && p.kind != "long" && p.kind != "bool"), "{}", f.name);
    }
}

/// A program that was compiled with the header of ABI 1.0 runs with this library.
#[test]
fn the_first_header_still_works() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("v1_0");
    let library = library();
    run(Command::new("cc")
        .args(["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-g", "-I"])
        .arg(root().join("ffi/abi/v1.0"))
        .arg(root().join("tests/hosts/v1_0.c"))
        .arg("-o")
        .arg(&program)
        .arg("-L")
        .arg(&library)
        .args(["-lrewardrt", "-lm", &format!("-Wl,-rpath,{}", library.display())]));
    let output = run(without_vulkan(&program).arg(golden("llama-gqa-9-3")));
    assert_eq!(text(&output.stdout), "ok\n");
}

/// What the first header declares, functions that return nothing included, is declared in the same way now; initialisers have grown
/// at their end at most.
#[test]
fn the_first_headers_declarations_are_still_there() {
    let old = std::fs::read_to_string(Path::new(root()).join("ffi/abi/v1.0/rewardrt.h")).unwrap();
    let now = functions();
    let (before, inits) = (functions_of(&old), initialiser_bodies(&old));
    assert!(before.iter().any(|f| f.name == "rrt_model_free") && before.iter().any(|f| f.name == "rrt_open_opts_init"));
    for function in before {
        assert!(now.contains(&function), "{function:?}\nis now {:?}", now.iter().find(|f| f.name == function.name));
    }
    let bodies = initialiser_bodies(HEADER);
    assert!(inits.len() >= 10, "{}", inits.len());
    for (name, body) in inits {
        let fields = body.strip_suffix(" }").unwrap();
        let same = |(n, b): &(String, String)| {
            *n == name && b.strip_prefix(fields).is_some_and(|rest| rest.starts_with([' ', ',']))
        };
        assert!(bodies.iter().any(same), "{name} was {body}");
    }
}
