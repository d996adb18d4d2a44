// linear_gated: the two products of a gated MLP and what becomes of them.
//
//   out[t, i] = scale · silu(g) · u,   g = Σ_k x[t, k] · gate[i, k] + bias,   u = Σ_k x[t, k] · up[i, k] + bias
//
// The weight's rows (and the bias) are interleaved: 2i is gate's row i, 2i + 1 is up's. A workgroup owns a tile of both;
// the order of additions is that of include/products.wgsl or include/tiles.wgsl. `scale` is a power of two that keeps
// the result in the range of f16 where that is how it is stored.

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
    scale: f32,
}

var<immediate> p: Params;
#include inputs
#if HALF_OUT
@group(0) @binding(5) var<storage, read_write> out: array<f16>; // (T, F)
#else
@group(0) @binding(5) var<storage, read_write> out: array<f32>; // (T, F)
#endif

#if TILES
#include tiles
#else
#include half_value
#include products
#endif

fn finish(thread: u32, first_row: u32, first_column: u32) {
    for (var i = thread; i < ROWS * COLS / 2u; i += THREADS) {
        let t = first_row + i / (COLS / 2u);
        let n = first_column + i % (COLS / 2u) * 2u;
        if t < p.rows && n < p.count {
            let column = p.first + n;
            var g = sums[2u * i];
            var u = sums[2u * i + 1u];
            if p.has_bias == 1u {
                g += bias[column];
                u += bias[column + 1u];
            }
            let value = g / (1.0 + exp(-g)) * u * p.scale;
#if HALF_OUT
            out[t * p.out_stride + column / 2u] = f16(value);
#else
            out[t * p.out_stride + column / 2u] = value;
#endif
        }
    }
}

#include main
