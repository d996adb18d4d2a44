// A tile of x · weightᵀ on matrix units, left in workgroup memory: sums[row · COLS + column].
//
// Inputs and weights are f16, sums f32. K is cut into 8 chunks at fixed places; a chunk is added up TILE elements at a
// time in rising k, and the chunks' sums are added in order. Few rows: the subgroups share the chunks. Many rows: each
// subgroup does all chunks of its own part of the tile. The same additions in either shape.
//
// Weights are packed in tiles of TILE rows by TILE elements, one after the other along K; rows of x are read up to the
// end of a tile, so their buffer has whole tiles of them, and whoever is past the end is not used. The same holds for rows
// of weights, 64 at a time: slices have whole 64 rows, and slice_row is a multiple of 64.
//
// ONE_CHUNK gives that up for many rows: to measure what it costs. EMULATED computes what the matrix units would, with the
// same indices: for adapters without them, in tests.

#if TILE8
const TILE = 8u;
#else
const TILE = 16u;
#endif
const AREA = TILE * TILE;
#if ONE_CHUNK
const CHUNKS = 1u;
#else
const CHUNKS = 8u;
#endif
#if WIDE
// Four subgroups, each 2 by 2 tiles.
const ROWS = 4u * TILE;
const COLS = 4u * TILE;
const THREADS = 128u;
const MEMORY = ROWS * COLS;
#else
#if HEAD
const ROWS = TILE;
const COLS = 4u * TILE;
#else
#if MEDIUM
const ROWS = 4u * TILE;
const COLS = TILE;
#else
const ROWS = TILE;
const COLS = TILE;
#endif
#endif
const THREADS = 256u;
// Each chunk's sums; then the first place has their total.
const MEMORY = CHUNKS * ROWS * COLS;
#endif

var<workgroup> sums: array<f32, MEMORY>;

#if EMULATED
// The elements lane, lane + 32, … of a tile.
struct Sums {
    at: array<f32, 8>,
}

fn multiply_add(x_at: u32, w_at: u32, c: Sums, lane: u32) -> Sums {
    var s = c;
    for (var i = 0u; i < AREA / 32u; i++) {
        let element = lane + 32u * i;
        for (var k = 0u; k < TILE; k++) {
            let a = f32(x[x_at + element / TILE * p.k + k]);
            let b = f32(weight[w_at + element % TILE * TILE + k]);
            s.at[i] = fma(a, b, s.at[i]);
        }
    }
    return s;
}

fn plus(a: Sums, b: Sums) -> Sums {
    var s = a;
    for (var i = 0u; i < AREA / 32u; i++) {
        s.at[i] += b.at[i];
    }
    return s;
}

fn store(c: Sums, at: u32, lane: u32) {
    for (var i = 0u; i < AREA / 32u; i++) {
        let element = lane + 32u * i;
        sums[at + element / TILE * COLS + element % TILE] = c.at[i];
    }
}
#else
#if TILE8
alias Inputs = coop_mat8x8<f16, A>;
alias Weights = coop_mat8x8<f16, B>;
alias Sums = coop_mat8x8<f32, C>;
#else
alias Inputs = coop_mat16x16<f16, A>;
alias Weights = coop_mat16x16<f16, B>;
alias Sums = coop_mat16x16<f32, C>;
#endif
#endif

// Tiles of K before chunk i.
fn chunk_start(i: u32) -> u32 {
    return i * (p.k / TILE) / CHUNKS;
}

