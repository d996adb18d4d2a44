// linear: rows of x times a weight stored row by row.
//
//   out[t, first + n] = Σ_k x[x_first + t, k] · weight[slice_row + n, k] + bias[first + n], or adds that to out
//
// A workgroup owns 4 rows of x and 8 weight rows; 8 lanes share a weight row. Lane j takes the groups of 8 elements
// j, j + 8, … in rising k, then one element of what is left of K; the lanes are added by halves, then the bias. So the
// order depends on K alone. Sums in f32, no input is rounded.
//
// 8-bit weights (INT8) are q · scales[row, k / 64]; their rows are whole blocks of 64.
//
// The weight may be bound in slices of rows (a binding is limited); rows are `stride` elements apart, a multiple of 8.
// With SUBGROUP (at least 8 lanes) the lanes are added by shuffles, without it through workgroup memory: the same
// additions.

#if NATIVE_F16
enable f16;
#endif

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
}

const ROWS = 4u;
const COLS = 8u;
const LANES = 8u;

@group(0) @binding(0) var<uniform> p: Params;
#if VEC4
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>; // (T, K/4)
#else
@group(0) @binding(1) var<storage, read> x: array<f32>; // (T, K)
#endif
#if NATIVE_F16
@group(0) @binding(2) var<storage, read> weight: array<vec4<f16>>; // (rows of the slice, stride/4)
#else
#if INT8
@group(0) @binding(2) var<storage, read> weight: array<vec2<u32>>; // (rows of the slice, stride/8), 4 a word
#else
@group(0) @binding(2) var<storage, read> weight: array<vec4<u32>>; // (rows of the slice, stride) in its dtype, packed
#endif
#endif
@group(0) @binding(3) var<storage, read> scales: array<f32>; // (rows of the slice, stride/64), or anything if not INT8
@group(0) @binding(4) var<storage, read> bias: array<f32>; // (N), or anything without a bias
@group(0) @binding(5) var<storage, read_write> out: array<f32>; // (T, N)

// Eight consecutive values.
struct Eight {
    low: vec4<f32>,
    high: vec4<f32>,
}

#if F16_WEIGHTS
// The value of sixteen f16 bits, exactly: unpack2x16float is not to be had everywhere, and may flush subnormals.
fn half_value(bits: u32) -> f32 {
    let exponent = bits >> 10u & 31u;
    let mantissa = bits & 1023u;
    let normal = bitcast<f32>((exponent + 112u) << 23u | mantissa << 13u);
    let special = bitcast<f32>(0x7f800000u | mantissa << 13u);
    let magnitude = select(select(normal, special, exponent == 31u), f32(mantissa) * 5.9604645e-8, exponent == 0u);
    return select(magnitude, -magnitude, bits >= 0x8000u);
}
#endif

// Eight weights from element i on, a multiple of 8.
fn weights(i: u32) -> Eight {
#if INT8
    let q = weight[i / 8u];
    let scale = scales[i / 64u];
    return Eight(scale * vec4<f32>(unpack4xI8(q.x)), scale * vec4<f32>(unpack4xI8(q.y)));
#else
#if BF16
    let w = weight[i / 8u];
    let even = bitcast<vec4<f32>>(w << vec4<u32>(16u));
    let odd = bitcast<vec4<f32>>(w & vec4<u32>(0xffff0000u));
    return Eight(vec4<f32>(even.x, odd.x, even.y, odd.y), vec4<f32>(even.z, odd.z, even.w, odd.w));
#else
#if NATIVE_F16
    return Eight(vec4<f32>(weight[i / 4u]), vec4<f32>(weight[i / 4u + 1u]));
#else
#if F16_WEIGHTS
    let w = weight[i / 8u];
    return Eight(vec4<f32>(half_value(w.x & 0xffffu), half_value(w.x >> 16u),
                           half_value(w.y & 0xffffu), half_value(w.y >> 16u)),
                 vec4<f32>(half_value(w.z & 0xffffu), half_value(w.z >> 16u),
                           half_value(w.w & 0xffffu), half_value(w.w >> 16u)));
#else
    return Eight(bitcast<vec4<f32>>(weight[i / 4u]), bitcast<vec4<f32>>(weight[i / 4u + 1u]));
#endif
#endif
#endif
#endif
}

