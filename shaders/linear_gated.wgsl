// linear_gated: the two products of a gated MLP and what becomes of them.
//
//   out[t, i] = scale · silu(g) · u,   g = Σ_k x[t, k] · gate[i, k] + bias,   u = Σ_k x[t, k] · up[i, k] + bias
//
// The weight's rows (and the bias) are interleaved: 2i is gate's row i, 2i + 1 is up's. A workgroup owns a tile of both;
// the order of additions is that of include/products.wgsl or include/tiles.wgsl. `scale` is a power of two that keeps
// the result in the range of f16 where that is how it is stored. With ADAPTERS a row's adapter adds its share before the biases
// (include/adapter.wgsl).

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
    for (var i = thread; i < ROWS * COLS / 2u; i += THREADS) {
        let t = first_row + i / (COLS / 2u);
        let n = first_column + i % (COLS / 2u) * 2u;
        if t < p.rows && n < p.count {
            let column = p.first + n;
            var g = sums[2u * i];
            var u = sums[2u * i + 1u];
#if ADAPTERS
            g = with_adapter(g, t, 0u, column, 2u * p.out_stride);
            u = with_adapter(u, t, 1u, column + 1u, 2u * p.out_stride);
#endif
            if p.has_bias == 1u {
                g += bias[column];
                u += bias[column + 1u];
            }
            var value = g / (1.0 + exp(-g)) * u * p.scale;
#if ADAPTERS
            value *= adapter_scale(t);
#endif
#if HALF_OUT
            out[t * p.out_stride + column / 2u] = f16(value);
#else
            out[t * p.out_stride + column / 2u] = value;
#endif
        }
    }
}

#include main
