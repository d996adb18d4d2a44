//! The shared library exports `rrt_` functions alone: llguidance and zstd, which are linked in, have C functions of their own.

fn main() {
    if std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux" || os == "android" || os.ends_with("bsd")) {
        println!("cargo::rustc-cdylib-link-arg=-Wl,--exclude-libs,ALL");
    }
    println!("cargo::rerun-if-changed=build.rs");
}
