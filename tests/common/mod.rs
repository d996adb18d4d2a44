//! What the whole-library tests share.
#![allow(dead_code)] // Each test binary uses its part.

pub mod adapters;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub mod amx_emulator;
pub mod checkpoints;
pub mod deltas;
pub mod expected;
pub mod updates;

use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

use rewardrt::backend::gpu::MatrixUnits;
use rewardrt::kernels::Isa;
use rewardrt::{Model, ModelOptions, Runtime, RuntimeOptions};

/// The devices to test on: `REWARDRT_TEST_DEVICES`, or the CPU and llvmpipe. A device that is not there fails the
/// test, except that without the variable a missing llvmpipe is skipped with a loud line.
pub fn devices() -> Vec<String> {
    if let Ok(list) = std::env::var("REWARDRT_TEST_DEVICES") {
        return list.split(',').map(str::to_owned).collect();
    }
    let (_, gpus) = rewardrt::devices().unwrap();
    if gpus.iter().any(|d| d.name.contains("llvmpipe")) {
        return vec!["cpu".into(), "gpu:llvmpipe".into()];
    }
    assert!(std::env::var_os("CI").is_none(), "llvmpipe must be there in CI");
    eprintln!("SKIPPED ON gpu: no llvmpipe adapter here (Debian: apt-get install mesa-vulkan-drivers libvulkan1)");
    vec!["cpu".into()]
}

/// With `REWARDRT_TEST_AMX=emulate` every test of this process takes the AMX path, its instructions emulated one by one
/// where the processor has none. They need AVX-512 with BF16 beside them.
pub fn prepare() {
    static PREPARED: Once = Once::new();
    PREPARED.call_once(|| {
        if std::env::var_os("REWARDRT_TEST_AMX").is_none_or(|how| how != "emulate") {
            return;
        }
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        {
            let has = |name: &str| Isa::available().iter().any(|isa| isa.name() == name);
            assert!(has("avx512bf16"), "emulating AMX needs AVX-512 with BF16");
            if !has("amx") {
                amx_emulator::install();
                EMULATES.store(true, Ordering::Relaxed);
            }
            // SAFETY: the processor has the instructions, or the handler just installed does them.
            unsafe { Isa::force("amx") };
        }
    });
}

static EMULATES: AtomicBool = AtomicBool::new(false);

/// True if AMX instructions of this process are emulated.
pub fn emulates_amx() -> bool {
    EMULATES.load(Ordering::Relaxed)
}

/// The instruction sets to test.
pub fn isas() -> Vec<Isa> {
    prepare();
    Isa::available()
}

/// After a device's name: matrix units are emulated on it, in tiles of so many rows.
const EMULATED: [(&str, u32); 2] = [("+emulated", 16), ("+emulated8", 8)];

/// The devices to test on, and llvmpipe with matrix units of either size emulated: for tests that do not mind f16 inputs.
/// Most of the golden models have heads of 8, whose attention only the smaller ones take.
pub fn devices_and_matrix_units() -> Vec<String> {
    let mut all = devices();
    for device in devices().iter().filter(|d| d.contains("llvmpipe")) {
        all.extend(EMULATED.map(|(emulated, _)| format!("{device}{emulated}")));
    }
    all
}

/// Opens one of [`devices_and_matrix_units`].
pub fn open(device: &str, threads: usize) -> Runtime {
    prepare();
    let mut options = RuntimeOptions { threads: Some(threads), ..RuntimeOptions::default() };
    options.device = device.into();
    for (emulated, tile) in EMULATED {
        if let Some(device) = device.strip_suffix(emulated) {
            options.device = device.into();
            options.gpu.matrix_units = MatrixUnits::Emulated(tile);
        }
    }
    Runtime::open(&options).unwrap()
}

/// Options for the small golden models.
pub fn small() -> ModelOptions {
    ModelOptions { kv_tokens: Some(4096), max_context: Some(512), ..ModelOptions::default() }
}

pub fn load(runtime: &Runtime, name: &str, options: &ModelOptions) -> Model {
    runtime.load_model(&golden(name), options).unwrap()
}

pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// SmolLM2, where `make test` puts it; `None` with a loud line if it is not there.
pub fn smollm2() -> Option<PathBuf> {
    let folder = std::env::var_os("REWARDRT_SMOLLM2").map(PathBuf::from);
    let folder = folder.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache/smollm2"));
    if folder.join("config.json").exists() {
        return Some(folder);
    }
    assert!(std::env::var_os("CI").is_none(), "{} must be there in CI", folder.display());
    eprintln!("SKIPPED: no model at {}; `make model` fetches it", folder.display());
    None
}
