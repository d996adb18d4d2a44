//! What adapters add on the GPU: the first factors against the CPU twin, and the products' variants with adapters against
//! f64 sums, where rows without an adapter keep the bits that they have in the variants without.

use super::products::{Operands, formats, groups, reordered, rotated, same_bits, silu};
use super::*;

const NO_ADAPTER: u32 = u32::MAX;

/// The slot of a row: none, ranks 3, 0 and 8 in turns.
fn slot(row: usize) -> u32 {
    [NO_ADAPTER, 0, 1, 2][row % 4]
}

const RANKS: [usize; 3] = [3, 0, 8];

/// What a row is scaled by.
fn scale_of(row: usize) -> f64 {
    SCALES.get(slot(row) as usize).map_or(1.0, |s| f64::from(*s))
}

/// What rows of each slot are scaled by.
const SCALES: [f32; 3] = [0.5, 1.0, 2.0];

/// The buffer of all adapters, as the host lays it out: the table, then what `factors` says of each slot, a before b.
fn arena(stride: usize, factors: [[Vec<f32>; 2]; 3]) -> Vec<u8> {
    let mut words = vec![0u32; lora_down::header_words(RANKS.len())];
    words[0] = stride as u32;
    for (slot, [a, b]) in factors.iter().enumerate() {
        let at = words.len();
        let [a_at, b_at, rank] = [at, at + a.len(), RANKS[slot]].map(|word| word as u32);
        words[4 + 4 * slot..][..4].copy_from_slice(&[a_at, b_at, rank, SCALES[slot].to_bits()]);
        words.extend(a.iter().chain(b).map(|v| v.to_bits()));
    }
    cast_slice(&words).to_vec()
}

#[test]
fn first_factors_on_the_gpu() {
    for device in gpus() {
        for (case, [t, k, parts]) in [[1, 5, 1], [9, 33, 3], [21, 300, 2], [6, 64, 1]].into_iter().enumerate() {
            let mut numbers = Numbers(case as u64 + 3);
            let (first_meta, scale) = (3, [1.0f32, 4.0][case % 2]);
            let stride = 2 + parts * 8;
            let factors = RANKS.map(|rank| [numbers.floats(parts * rank * k), Vec::new()]);
            let x = numbers.floats(t * k);
            let slots: Vec<u32> = (0..first_meta + t).map(slot).collect();
            let untouched = 77u32;
            for half_in in [false, true].into_iter().filter(|half| !half || device.has_f16()) {
                let through = |v: &[f32]| Dtype::F16.to_f32(&Dtype::F16.from_f32(v));
                let seen = if half_in { through(&x) } else { x.clone() };
                let input = if half_in { Dtype::F16.from_f32(&x) } else { bytes(&x) };
                let down = cast_slice(&vec![untouched; t * stride]).to_vec();
                let storage = [input, cast_slice(&slots).to_vec(), arena(stride, factors.clone()), down];
                let (rows, first_meta32) = (t as u32, first_meta as u32);
                let params =
                    lora_down::Params { rows, k: k as u32, first_meta: first_meta32, parts: parts as u32, scale };
                let flags = Flags { half_in, f16: half_in, ..Flags::default() };
                let groups = [t as u32, (parts as u32 * 8).div_ceil(lora_down::COLS), 1];
                let out = device.run_checked(&lora_down::KERNEL, flags, &params, &storage, groups);
                let out: Vec<u32> = pod_collect_to_vec(&out[3]);
                for (row, out) in out.chunks_exact(stride).enumerate() {
                    let slot = slots[first_meta + row];
                    assert_eq!(out[0], slot);
                    let a = factors.get(slot as usize).map_or(&[][..], |[a, _]| a);
                    let count = a.len() / k;
                    let mut want = vec![0.0; count];
                    if count > 0 {
                        let scale = scale * SCALES[slot as usize];
                        lora_down::lora_down(Isa::detect().unwrap(), &seen[row * k..][..k], a, count, scale, &mut want);
                    }
                    let got: Vec<f32> = out[1..=count].iter().map(|bits| f32::from_bits(*bits)).collect();
                    let want: Vec<f64> = want.iter().map(|v| f64::from(*v)).collect();
                    compare(&format!("lora_down T{t} K{k}"), &got, &want, &vec![k as f64 * 4.0; count], Dtype::F32);
                    assert!(out[1 + count..].iter().all(|word| *word == untouched), "beyond what the adapter has");
                }
            }
        }
    }
}

