//! Memory: how weights get to the device, what comes back of a step with many outputs, and how large the KV cache is.

use rewardrt::{ModelOptions, Runtime, RuntimeOptions, UpdateOptions};

use super::*;

/// A copy of a golden model whose checkpoint `change` has changed; it is given the length of the header.
fn changed(name: &str, change: impl Fn(&mut Vec<u8>, usize)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(golden(name).join("config.json"), folder.path().join("config.json")).unwrap();
    let mut bytes = std::fs::read(golden(name).join("model.safetensors")).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    change(&mut bytes, header);
    std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    folder
}

/// The same bits whether the device copies weights from the mapped file or the host stages them; and which way each went.
#[test]
fn imported_weights_are_those_that_are_staged() {
    for device in gpus() {
        let open = |stage_weights| {
            let options = GpuOptions { stage_weights, matrix_units: MatrixUnits::Off, ..GpuOptions::default() };
            Arc::new(gpu_with(&device, &options))
        };
        let (staging, importing) = (open(true), open(false));
        let capacity = Capacity { max_rows: 16, kv_blocks: 8 };
        let mapped = LoadOptions::default();
        let read = LoadOptions { use_mmap: false, ..LoadOptions::default() };
        // Spaces behind the header move every tensor to an address that is even, and no multiple of four.
        let moved = changed("llama-wide", |bytes, header| {
            bytes[..8].copy_from_slice(&(header as u64 + 2).to_le_bytes());
            bytes.splice(8 + header..8 + header, *b"  ");
        });
        let mut imported_bytes = 0;
        for name in ["llama-tied", "llama-wide", "llama-shards", "llama-odd-widths"] {
            let mut staged = load_folder(staging.clone(), &golden(name), &mapped, capacity);
            let mut imported = load_folder(importing.clone(), &golden(name), &mapped, capacity);
            let mut in_memory = load_folder(importing.clone(), &golden(name), &read, capacity);
            let want = staged.run().unwrap();
            assert_eq!(want, imported.run().unwrap(), "{name}");
            assert_eq!(want, in_memory.run().unwrap(), "{name}");
            let all = staged.executor.uploaded_bytes();
            assert_eq!((all.imported, all.refused), (0, 0), "{name}");
            assert_eq!(in_memory.executor.uploaded_bytes(), all, "{name}");
            let some = imported.executor.uploaded_bytes();
            assert_eq!(some.staged + some.imported, all.staged, "{name}");
            imported_bytes += some.imported;
            if name == "llama-wide" && some.imported > 0 {
                // Embedding, head, output and down products, in bf16; the others are reordered.
                assert_eq!(some.imported, 2 * 160 * (700 + 700 + 160 + 400));
                let mut refused = load_folder(importing.clone(), moved.path(), &mapped, capacity);
                assert_eq!(want, refused.run().unwrap());
                let refused = refused.executor.uploaded_bytes();
                assert_eq!((refused.staged, refused.imported), (all.staged, 0));
                assert_eq!(refused.refused, some.imported);
            }
        }
        if imported_bytes == 0 {
            eprintln!("SKIPPED ON {device}: importing the host's memory, which the driver lacks or refuses");
            assert!(!device.contains("llvmpipe"));
        }
    }
}

/// Every kind of output that is read back block by block, `count` of them on the rows of one sequence.
fn many(count: usize, rows: usize) -> Vec<OutputRow> {
    let all: Arc<[u32]> = (0..700).collect();
    let want = |i: usize| match i % 3 {
        0 => Want::Tokens(all.clone()),
        1 => Want::Logprob { target: (i % 700) as u32, top: 128 },
        _ => {
            let uniform = (0.37 + 0.61 * i as f32).fract();
            let request = sample::Request { uniform, kept_ids: 1024, ..sample::Request::default() };
            Want::Sample(Box::new(Sampling { request, edits: Vec::new(), mask: None, top: 5 }))
        }
    };
    (0..count).map(|i| OutputRow { row: (i % rows) as u32, want: want(i) }).collect()
}

