//! Attention on matrix units: the twin against the formula, the shader against the twin, and the same bits however the rows
//! are cut; and a software model of the shader's tiling, with the same index expressions.

use half::f16;
use rewardrt::backend::gpu::{MatrixUnits, TileShape, tiled_attention};
use rewardrt::kernels::attention::{SEGMENT, first_key};
use rewardrt::kernels::attention_tiles::{self as tiled, Inputs, Tiles};

use super::attention_twins::{Paged, Sequences};
use super::*;

/// A call as matrix units read it. What nobody sees is NaN among the keys, and large among the values.
struct Halves {
    paged: Paged,
    q: Vec<f16>,
    keys: Vec<f16>,
    values: Vec<f16>,
}

impl Halves {
    fn new(shape: [usize; 3], window: Option<usize>, sequences: Sequences) -> Halves {
        let mut paged = Paged::new(shape, window, sequences);
        let scale = tiled::query_scale(paged.head_dim);
        let halves = |values: &[f32]| values.iter().map(|v| f16::from_f32(*v)).collect::<Vec<f16>>();
        let q = halves(&paged.q.iter().map(|q| q * scale).collect::<Vec<f32>>());
        let keys = halves(&paged.keys);
        let stale = |(i, v): (usize, &f32)| if v.is_nan() { [30_000.0, -30_000.0][i % 2] } else { *v };
        let values = halves(&paged.values.iter().enumerate().map(stale).collect::<Vec<f32>>());
        // For the formula: what was rounded.
        paged.q = q.iter().map(|q| q.to_f32() / scale).collect();
        paged.keys = keys.iter().map(|v| v.to_f32()).collect();
        paged.values = values.iter().map(|v| v.to_f32()).collect();
        Halves { paged, q, keys, values }
    }

    fn only(&self, rows: std::ops::Range<usize>) -> Halves {
        let width = self.paged.heads * self.paged.head_dim;
        let q = self.q[rows.start * width..rows.end * width].to_vec();
        Halves { paged: self.paged.only(rows), q, keys: self.keys.clone(), values: self.values.clone() }
    }

    fn inputs(&self) -> Inputs<'_> {
        let Paged { ref rows, ref tables, heads, kv_heads, head_dim, window, .. } = self.paged;
        Inputs { rows, tables, q: &self.q, keys: &self.keys, values: &self.values, heads, kv_heads, head_dim, window }
    }

    fn twin(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.q.len()];
        tiled::attention_tiles(self.inputs(), &mut out);
        out
    }

    fn tiles(&self, tile: usize) -> Tiles {
        tiled::tiles(&self.paged.rows, self.paged.heads / self.paged.kv_heads, tile, self.paged.head_dim)
    }

    fn rows_alone(&self) -> Tiles {
        Tiles { narrow: (0..self.paged.rows.len() as u32).map(|row| [row, 1]).collect(), wide: Vec::new() }
    }

    /// Every row in a wide tile.
    fn rows_together(&self, tile: usize) -> Tiles {
        tiled::tiles(&self.paged.rows, 0, tile, self.paged.head_dim)
    }

    fn segments(&self) -> usize {
        attention::segments(&self.paged.rows, &self.rows_alone().narrow, self.paged.window)
    }
}

/// Values are below 1, but for those that nobody sees.
fn near(what: &str, got: &[f32], want: &[f32], most: f32) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= most, "{what} [{i}]: {got}, not {want}");
    }
}

const SHORT: Sequences = &[&[15, 16, 17], &[0], &[62, 63, 64, 65, 66, 67]];
const LONG: Sequences = &[&[15, 16, 17], &[1023, 1024, 1025], &[63, 64, 65], &[0, 1], &[2500]];
const LONE: Sequences = &[&[1022, 1023, 1024, 1025], &[17]];