/// The two buffers of a variant with adapters, and what they add: [T, columns] of `part(column)`.
struct Added {
    storage: [Vec<u8>; 2],
    delta: Vec<f64>,
}

fn added(numbers: &mut Numbers, t: usize, columns: usize, parts: usize, part: impl Fn(usize) -> usize) -> Added {
    let stride = 1 + parts * 8;
    let factors = RANKS.map(|rank| [Vec::new(), numbers.floats(rank * columns)]);
    let (mut down, mut delta) = (Vec::new(), vec![0.0; t * columns]);
    for row in 0..t {
        let values = numbers.floats(stride - 1);
        down.push(slot(row));
        down.extend(values.iter().map(|v| v.to_bits()));
        let Some([_, b]) = factors.get(slot(row) as usize) else { continue };
        let rank = RANKS[slot(row) as usize];
        for column in 0..columns {
            let term = |j: usize| f64::from(values[part(column) * rank + j]) * f64::from(b[j * columns + column]);
            delta[row * columns + column] = (0..rank).map(term).sum();
        }
    }
    Added { storage: [arena(stride, factors), cast_slice(&down).to_vec()], delta }
}

/// Runs the variants with and without adapters in every shape. Those with adapters agree to the bit; rows whose adapter adds
/// nothing have the bits of the variants without. Returns the outputs with adapters.
fn run_both<P: Pod>(
    device: &Device,
    kernel: &Kernel,
    [flags, shape]: [Flags; 2],
    params: &P,
    (storage, added, outputs): (&[Vec<u8>], &Added, usize),
    [t, n, k]: [usize; 3],
    plain_row: impl Fn(&[Vec<u8>], usize) -> Vec<u8>,
) -> Vec<Vec<u8>> {
    let mut first: Option<Vec<Vec<u8>>> = None;
    for (i, flags) in same_bits(device, flags, k, n).into_iter().enumerate() {
        let flags = Flags { half_out: shape.half_out, half_kv: shape.half_kv, ..flags };
        let name = format!("{} {flags:?} T{t} N{n} K{k}", kernel.name);
        let plain = device.run(kernel, flags, params, storage, groups(flags, t, n));
        let with = [storage, &added.storage].concat();
        let flags = Flags { adapters: true, ..flags };
        let run = if i == 0 { Device::run_checked } else { Device::run };
        let out = run(device, kernel, flags, params, &with, groups(flags, t, n));
        let written = |buffers: &[Vec<u8>]| buffers[outputs..storage.len()].to_vec();
        for row in (0..t).filter(|row| [NO_ADAPTER, 1].contains(&slot(*row))) {
            assert!(
                plain_row(&written(&plain), row) == plain_row(&written(&out), row),
                "{name}: row {row} has other bits"
            );
        }
        assert!(written(&out) == *first.get_or_insert(written(&out)), "{name}: other bits than in another shape");
    }
    first.unwrap()
}

/// What comes before the sums does not matter here: stored weights and matrix units.
fn few_formats(device: &Device, k: usize) -> Vec<Flags> {
    let few = |f: &Flags| matches!(f.format, Some(Format::Rows(Dtype::F32) | Format::Tiles(16)));
    formats(device, k).into_iter().filter(few).collect()
}

