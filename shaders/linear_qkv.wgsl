// linear_qkv: queries, keys and values of each row, rotated by its position; keys and values go into the paged cache.
//
//   y[n] = Σ_k x[t, k] · weight[n, k] + bias[n]
//   (a, b) ← (a·cos − b·sin, b·cos + a·sin)   for a = y[h, i], b = y[h, i + E/2] of a query or key head
//   q[t, h, e] · q_scale,  keys[block, g, e, place],  values[block, g, place, e]                    slot = block·P + place
//
// The weight's rows (and the bias) are H query heads, G key heads, G value heads; those of a query or key head are
// interleaved: 2i is its element i, 2i + 1 its element i + E/2. So a pair shares a workgroup, which owns a tile; the order
// of additions is that of include/products.wgsl or include/tiles.wgsl. No two rows of a step share a slot. The angles come
// from the host, the same for both backends. With ADAPTERS a row's adapter adds its share to y before the bias
// (include/adapter.wgsl).

#include enable

struct Params {
    rows: u32,
    k: u32,
    stride: u32,
    count: u32,
    first: u32,
    has_bias: u32,
    slice_row: u32,
    x_first: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    first_meta: u32,
    q_scale: f32,
}

const P = 16u;

var<immediate> p: Params;
#include inputs
@group(0) @binding(5) var<storage, read> rows: array<vec4<u32>>; // (first_meta + T) token, position, slot, table
@group(0) @binding(6) var<storage, read> cos_sin: array<f32>; // (first_meta + T, 2, E/2)
#if HALF_Q
@group(0) @binding(7) var<storage, read_write> q: array<f16>; // (T, H, E)
#else
@group(0) @binding(7) var<storage, read_write> q: array<f32>; // (T, H, E)
#endif
#if HALF_KV
@group(0) @binding(8) var<storage, read_write> keys: array<f16>; // (blocks, G, E, P)
@group(0) @binding(9) var<storage, read_write> values: array<f16>; // (blocks, G, P, E)
#else
@group(0) @binding(8) var<storage, read_write> keys: array<f32>; // (blocks, G, E, P)
@group(0) @binding(9) var<storage, read_write> values: array<f32>; // (blocks, G, P, E)
#endif

#if ADAPTERS
@group(0) @binding(10) var<storage, read> adapters: array<u32>; // (1), (slots, 4), then factors
@group(0) @binding(11) var<storage, read> down: array<u32>; // (T, stride)
#endif

#if TILES
#include tiles
#else
#include half_value
#include products
#endif

#if HALF_KV
fn stored(v: f32) -> f16 {
    return f16(v);
}

// 0 for what f16 does not hold: attention_tiles multiplies values by zero. They are that large, or NaN, only where the
// row's input is NaN; then so is its key, and nobody who sees it passes over it.
fn finite(v: f32) -> f32 {
    return select(0.0, v, (bitcast<u32>(v) & 0x7fffffffu) <= 0x477fe000u);
}
#else
fn stored(v: f32) -> f32 {
    return v;
}

fn finite(v: f32) -> f32 {
    return v;
}
#endif

#if HALF_Q
fn query(v: f32) -> f16 {
    return f16(v);
}
#else
fn query(v: f32) -> f32 {
    return v;
}
#endif

#include adapter

fn finish(thread: u32, first_row: u32, first_column: u32) {
    let e_count = p.head_dim;
    for (var i = thread; i < ROWS * COLS / 2u; i += THREADS) {
        let t = first_row + i / (COLS / 2u);
        let n = first_column + i % (COLS / 2u) * 2u;
        if t < p.rows && n < p.count {
            let column = p.first + n;
            var a = sums[2u * i];
            var b = sums[2u * i + 1u];
            let head = column / e_count;
#if ADAPTERS
            let part = u32(head >= p.heads) + u32(head >= p.heads + p.kv_heads);
            let columns = (p.heads + 2u * p.kv_heads) * e_count;
            a = with_adapter(a, t, part, column, columns);
            b = with_adapter(b, t, part, column + 1u, columns);
#endif
            if p.has_bias == 1u {
                a += bias[column];
                b += bias[column + 1u];
            }
            let in_head = column % e_count;
            let slot = rows[p.first_meta + t].z;
            if head < p.heads + p.kv_heads {
                let pair = in_head / 2u;
                let angle = (p.first_meta + t) * e_count + pair;
                let c = cos_sin[angle];
                let s = cos_sin[angle + e_count / 2u];
                // Explicit, so that no variant is contracted in another way.
                let low = fma(a, c, -(b * s));
                let high = fma(b, c, a * s);
                if head < p.heads {
                    let at = (t * p.heads + head) * e_count + pair;
                    q[at] = query(low * p.q_scale);
                    q[at + e_count / 2u] = query(high * p.q_scale);
                } else {
                    let at = ((slot / P * p.kv_heads + head - p.heads) * e_count + pair) * P + slot % P;
                    keys[at] = stored(low);
                    keys[at + e_count / 2u * P] = stored(high);
                }
            } else {
                let g = head - p.heads - p.kv_heads;
                let at = ((slot / P * p.kv_heads + g) * P + slot % P) * e_count + in_head;
                values[at] = stored(finite(a));
                values[at + 1u] = stored(finite(b));
            }
        }
    }
}

#include main
