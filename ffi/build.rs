//! How the shared library is linked.

/// The ABI's major version: a program linked with one of it loads any other of it, and no other.
const ABI_MAJOR: u32 = 1;

fn main() {
    let os = std::env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    if os == "linux" || os == "android" || os.ends_with("bsd") {
        // It exports `rrt_` functions alone: llguidance and zstd, which are linked in, have C functions of their own.
        println!("cargo::rustc-cdylib-link-arg=-Wl,--exclude-libs,ALL");
        println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,librewardrt.so.{ABI_MAJOR}");
    } else if os == "macos" {
        println!("cargo::rustc-cdylib-link-arg=-Wl,-install_name,@rpath/librewardrt.{ABI_MAJOR}.dylib");
    }
    println!("cargo::rerun-if-changed=build.rs");
}