#[test]
fn linear_adds_adapters() {
    for device in gpus() {
        for (case, [t, n, k]) in [[5, 17, 9], [33, 65, 144]].into_iter().enumerate() {
            for flags in few_formats(device, k) {
                let mut numbers = Numbers(case as u64 + 11);
                let (x, w, bias) = (numbers.floats(t * k), numbers.floats(n * k), numbers.floats(n));
                let (before, scale) = (numbers.floats(t * n), [1.0, 4.0][case % 2]);
                let operands = Operands::new(flags, &x, &w, k);
                let params = linear::Params {
                    rows: t as u32,
                    k: k as u32,
                    stride: operands.stride,
                    count: n as u32,
                    first: 0,
                    out_stride: n as u32,
                    has_bias: 1,
                    slice_row: 0,
                    x_first: 0,
                    accumulate: 1,
                    scale,
                };
                let added = added(&mut numbers, t, n, 1, |_| 0);
                let storage = operands.storage(&bias, &[bytes(&before)]);
                let row = |out: &[Vec<u8>], row: usize| out[0][4 * row * n..][..4 * n].to_vec();
                let case = (&storage[..], &added, 4);
                let out = run_both(device, &linear::KERNEL, [flags; 2], &params, case, [t, n, k], row);
                let (sums, sizes) = product(&operands.x, &operands.w, k, None);
                let want = |i: usize| {
                    sums[i] * f64::from(scale) * scale_of(i / n)
                        + added.delta[i]
                        + f64::from(bias[i % n])
                        + f64::from(before[i])
                };
                let want: Vec<f64> = (0..t * n).map(want).collect();
                let sizes: Vec<f64> = sizes.iter().map(|s| 2.0 * s * f64::from(scale) + 10.0).collect();
                compare(&format!("linear {flags:?}"), &floats(&out[0]), &want, &sizes, Dtype::F32);
            }
        }
    }
}

#[test]
fn linear_gated_adds_adapters_before_silu() {
    for device in gpus() {
        for [t, width, k] in [[5, 9, 32], [34, 40, 208]] {
            let n = 2 * width;
            for flags in few_formats(device, k) {
                let mut numbers = Numbers(width as u64);
                let (x, w, bias) = (numbers.floats(t * k), numbers.floats(n * k), numbers.floats(n));
                let operands = Operands::new(flags, &x, &w, k);
                let params = linear_gated::Params {
                    rows: t as u32,
                    k: k as u32,
                    stride: operands.stride,
                    count: n as u32,
                    first: 0,
                    out_stride: width as u32,
                    has_bias: 1,
                    slice_row: 0,
                    x_first: 0,
                    scale: 0.5,
                };
                let added = added(&mut numbers, t, n, 2, |column| column % 2);
                let storage = operands.storage(&bias, &[bytes(&vec![f32::NAN; t * width])]);
                let row = |out: &[Vec<u8>], row: usize| out[0][4 * row * width..][..4 * width].to_vec();
                let case = (&storage[..], &added, 4);
                let out = run_both(device, &linear_gated::KERNEL, [flags; 2], &params, case, [t, n, k], row);
                let (sums, sizes) = product(&operands.x, &operands.w, k, Some(&bias));
                let sums: Vec<f64> = sums.iter().zip(&added.delta).map(|(sum, delta)| sum + delta).collect();
                let of = |(i, p): (usize, &[f64])| silu(p[0]) * p[1] * 0.5 * scale_of(i / width);
                let want: Vec<f64> = sums.chunks_exact(2).enumerate().map(of).collect();
                let sizes: Vec<f64> = sizes.chunks_exact(2).map(|s| (s[0] + 9.0) * (s[1] + 9.0)).collect();
                compare(&format!("linear_gated {flags:?}"), &floats(&out[0]), &want, &sizes, Dtype::F32);
                if device.has_f16() {
                    let half = Flags { f16: true, half_out: true, ..flags };
                    let mut storage = storage.clone();
                    storage[4] = vec![0; 2 * t * width];
                    let row = |out: &[Vec<u8>], row: usize| out[0][2 * row * width..][..2 * width].to_vec();
                    let case = (&storage[..], &added, 4);
                    run_both(
                        device,
                        &linear_gated::KERNEL,
                        [Flags { f16: true, ..flags }, half],
                        &params,
                        case,
                        [t, n, k],
                        row,
                    );
                }
            }
        }
    }
}

