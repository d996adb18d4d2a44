// head: the pass over the vocabulary. Logits of a tile of tokens, and what the log-sum-exp needs of them, in one kernel:
// the logits need not be stored.
//
//   l[v] = Σ_k x[x_first + m, k] · weight[v, k]          logits[m, first + v] = l[v], where `keep` says so
//   stats[m, tile] = (max l, Σ e^(l − max), Σ e^(l − max)·(l − max), l[target] if it is in the tile, else 0)
//
// A workgroup owns the logits of some rows and of one tile of COLS tokens (the parts of log_sum_exp). −Inf adds nothing;
// NaN makes both sums NaN. The order of additions is that of include/products.wgsl or include/tiles.wgsl.

#include enable

struct Params {
    rows: u32,
    k: u32,
    stride: u32,
    count: u32,
    first: u32,
    slice_row: u32,
    x_first: u32,
    vocab: u32,
    tiles: u32,
    keep: u32,
    first_target: u32,
}

const LOWEST = -3.4028234e38;

var<immediate> p: Params;
#include inputs
@group(0) @binding(5) var<storage, read> targets: array<u32>; // (first_target + M), not below V: none
@group(0) @binding(6) var<storage, read_write> logits: array<f32>; // (M, V), or anything if they are not kept
@group(0) @binding(7) var<storage, read_write> stats: array<vec4<f32>>; // (M, tiles)

#if TILES
#include tiles
#else
#include half_value
#include products
#endif

fn finish(thread: u32, first_row: u32, first_column: u32) {
    if p.keep == 1u {
        for (var i = thread; i < ROWS * COLS; i += THREADS) {
            let m = first_row + i / COLS;
            let v = first_column + i % COLS;
            if m < p.rows && v < p.count {
                logits[m * p.vocab + p.first + v] = sums[i];
            }
        }
    }
    let m = first_row + thread;
    if thread < ROWS && m < p.rows {
        let end = min(COLS, p.count - first_column);
        var most = LOWEST;
        for (var i = 0u; i < end; i++) {
            most = max(most, sums[thread * COLS + i]);
        }
        var sum = 0.0;
        var weighted = 0.0;
        var target_logit = 0.0;
        let target_token = targets[p.first_target + m];
        for (var i = 0u; i < end; i++) {
            let l = sums[thread * COLS + i];
            // NaN by its bits: compilers assume that there is none.
            if (bitcast<u32>(l) & 0x7fffffffu) > 0x7f800000u {
                sum = l;
            } else if l >= LOWEST {
                let shift = l - most;
                let e = exp(shift);
                sum += e;
                weighted = fma(e, shift, weighted);
            }
            if p.first + first_column + i == target_token {
                target_logit = l;
            }
        }
        stats[m * p.tiles + (p.first + first_column) / COLS] = vec4<f32>(most, sum, weighted, target_logit);
    }
}

#include main