// `unit` of `units` subgroups of the workgroup; `lane` is for the emulation.
fn products(thread: u32, unit: u32, units: u32, lane: u32, first_row: u32, first_column: u32) {
    let k_tiles = p.k / TILE;
    let x_start = (p.x_first + first_row) * p.k;
    let w_start = (p.slice_row + first_column) / TILE * k_tiles * AREA;
#if WIDE
    for (var part = unit; part < 4u; part += units) {
        let row = part / 2u * 2u * TILE;
        let column = part % 2u * 2u * TILE;
        let x_part = x_start + row * p.k;
        let w_part = w_start + column / TILE * k_tiles * AREA;
        var t00: Sums;
        var t01: Sums;
        var t10: Sums;
        var t11: Sums;
        for (var chunk = 0u; chunk < CHUNKS; chunk++) {
            var c00: Sums;
            var c01: Sums;
            var c10: Sums;
            var c11: Sums;
            let end = chunk_start(chunk + 1u);
            for (var k = chunk_start(chunk); k < end; k++) {
                let x0 = x_part + k * TILE;
                let x1 = x0 + TILE * p.k;
                let w0 = w_part + k * AREA;
                let w1 = w0 + k_tiles * AREA;
#if EMULATED
                c00 = multiply_add(x0, w0, c00, lane);
                c01 = multiply_add(x0, w1, c01, lane);
                c10 = multiply_add(x1, w0, c10, lane);
                c11 = multiply_add(x1, w1, c11, lane);
#else
                let a0 = coopLoadT<Inputs>(&x[x0], p.k);
                let a1 = coopLoadT<Inputs>(&x[x1], p.k);
                let b0 = coopLoad<Weights>(&weight[w0], TILE);
                let b1 = coopLoad<Weights>(&weight[w1], TILE);
                c00 = coopMultiplyAdd(a0, b0, c00);
                c01 = coopMultiplyAdd(a0, b1, c01);
                c10 = coopMultiplyAdd(a1, b0, c10);
                c11 = coopMultiplyAdd(a1, b1, c11);
#endif
            }
            if chunk == 0u {
                t00 = c00;
                t01 = c01;
                t10 = c10;
                t11 = c11;
            } else {
#if EMULATED
                t00 = plus(t00, c00);
                t01 = plus(t01, c01);
                t10 = plus(t10, c10);
                t11 = plus(t11, c11);
#else
                t00 = t00 + c00;
                t01 = t01 + c01;
                t10 = t10 + c10;
                t11 = t11 + c11;
#endif
            }
        }
        let at = row * COLS + column;
#if EMULATED
        store(t00, at, lane);
        store(t01, at + TILE, lane);
        store(t10, at + TILE * COLS, lane);
        store(t11, at + TILE * COLS + TILE, lane);
#else
        coopStoreT(t00, &sums[at], COLS);
        coopStoreT(t01, &sums[at + TILE], COLS);
        coopStoreT(t10, &sums[at + TILE * COLS], COLS);
        coopStoreT(t11, &sums[at + TILE * COLS + TILE], COLS);
#endif
    }
    workgroupBarrier();
#else
    for (var chunk = unit; chunk < CHUNKS; chunk += units) {
        var c0: Sums;
#if FOUR
        var c1: Sums;
        var c2: Sums;
        var c3: Sums;
#endif
        let end = chunk_start(chunk + 1u);
        for (var k = chunk_start(chunk); k < end; k++) {
            let x0 = x_start + k * TILE;
            let w0 = w_start + k * AREA;
#if FOUR
#if HEAD
            let step = k_tiles * AREA;
#else
            let step = TILE * p.k;
#endif
#endif
#if EMULATED
            c0 = multiply_add(x0, w0, c0, lane);
#if FOUR
#if HEAD
            c1 = multiply_add(x0, w0 + step, c1, lane);
            c2 = multiply_add(x0, w0 + 2u * step, c2, lane);
            c3 = multiply_add(x0, w0 + 3u * step, c3, lane);
#else
            c1 = multiply_add(x0 + step, w0, c1, lane);
            c2 = multiply_add(x0 + 2u * step, w0, c2, lane);
            c3 = multiply_add(x0 + 3u * step, w0, c3, lane);
#endif
#endif
#else
            let a0 = coopLoadT<Inputs>(&x[x0], p.k);
            let b0 = coopLoad<Weights>(&weight[w0], TILE);
            c0 = coopMultiplyAdd(a0, b0, c0);
#if FOUR
#if HEAD
            let b1 = coopLoad<Weights>(&weight[w0 + step], TILE);
            let b2 = coopLoad<Weights>(&weight[w0 + 2u * step], TILE);
            let b3 = coopLoad<Weights>(&weight[w0 + 3u * step], TILE);
            c1 = coopMultiplyAdd(a0, b1, c1);
            c2 = coopMultiplyAdd(a0, b2, c2);
            c3 = coopMultiplyAdd(a0, b3, c3);
#else
            let a1 = coopLoadT<Inputs>(&x[x0 + step], p.k);
            let a2 = coopLoadT<Inputs>(&x[x0 + 2u * step], p.k);
            let a3 = coopLoadT<Inputs>(&x[x0 + 3u * step], p.k);
            c1 = coopMultiplyAdd(a1, b0, c1);
            c2 = coopMultiplyAdd(a2, b0, c2);
            c3 = coopMultiplyAdd(a3, b0, c3);
#endif
#endif
#endif
        }
        let at = chunk * ROWS * COLS;
#if FOUR
#if HEAD
        let next = TILE;
#else
        let next = TILE * COLS;
#endif
#endif
#if EMULATED
        store(c0, at, lane);
#if FOUR
        store(c1, at + next, lane);
        store(c2, at + 2u * next, lane);
        store(c3, at + 3u * next, lane);
#endif
#else
        coopStoreT(c0, &sums[at], COLS);
#if FOUR
        coopStoreT(c1, &sums[at + next], COLS);
        coopStoreT(c2, &sums[at + 2u * next], COLS);
        coopStoreT(c3, &sums[at + 3u * next], COLS);
#endif
#endif
    }
    workgroupBarrier();
    // Nobody reads what another thread totals.
    for (var i = thread; i < ROWS * COLS; i += THREADS) {
        var total = sums[i];
        for (var chunk = 1u; chunk < CHUNKS; chunk++) {
            total += sums[chunk * ROWS * COLS + i];
        }
        sums[i] = total;
    }
    workgroupBarrier();
#endif
}