/// H/G, G, E, window: every group of 1 to 8 and more than a tile has; heads of 8 to the largest.
fn cases(tile: usize, run: impl Fn(&str, Halves)) {
    let prefill: Vec<usize> = (0..140).collect();
    let cases: [(usize, usize, usize, Option<usize>, Sequences); 16] = [
        (1, 1, 8, None, SHORT),
        (3, 2, 8, None, LONG),
        (4, 1, 16, Some(17), LONG),
        (7, 1, 16, Some(1000), LONG),
        (20, 1, 16, Some(64), LONE),
        (1, 2, 64, Some(1), SHORT),
        (3, 1, 64, None, &[&prefill, &[5, 6]]),
        (2, 1, 32, Some(50), &[&prefill]),
        (7, 2, 64, Some(64), SHORT),
        (5, 1, 80, None, SHORT),
        (8, 1, 96, Some(40), &[&prefill[..70]]),
        (6, 2, 128, None, LONE),
        (3, 1, 48, None, SHORT),
        (3, 1, 144, None, SHORT),
        (20, 1, 256, Some(17), SHORT),
        (2, 1, 512, None, SHORT),
    ];
    for (group, kv_heads, head_dim, window, sequences) in cases {
        if head_dim % tile == 0 {
            let what = format!("tiles of {tile}, {group} heads E{head_dim} window {window:?}");
            run(&what, Halves::new([group, kv_heads, head_dim], window, sequences));
        }
    }
}

#[test]
fn the_twin_of_attention_in_tiles_is_the_formula() {
    cases(8, |what, call| {
        let want: Vec<f32> = call.paged.formula().into_iter().map(|v| v as f32).collect();
        // Weights have 11 bits.
        near(what, &call.twin(), &want, 3e-4);
    });
}

/// GPUs with their matrix units, or with emulated ones, and the rows of a tile.
fn units() -> Vec<(String, Gpu, u32)> {
    let mut all = Vec::new();
    for device in devices().iter().filter(|d| *d != "cpu") {
        for matrix_units in [MatrixUnits::Emulated(8), MatrixUnits::Emulated(16), MatrixUnits::Auto] {
            let options = GpuOptions { matrix_units, ..GpuOptions::default() };
            let gpu = match Gpu::select(&Selection::parse(device).unwrap(), &options) {
                Ok(gpu) => gpu.unwrap(),
                Err(error) => {
                    assert_eq!(error.kind(), rewardrt::ErrorKind::Unsupported, "{error}");
                    continue;
                }
            };
            if !gpu.matrix_attention() {
                assert_eq!(matrix_units, MatrixUnits::Auto, "the emulation failed its test");
                eprintln!("SKIPPED ON {device}: attention on its own matrix units");
                continue;
            }
            let tile = gpu.matrix_tile().unwrap();
            all.push((format!("{device} {matrix_units:?}"), gpu, tile));
        }
    }
    all
}

#[test]
fn attention_in_tiles_is_its_twin_and_batch_invariant() {
    for (device, gpu, tile) in units() {
        cases(tile as usize, |what, call| {
            let bytes = 48 << 10;
            assert!(tiled::fits(tile as usize, call.paged.head_dim, bytes), "{what}");
            if !tiled::fits(tile as usize, call.paged.head_dim, gpu.workgroup_bytes()) {
                eprintln!("SKIPPED ON {device}: {what}, too large");
                return;
            }
            let what = format!("{device} {what}");
            let on = |call: &Halves, tiles: &Tiles, segments| {
                tiled_attention(&gpu, tile, call.inputs(), tiles, segments).unwrap()
            };
            let tiles = call.tiles(tile as usize);
            let out = on(&call, &tiles, 1);
            // Half a unit of f16's last place, and weights that another exp2 rounds otherwise.
            near(&what, &out, &call.twin(), 6e-4);
            let same = |how: &str, other: Vec<f32>| assert_eq!(bits(&other), bits(&out), "{what}: {how}");
            let segments = call.segments().max(2);
            same("rows alone", on(&call, &call.rows_alone(), 1));
            same("rows together", on(&call, &call.rows_together(tile as usize), 1));
            same("segments side by side", on(&call, &tiles, segments));
            same("rows alone, segments side by side", on(&call, &call.rows_alone(), segments));
            let from = call.paged.rows.len() / 2;
            let some = call.only(from..call.paged.rows.len());
            let out_some = on(&some, &some.tiles(tile as usize), 1);
            assert_eq!(bits(&out_some), bits(&out[from * call.paged.heads * call.paged.head_dim..]), "{what}: half");
        });
    }
}