#[test]
fn linear_qkv_adds_adapters_before_rope() {
    let [t, heads, kv_heads, head_dim, k] = [21, 4, 2, 6, 48];
    let (rotated_heads, width, n) = (heads + kv_heads, kv_heads * head_dim, (heads + 2 * kv_heads) * head_dim);
    for device in gpus() {
        for flags in few_formats(device, k) {
            let mut numbers = Numbers(5);
            let (x, w, bias) = (numbers.floats(t * k), numbers.floats(n * k), numbers.floats(n));
            let (first_meta, blocks) = (2, 4);
            let rows: Vec<RowMeta> = (0..first_meta + t)
                .map(|i| RowMeta {
                    token: 0,
                    position: i as u32,
                    slot: (i * 37 % (blocks * KV_BLOCK)) as u32,
                    table: 0,
                })
                .collect();
            let cos_sin = random_angles(&mut numbers, first_meta + t, head_dim / 2);
            let order = |row| rotated(row, rotated_heads, head_dim);
            let operands = Operands::new(flags, &x, &reordered(&w, k, order), k);
            let part = |column: usize| match column / head_dim {
                head if head < heads => 0,
                head if head < rotated_heads => 1,
                _ => 2,
            };
            let added = added(&mut numbers, t, n, 3, part);
            // What the formula gives, in the order of the heads.
            let (sums, sizes) = product(&operands.x, &operands.w, k, Some(&reordered(&bias, 1, order)));
            let mut y = vec![0.0; t * n];
            for (i, (sum, delta)) in sums.iter().zip(&added.delta).enumerate() {
                y[i / n * n + order(i % n)] = sum + delta;
            }
            for (row, y) in y.chunks_exact_mut(n).enumerate() {
                let angles = &cos_sin[(first_meta + row) * head_dim..][..head_dim];
                rotate(&mut y[..rotated_heads * head_dim], angles, rotated_heads, head_dim / 2);
            }
            let params = linear_qkv::Params {
                rows: t as u32,
                k: k as u32,
                stride: operands.stride,
                count: n as u32,
                first: 0,
                has_bias: 1,
                slice_row: 0,
                x_first: 0,
                heads: heads as u32,
                kv_heads: kv_heads as u32,
                head_dim: head_dim as u32,
                first_meta: first_meta as u32,
                q_scale: 1.0,
            };
            let empty = bytes(&vec![f32::NAN; blocks * KV_BLOCK * width]);
            let q = bytes(&vec![f32::NAN; t * heads * head_dim]);
            let rest = [cast_slice(&rows).to_vec(), bytes(&cos_sin), q, empty.clone(), empty];
            let storage = operands.storage(&reordered(&bias, 1, order), &rest);
            // A row's queries, keys and values.
            let row = |out: &[Vec<u8>], row: usize| {
                let of = |buffer: usize, at: usize| out[buffer][4 * at..4 * at + 4].to_vec();
                let mut all: Vec<u8> = (0..heads * head_dim).flat_map(|e| of(0, row * heads * head_dim + e)).collect();
                let slot = rows[first_meta + row].slot as usize;
                for at in 0..width {
                    let [key, value] = places((slot / KV_BLOCK) as u32, slot, at, [kv_heads, head_dim]);
                    all.extend([of(1, key), of(2, value)].concat());
                }
                all
            };
            let case = (&storage[..], &added, 6);
            let out = run_both(device, &linear_qkv::KERNEL, [flags; 2], &params, case, [t, n, k], row);
            let most = sizes.iter().fold(0.0f64, |m, s| m.max(*s)) + 9.0;
            for (i, y) in y.chunks_exact(n).enumerate() {
                let got = floats(&row(&out, i));
                let (q, kv) = y.split_at(heads * head_dim);
                let mut want = q.to_vec();
                want.extend((0..width).flat_map(|at| [kv[at], kv[width + at]]));
                let what = format!("linear_qkv {flags:?} row {i}");
                compare(&what, &got, &want, &vec![2.0 * most; want.len()], Dtype::F32);
            }
        }
    }
}