// Eight inputs of row t from element k on.
fn inputs(t: u32, k: u32) -> Eight {
#if VEC4
    let i = (t * p.k + k) / 4u;
    return Eight(x[i], x[i + 1u]);
#else
    let i = t * p.k + k;
    return Eight(vec4<f32>(x[i], x[i + 1u], x[i + 2u], x[i + 3u]),
                 vec4<f32>(x[i + 4u], x[i + 5u], x[i + 6u], x[i + 7u]));
#endif
}

fn input(t: u32, k: u32) -> f32 {
    let i = t * p.k + k;
#if VEC4
    return x[i / 4u][i % 4u];
#else
    return x[i];
#endif
}

fn add_products(sum: f32, w: Eight, v: Eight) -> f32 {
    var s = fma(w.low.x, v.low.x, sum);
    s = fma(w.low.y, v.low.y, s);
    s = fma(w.low.z, v.low.z, s);
    s = fma(w.low.w, v.low.w, s);
    s = fma(w.high.x, v.high.x, s);
    s = fma(w.high.y, v.high.y, s);
    s = fma(w.high.z, v.high.z, s);
    return fma(w.high.w, v.high.w, s);
}

#if SUBGROUP
fn over_lanes(v: vec4<f32>, thread: u32) -> vec4<f32> {
    var s = v + subgroupShuffleXor(v, 4u);
    s += subgroupShuffleXor(s, 2u);
    return s + subgroupShuffleXor(s, 1u);
}
#else
var<workgroup> partial: array<vec4<f32>, 64>;

fn over_lanes(v: vec4<f32>, thread: u32) -> vec4<f32> {
    partial[thread] = v;
    workgroupBarrier();
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        if thread % LANES < half {
            partial[thread] += partial[thread + half];
        }
        workgroupBarrier();
    }
    return partial[thread];
}
#endif

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
#if SUBGROUP
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_size) subgroup_size: u32,
    @builtin(subgroup_invocation_id) in_subgroup: u32,
#else
    @builtin(local_invocation_index) thread: u32,
#endif
) {
#if SUBGROUP
    let thread = subgroup * subgroup_size + in_subgroup;
#endif
    let lane = thread % LANES;
    let n = (group.y * groups.x + group.x) * COLS + thread / LANES;
    let t = group.z * ROWS;

    // 1. Rows past the end are read as the last one and not written.
    let w_row = (p.slice_row + min(n, p.count - 1u)) * p.stride;
    let last = p.rows - 1u;
    let t0 = p.x_first + min(t, last);
    let t1 = p.x_first + min(t + 1u, last);
    let t2 = p.x_first + min(t + 2u, last);
    let t3 = p.x_first + min(t + 3u, last);

    // 2. Whole groups of eight.
    var sums = vec4<f32>();
    let whole = p.k / 8u * 8u;
    for (var k = lane * 8u; k < whole; k += LANES * 8u) {
        let w = weights(w_row + k);
        sums = vec4<f32>(
            add_products(sums.x, w, inputs(t0, k)),
            add_products(sums.y, w, inputs(t1, k)),
            add_products(sums.z, w, inputs(t2, k)),
            add_products(sums.w, w, inputs(t3, k)),
        );
    }

    // 3. What is left: lane j takes the j-th element.
    let rest = whole + lane;
    if rest < p.k {
        let eight = weights(w_row + whole);
        let w = select(eight.low[lane % 4u], eight.high[lane % 4u], lane >= 4u);
        sums += w * vec4<f32>(input(t0, rest), input(t1, rest), input(t2, rest), input(t3, rest));
    }

    // 4. Lanes by halves; lane j < 4 writes row t + j.
    let total = over_lanes(sums, thread);
#if SUBGROUP
    let row_sums = total;
#else
    let row_sums = partial[thread - lane];
#endif
    if lane < ROWS && t + lane < p.rows && n < p.count {
        let column = p.first + n;
        var value = row_sums[lane];
        if p.has_bias == 1u {
            value += bias[column];
        }
        let at = (t + lane) * p.out_stride + column;
        if p.accumulate == 1u {
            value += out[at];
        }
        out[at] = value;
    }
}