/// What is not finite stays with the rows that see it, also among those of a tile. Values are finite.
#[test]
fn attention_in_tiles_keeps_nan_to_the_rows_that_see_it() {
    for (device, gpu, tile) in units() {
        for window in [None, Some(3)] {
            let call = Halves::new([3, 1, 16], window, &[&[9, 10, 11, 12, 13, 14], &[4]]);
            let on =
                |call: &Halves, tiles, segments| tiled_attention(&gpu, tile, call.inputs(), tiles, segments).unwrap();
            let (together, alone) = (call.rows_together(tile as usize), call.rows_alone());
            let out = on(&call, &together, 1);
            assert!(out.iter().all(|v| v.is_finite()));
            // Position 11 is seen from row 2 on, within the window by rows 2 to 4.
            let seen = |row: usize| (2..6).contains(&row) && (window.is_none() || row < 5);
            for (tiles, segments) in [(&together, 1), (&together, 2), (&alone, 1)] {
                let what = format!("{device}, window {window:?}, {segments} segments");
                let mut broken = Halves { keys: call.keys.clone(), ..call.only(0..7) };
                for e in 0..16 {
                    broken.keys[call.paged.places(0, 11, 0, e)[0]] = f16::NAN;
                }
                let got = on(&broken, tiles, segments);
                for (row, (got, clean)) in got.chunks_exact(48).zip(out.chunks_exact(48)).enumerate() {
                    let right = if seen(row) { got.iter().all(|v| v.is_nan()) } else { bits(got) == bits(clean) };
                    assert!(right, "{what}: a key that is NaN, row {row}: {got:?}");
                }
                let mut broken = call.only(0..7);
                broken.q[48 + 16] = f16::NAN;
                let got = on(&broken, tiles, segments);
                for (i, (got, clean)) in got.chunks_exact(16).zip(out.chunks_exact(16)).enumerate() {
                    let right = if i == 4 { got.iter().all(|v| v.is_nan()) } else { bits(got) == bits(clean) };
                    assert!(right, "{what}: a query that is NaN, query {i}: {got:?}");
                }
            }
        }
    }
}

/// Every value that linear_qkv stores is finite; a row that is not says so by its key.
#[test]
fn values_that_are_not_finite_are_stored_as_zero() {
    const HEAD: usize = 8;
    const K: usize = 16;
    const TILE: usize = 8;
    for device in gpus().iter().filter(|d| d.has_f16()) {
        let mut numbers = Numbers(5);
        let mut x = numbers.floats(64 * K);
        x[K + 3] = f32::NAN;
        // The first value is too large for f16.
        let mut bias = vec![0.0; 3 * HEAD];
        bias[2 * HEAD] = 1e6;
        let rows: Vec<RowMeta> = (0..2).map(|i| RowMeta { position: i, slot: i, ..RowMeta::default() }).collect();
        let halves = |n: usize| Dtype::F16.from_f32(&vec![7.0; n]);
        let storage = [
            Dtype::F16.from_f32(&x),
            cast_slice(&pack_tiles(&numbers.floats(3 * HEAD * K), 3 * HEAD, K, TILE, 64)).to_vec(),
            vec![0; 64],
            bytes(&bias),
            cast_slice(&rows).to_vec(),
            bytes(&[[1.0; HEAD / 2], [0.0; HEAD / 2]].concat().repeat(2)),
            halves(2 * HEAD),
            halves(KV_BLOCK * HEAD),
            halves(KV_BLOCK * HEAD),
        ];
        let params = linear_qkv::Params {
            rows: 2,
            k: K as u32,
            stride: K as u32,
            count: 3 * HEAD as u32,
            first: 0,
            has_bias: 1,
            slice_row: 0,
            x_first: 0,
            heads: 1,
            kv_heads: 1,
            head_dim: HEAD as u32,
            first_meta: 0,
            q_scale: 1.0,
        };
        let format = Some(Format::Tiles(TILE as u32));
        let flags = Flags { format, emulated: true, f16: true, half_kv: true, half_q: true, ..Flags::default() };
        let groups = [1, (3 * HEAD).div_ceil(TILE) as u32, 1];
        let out = device.run_checked(&linear_qkv::KERNEL, flags, &params, &storage, groups);
        let [q, keys, values] = [6, 7, 8].map(|i| Dtype::F16.to_f32(&out[i]));
        for e in 0..HEAD {
            assert!(q[e].is_finite() && q[HEAD + e].is_nan());
            assert!(keys[e * KV_BLOCK].is_finite() && keys[e * KV_BLOCK + 1].is_nan());
            assert_eq!((values[e] == 0.0, values[HEAD + e]), (e == 0, 0.0));
        }
    }
}

