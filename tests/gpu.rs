//! What only the GPU backend has: bindings that are too small for a weight, and a device that is lost.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;

use std::sync::Arc;

use common::{devices, golden};
use rewardrt::ErrorKind;
use rewardrt::backend::gpu::{Gpu, GpuExecutor, Selection};
use rewardrt::backend::{Capacity, Executor, Output, OutputRow, Step, Want};
use rewardrt::kernels::RowMeta;
use rewardrt::model::{Plan, read_spec};
use rewardrt::weights::{LoadOptions, WeightFormat};

fn gpu(device: &str) -> Gpu {
    Gpu::select(&Selection::parse(device).unwrap()).unwrap().unwrap()
}

fn executor(gpu: Arc<Gpu>, name: &str) -> GpuExecutor {
    let spec = read_spec(&golden(name)).unwrap();
    let plan = Arc::new(Plan::new(&spec).unwrap());
    let weights = plan.load_weights(&spec, &golden(name), &LoadOptions::default()).unwrap();
    GpuExecutor::new(gpu, spec, plan, &weights, WeightFormat::Stored, Capacity { max_rows: 16, kv_blocks: 8 }).unwrap()
}

/// One sequence of twelve tokens; every kind of output.
fn run(executor: &mut GpuExecutor) -> rewardrt::Result<Vec<Output>> {
    let rows: Vec<RowMeta> =
        (0..12).map(|p| RowMeta { token: 7 + 8 * p, position: p, slot: 16 + p, table: 0 }).collect();
    let cos_sin: Vec<f32> = (0..12 * 8).map(|i| ((i * 7 % 13) as f32 / 13.0).cos()).collect();
    let mut outputs: Vec<OutputRow> =
        (0..11).map(|p| OutputRow { row: p, want: Want::Logprob { target: 15 + 8 * p, top: 2 } }).collect();
    outputs.push(OutputRow { row: 11, want: Want::Tokens(Arc::from([3, 99, 50])) });
    executor.step(&Step { rows: &rows, tables: &[1], cos_sin: &cos_sin, outputs: &outputs })
}

/// A weight that does not fit a binding is bound in slices of rows; the results have the same bits.
#[test]
fn split_weights_give_the_same_bits() {
    for device in devices().iter().filter(|d| *d != "cpu") {
        let whole = run(&mut executor(Arc::new(gpu(device)), "llama-tied")).unwrap();
        assert_eq!(whole.len(), 12);
        let mut small = gpu(device);
        // The embedding and head need 9,696 bytes.
        small.limit_bindings(8192);
        let split = run(&mut executor(Arc::new(small), "llama-tied")).unwrap();
        assert_eq!(whole, split);
    }
}

/// A lost device is an error of every later call, not a panic and not a wait.
#[test]
fn a_lost_device_is_an_error() {
    for device in devices().iter().filter(|d| *d != "cpu") {
        let gpu = Arc::new(gpu(device));
        let mut executor = executor(gpu.clone(), "llama-tied");
        run(&mut executor).unwrap();
        gpu.destroy();
        let start = std::time::Instant::now();
        for _ in 0..2 {
            assert_eq!(run(&mut executor).unwrap_err().kind(), ErrorKind::DeviceLost);
        }
        assert!(start.elapsed().as_secs() < 2);
    }
}