/// What a step reads back at a time is bounded, however many outputs it has.
#[test]
fn many_outputs_are_read_back_in_parts() {
    const ROWS: usize = 64;
    const OUTPUTS: usize = 1500;
    for device in gpus() {
        let mut small = gpu(&device);
        // All outputs together are 7 MB: a third has 700 logits, 128 alternatives, or 1024 kept ids.
        small.limit_buffers(3 << 20);
        let mut loaded = load_with(Arc::new(small), "llama-wide", Capacity { max_rows: OUTPUTS, kv_blocks: 8 });
        let row = |p: u32| RowMeta { token: 7 + 8 * p, position: p, slot: p, table: 0 };
        let rows: Vec<RowMeta> = (0..ROWS as u32).map(row).collect();
        let cos_sin = angles(ROWS, loaded.head_dim);
        let outputs = many(OUTPUTS, ROWS);
        let mut run = |outputs: &[OutputRow]| {
            let step = Step { rows: &rows, tables: &[0, 1, 2, 3], cos_sin: &cos_sin, outputs, adapters: &[] };
            loaded.executor.step(&step).unwrap()
        };
        let together = run(&outputs);
        assert_eq!(together.len(), OUTPUTS);
        // In steps of a few: nothing of them needs parts.
        for (outputs, together) in outputs.chunks(100).zip(together.chunks(100)) {
            assert_eq!(run(outputs), together);
        }
        let is_whole = |output: &Output| match output {
            Output::Logits(logits) => logits.len() == 700,
            Output::Logprob(stats) => stats.top.len() == 128,
            Output::Sampled { drawn, kept_ids, stats } => {
                kept_ids.len() == 700 && kept_ids.contains(&drawn.token) && stats.top.len() == 5
            }
        };
        assert!(together.iter().all(is_whole));
    }
}

/// A cache of f16 has room for twice the positions in the same memory; where f16 is of no use after all, for those of f32.
#[test]
fn the_kv_cache_is_counted_as_it_is_held() {
    for device in gpus() {
        if emulating(&device).is_none() {
            continue;
        }
        // A weight that f16 cannot hold, at the end of the last tensor of the file.
        let too_large = changed("llama-tied", |bytes, _| {
            let at = bytes.len() - 2;
            bytes[at..].copy_from_slice(&half::bf16::from_f32(1e6).to_le_bytes());
        });
        let load = |matrix_units, folder: &Path, options: &ModelOptions| {
            let gpu = GpuOptions { matrix_units, ..GpuOptions::default() };
            let runtime = Runtime::open(&RuntimeOptions { device: device.clone(), gpu, ..Default::default() }).unwrap();
            runtime.load_model(folder, options)
        };
        let model = golden("llama-tied");
        let fixed = load(MatrixUnits::Off, &model, &ModelOptions { kv_tokens: Some(256), ..Default::default() });
        let fixed = fixed.unwrap().memory();
        let a_position = fixed.kv_cache / 256;
        let budget = fixed.allocated() - fixed.kv_cache + 1000 * a_position;
        let options = ModelOptions { memory: Some(budget), ..ModelOptions::default() };
        // Whole blocks; tiles of weights take some of the room.
        for (matrix_units, folder, positions, element) in [
            (MatrixUnits::Off, &*model, 992..=992, 4),
            (MatrixUnits::Emulated(16), &*model, 1800..=2000, 2),
            (MatrixUnits::Emulated(16), too_large.path(), 992..=992, 4),
        ] {
            let model = load(matrix_units, folder, &options).unwrap();
            let held = model.kv_tokens();
            assert!(positions.contains(&held), "{matrix_units:?}: {held} positions");
            assert_eq!(model.stats().kv_blocks, held / KV_BLOCK);
            assert_eq!(model.memory().kv_cache, held as u64 * a_position / 4 * element);
            assert!(model.memory().allocated() <= budget, "{matrix_units:?}");
        }
        // What fits as f16 alone is refused where it must be f32.
        let options = ModelOptions { kv_tokens: Some(1800), ..options };
        let half = load(MatrixUnits::Emulated(16), &model, &options).unwrap();
        assert_eq!(half.kv_tokens(), 1792);
        let refused = load(MatrixUnits::Emulated(16), too_large.path(), &options).map(|m| m.kv_tokens()).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Limit);
        // Also where such weights come later: those that are there stay.
        let mut update = half.update(&UpdateOptions::default()).unwrap();
        update.put_files(too_large.path()).unwrap();
        let refused = update.commit(1).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Limit, "{refused}");
        drop(update);
        assert_eq!((half.weights_version(), half.memory().kv_cache), (0, 1792 * a_position / 2));
    }
}