/// Each row is in one tile; a wide one has rows of a sequence, and ends where all its rows see the same last chunk.
#[test]
fn tiles_of_attention_take_each_row_once() {
    let prefill: Vec<usize> = (5..140).collect();
    let sequences: [Sequences; 4] = [SHORT, LONG, &[&prefill, &[5, 6], &[0, 1, 2, 3, 31, 32]], &[&[7]]];
    for sequences in sequences {
        for (group, head_dim, tile) in [(1, 64, 16), (3, 64, 8), (7, 256, 16), (7, 256, 8)] {
            let call = Paged::new([group, 1, 8], None, sequences);
            let tiles = tiled::tiles(&call.rows, group, tile, head_dim);
            let mut all = [&tiles.narrow[..], &tiles.wide[..]].concat();
            all.sort_unstable();
            let mut next = 0;
            for [first, count] in all {
                assert_eq!(first, next);
                next += count;
            }
            assert_eq!(next as usize, call.rows.len());
            assert!(tiles.narrow.iter().all(|t| t[1] == 1));
            let most = tiled::queries(TileShape::Wide, tile, head_dim);
            for [first, count] in tiles.wide {
                let rows = &call.rows[first as usize..(first + count) as usize];
                assert!(rows.len() > group && rows.len() <= most);
                for pair in rows.windows(2) {
                    assert!(pair[0].table == pair[1].table && pair[0].position < pair[1].position);
                }
                assert_eq!(rows[0].position / 64, rows[rows.len() - 1].position / 64);
            }
        }
    }
}

/// The shader's variant: its constants.
#[derive(Clone, Copy, Debug)]
struct Variant {
    tile: usize,
    shape: TileShape,
    queries: usize,
    units: usize,
}

/// What a workgroup's threads do between two barriers, in any order: here by subgroup or by thread. Workgroup memory begins
/// as NaN.
struct Model<'a> {
    call: &'a Halves,
    variant: Variant,
    q: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    out: Vec<Option<f32>>,
}

const KEYS: usize = 64;
const LANES: usize = 8;
const KEY_STRIDE: usize = KEYS + 8;

impl<'a> Model<'a> {
    fn new(call: &'a Halves, variant: Variant) -> Self {
        let floats = |halves: &[f16]| halves.iter().map(|v| v.to_f32()).collect::<Vec<f32>>();
        let mut q = floats(&call.q);
        q.resize(q.len() + tiled::ROWS_BEYOND * call.paged.heads * call.paged.head_dim, f32::NAN);
        let (keys, values, out) = (floats(&call.keys), floats(&call.values), vec![None; call.q.len()]);
        Model { call, variant, q, keys, values, out }
    }

