// linear: rows of x times a weight stored row by row.
//
//   out[t, first + n] = scale · Σ_k x[x_first + t, k] · weight[slice_row + n, k] + bias[first + n], or adds that to out
//
// A workgroup owns a tile of out; include/products.wgsl and include/tiles.wgsl say in which order its elements are added
// up. The weight may be bound in slices of rows (a binding is limited). `scale` is a power of two: what the inputs were
// divided by to fit f16. With ADAPTERS a row's adapter adds its share before the bias (include/adapter.wgsl).

#include enable

struct Params {
    rows: u32,
    k: u32,
    stride: u32,
    count: u32,
    first: u32,
    out_stride: u32,
    has_bias: u32,
    slice_row: u32,
    x_first: u32,
    accumulate: u32,
    scale: f32,
}

var<immediate> p: Params;
#include inputs
@group(0) @binding(5) var<storage, read_write> out: array<f32>; // (T, N)
#if ADAPTERS
@group(0) @binding(6) var<storage, read> adapters: array<u32>; // (1), (slots, 4), then factors
@group(0) @binding(7) var<storage, read> down: array<u32>; // (T, stride)
#endif

#if TILES
#include tiles
#else
#include half_value
#include products
#endif

#include adapter

fn finish(thread: u32, first_row: u32, first_column: u32) {
    for (var i = thread; i < ROWS * COLS; i += THREADS) {
        let t = first_row + i / COLS;
        let n = first_column + i % COLS;
        if t < p.rows && n < p.count {
            let column = p.first + n;
            var value = sums[i] * p.scale;
#if ADAPTERS
            value = with_adapter(value * adapter_scale(t), t, 0u, column, p.out_stride);
#endif
            if p.has_bias == 1u {
                value += bias[column];
            }
            let at = t * p.out_stride + column;
            if p.accumulate == 1u {
                value += out[at];
            }
            out[at] = value;
        }
    }
}

#include main
