//! The library as `make install` leaves it: found by pkg-config and by CMake, shared and static.

use std::path::Path;
use std::process::Command;

use super::{library, root, run, talking_model, text, without_vulkan};
use crate::common::golden;

/// Installs under DESTDIR, as a packager does, and moves it to where PREFIX says.
fn install(prefix: &Path) {
    let staging = tempfile::tempdir_in(prefix.parent().unwrap()).unwrap();
    run(Command::new(root().join("scripts/install")).arg(prefix).arg(library()).env("DESTDIR", staging.path()));
    let staged = staging.path().join(prefix.strip_prefix("/").unwrap());
    assert!(!prefix.exists());
    std::fs::rename(staged, prefix).unwrap();
}

fn pkg_config(prefix: &Path, arguments: &[&str]) -> Vec<String> {
    let output = run(Command::new("pkg-config")
        .args(arguments)
        .arg("rewardrt")
        .env("PKG_CONFIG_PATH", prefix.join("lib/pkgconfig")));
    text(&output.stdout).split_whitespace().map(str::to_owned).collect()
}

#[test]
fn programs_find_the_installed_library() {
    let folder = tempfile::tempdir().unwrap();
    let prefix = folder.path().join("usr");
    install(&prefix);
    let model = talking_model(&folder.path().join("model"));
    let source = root().join("ffi/examples/stream.c");
    assert_eq!(pkg_config(&prefix, &["--modversion"]), ["1.0"]);

    // The shared library, by its soname.
    let program = folder.path().join("shared");
    run(Command::new("cc")
        .args(["-std=c99", "-Wall", "-Werror"])
        .arg(&source)
        .arg("-o")
        .arg(&program)
        .args(pkg_config(&prefix, &["--cflags", "--libs"])));
    let needed = text(&run(Command::new("readelf").arg("-d").arg(&program)).stdout);
    assert!(needed.contains("librewardrt.so.1"), "{needed}");
    run(without_vulkan(&program).arg(&model).arg("cpu").env("LD_LIBRARY_PATH", prefix.join("lib")));

    // The static library, with what it needs of the system.
    let program = folder.path().join("static");
    let mut libraries = pkg_config(&prefix, &["--cflags", "--libs", "--static"]);
    libraries.iter_mut().filter(|l| *l == "-lrewardrt").for_each(|l| *l = "-l:librewardrt.a".into());
    run(Command::new("cc").args(["-std=c99"]).arg(&source).arg("-o").arg(&program).args(libraries));
    let needed = text(&run(Command::new("readelf").arg("-d").arg(&program)).stdout);
    assert!(!needed.contains("librewardrt"), "{needed}");
    run(without_vulkan(&program).arg(&model).arg("cpu"));

    cmake(&prefix, folder.path());
}

/// A project that asks for version 1.0 finds both targets; one that asks for 2.0 finds nothing.
fn cmake(prefix: &Path, folder: &Path) {
    if Command::new("cmake").arg("--version").output().is_err() {
        assert!(std::env::var_os("CI").is_none(), "cmake must be there in CI");
        eprintln!("SKIPPED: cmake is not installed");
        return;
    }
    let project = folder.join("project");
    std::fs::create_dir(&project).unwrap();
    let lists = format!(
        "cmake_minimum_required(VERSION 3.10)\nproject(host CXX)\nfind_package(rewardrt ${{WANTED}} REQUIRED)\n\
         find_package(Threads REQUIRED)\nset(CMAKE_CXX_STANDARD 17)\n\
         foreach(kind rewardrt static)\n  add_executable(serve_${{kind}} {})\n  \
         target_link_libraries(serve_${{kind}} rewardrt::${{kind}} Threads::Threads)\nendforeach()\n",
        root().join("ffi/examples/serve.cpp").display()
    );
    std::fs::write(project.join("CMakeLists.txt"), lists).unwrap();
    let configure = |wanted: &str| {
        let mut command = Command::new("cmake");
        command.arg("-S").arg(&project).arg("-B").arg(folder.join(wanted));
        command.arg(format!("-DCMAKE_PREFIX_PATH={}", prefix.display())).arg(format!("-DWANTED={wanted}"));
        command
    };
    run(&mut configure("1.0"));
    run(Command::new("cmake").arg("--build").arg(folder.join("1.0")).args(["--parallel", "2"]));
    for program in ["serve_rewardrt", "serve_static"] {
        let output =
            run(without_vulkan(&folder.join("1.0").join(program)).arg(golden("llama-gqa-9-3")).args(["cpu", "3"]));
        assert_eq!(text(&output.stdout).lines().count(), 3);
    }
    for wanted in ["1.9", "2.0", "0.9"] {
        assert!(!configure(wanted).output().unwrap().status.success(), "{wanted}");
    }
}