    /// A workgroup with one segment at most: those are joined as attention does.
    fn workgroup(&mut self, tile_of_rows: [u32; 2], y: usize) {
        let Paged { rows, tables, heads, kv_heads, head_dim: e_count, window, .. } = &self.call.paged;
        let (heads, kv_heads, e_count, window) = (*heads, *kv_heads, *e_count, *window);
        let Variant { tile, shape, queries, units } = self.variant;
        let heads_per_kv = heads / kv_heads;
        let [first_row, tile_rows] = tile_of_rows.map(|v| v as usize);
        let (head, kv_head, count, q_stride) = if shape == TileShape::Wide {
            (y, y / heads_per_kv, tile_rows, heads * e_count)
        } else {
            let head_tiles = heads_per_kv.div_ceil(queries);
            let first_head = y % head_tiles * queries;
            let head = y / head_tiles * heads_per_kv + first_head;
            (head, y / head_tiles, queries.min(heads_per_kv - first_head), e_count)
        };
        let place = |query: usize| match shape {
            TileShape::Wide => (first_row + query.min(count - 1)) * heads + head,
            _ => first_row * heads + head + query.min(count - 1),
        };
        let position = |query: usize| match shape {
            TileShape::Wide => rows[first_row + query.min(count - 1)].position as usize,
            _ => rows[first_row].position as usize,
        };
        let q_start = (first_row * heads + head) * e_count;
        let first = first_key(rows[first_row].position as usize, window);
        let last = rows[first_row + tile_rows - 1].position as usize;
        assert_eq!(first / SEGMENT, last / SEGMENT);
        let table = rows[first_row].table as usize;
        let sum_stride = e_count + 8;
        let (row_tiles, column_tiles, key_tiles) = (count.div_ceil(tile), e_count / tile, KEYS / tile);
        let mut blocks = [usize::MAX; SEGMENT / KV_BLOCK];
        for (i, at) in blocks.iter_mut().enumerate() {
            let block = (first / SEGMENT * (SEGMENT / KV_BLOCK) + i).clamp(first / KV_BLOCK, last / KV_BLOCK);
            *at = (tables[table + block] as usize * kv_heads + kv_head) * KV_BLOCK * e_count;
        }
        let mut sums = vec![f32::NAN; queries * sum_stride];
        for query in 0..queries {
            sums[query * sum_stride..][..e_count].fill(0.0);
        }
        let mut weights = vec![f32::NAN; queries * KEY_STRIDE];
        let (mut running_max, mut totals) = (vec![f32::MIN; queries], vec![0.0f32; queries * LANES]);
        for start in (first / KEYS * KEYS..=last).step_by(KEYS) {
            let chunk_block = start % SEGMENT / KV_BLOCK;
            let mut scores = vec![None; queries * KEY_STRIDE];
            for part in (0..units).flat_map(|unit| (unit..row_tiles * key_tiles).step_by(units)) {
                let (row, key) = (part / key_tiles * tile, part % key_tiles * tile);
                let (q_at, key_at) = (q_start + row * q_stride, blocks[chunk_block + key / KV_BLOCK] + key % KV_BLOCK);
                for element in 0..tile * tile {
                    let (i, j) = (element / tile, element % tile);
                    let mut sum = 0.0f32;
                    for e in 0..e_count {
                        sum = self.q[q_at + i * q_stride + e].mul_add(self.keys[key_at + e * KV_BLOCK + j], sum);
                    }
                    let written = scores[(row + i) * KEY_STRIDE + key + j].replace(sum);
                    assert!(written.is_none(), "{:?}: a score is written twice", self.variant);
                }
            }
            for query in 0..queries {
                let live = query < count;
                let (seen_first, seen_last) =
                    if live { (first_key(position(query), window), position(query)) } else { (1, 0) };
                let seen = |key: usize| start + key >= seen_first && start + key <= seen_last;
                let score = |key: usize| match scores[query * KEY_STRIDE + key] {
                    Some(score) => score,
                    None => panic!("{:?}: a score is missing", self.variant),
                };
                let top = (0..KEYS).filter(|&key| seen(key)).map(score).fold(running_max[query], f32::max);
                let shrink = if top == running_max[query] { 1.0 } else { (running_max[query] - top).exp2() };
                running_max[query] = top;
                for key in 0..KEYS {
                    let weight = if seen(key) { 16384.0 * (score(key) - top).exp2() } else { 0.0 };
                    weights[query * KEY_STRIDE + key] = f16::from_f32(weight).to_f32();
                }
                for lane in 0..LANES {
                    let four = |j: usize| {
                        let at = query * KEY_STRIDE + lane + j * LANES;
                        weights[at] + weights[at + 4 * LANES]
                    };
                    let total = &mut totals[query * LANES + lane];
                    *total = total.mul_add(shrink, (four(0) + four(1)) + (four(2) + four(3)));
                }
                sums[query * sum_stride..][..e_count].iter_mut().for_each(|sum| *sum *= shrink);
            }
            for part in (0..units).flat_map(|unit| (unit..row_tiles * column_tiles).step_by(units)) {
                let (row, column) = (part / column_tiles * tile, part % column_tiles * tile);
                for element in 0..tile * tile {
                    let (i, j) = (element / tile, element % tile);
                    let sum = &mut sums[(row + i) * sum_stride + column + j];
                    for key in 0..KEYS {
                        let value_at = blocks[chunk_block + key / KV_BLOCK] + key % KV_BLOCK * e_count + column;
                        *sum = weights[(row + i) * KEY_STRIDE + key].mul_add(self.values[value_at + j], *sum);
                    }
                }
            }
        }
        for query in 0..count {
            let total: f32 = totals[query * LANES..][..LANES].iter().sum();
            for e in 0..e_count {
                let value = sums[query * sum_stride + e] * (1.0 / total);
                let written = self.out[place(query) * e_count + e].replace(value);
                assert!(written.is_none(), "{:?}: an output is written twice", self.variant);
            }
        }
    }
}

#[test]
fn the_tiling_of_attention_covers_everything_once_and_reads_inside_its_buffers() {
    let rows: Vec<usize> = (3..75).collect();
    let sequences: [Sequences; 3] = [SHORT, &[&rows, &[0, 1]], &[&[130], &rows[..20]]];
    let (shapes, units) = ([TileShape::Narrow, TileShape::Wide], [1, 2, 3, 4, 8]);
    for tile in [8, 16] {
        for (i, [group, kv_heads, head_dim]) in
            [[1, 2, 16], [3, 2, 32], [20, 1, 16], [4, 2, 144]].into_iter().enumerate()
        {
            for (j, sequences) in sequences.into_iter().enumerate() {
                let window = [None, Some(20), None][(i + j) % 3];
                let call = Halves::new([group, kv_heads, head_dim], window, sequences);
                let want = bits(&call.twin());
                for (shape, units) in shapes.into_iter().flat_map(|shape| units.map(|units| (shape, units))) {
                    let queries = tiled::queries(shape, tile, head_dim);
                    let variant = Variant { tile, shape, queries, units };
                    let mut model = Model::new(&call, variant);
                    let tiles = match shape {
                        TileShape::Wide => call.rows_together(tile).wide,
                        _ => call.rows_alone().narrow,
                    };
                    let params = tiled::Params {
                        rows: call.paged.rows.len() as u32,
                        heads: call.paged.heads as u32,
                        kv_heads: kv_heads as u32,
                        head_dim: head_dim as u32,
                        window: 0,
                        segments: 1,
                        first_meta: 0,
                        first_tile: 0,
                    };
                    let [x, y, _] = tiled::workgroups(&params, shape, tile, tiles.len());
                    for (x, y) in (0..x as usize).flat_map(|x| (0..y as usize).map(move |y| (x, y))) {
                        model.workgroup(tiles[x], y);
                    }
                    let out: Vec<f32> = model.out.into_iter().map(|v| v.expect("every output is written")).collect();
                    assert_eq!(bits(&out), want, "{variant:?} {group} heads E{head_dim} window {window:?}");
                }
            }
        }
    }
}
