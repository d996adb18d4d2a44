// A tile of x · weightᵀ, left in workgroup memory: sums[row · COLS + column].
//
// 8 lanes share a weight row: lane j takes the groups of 8 elements j, j + 8, … in rising k, then one element of what is
// left of K; the lanes are added by halves. So the order depends on K alone, not on the shape of the tile. Sums in f32,
// no input is rounded. 8-bit weights are q · scales[row, k / 64], 4-bit ones (nibble − 8) · scales[row, k / 32].
//
// Weight rows are `stride` elements apart, a multiple of 8 (64, 32 for integers).

const LANES = 8u;
#if ONE_ROW
// A thread computes 4 columns of the row.
const ROWS = 1u;
#if HEAD
const COLS = 64u;
const THREADS = 128u;
#else
const COLS = 16u;
const THREADS = 32u;
#endif
#else
#if WIDE
// A thread computes 8 rows by 4 columns; for many rows.
const ROWS = 16u;
const COLS = 64u;
const THREADS = 256u;
#else
#if HEAD
// A thread computes 4 rows by 2 columns.
const ROWS = 4u;
const COLS = 64u;
const THREADS = 256u;
#else
// A thread computes 4 rows of a column.
const ROWS = 4u;
const COLS = 16u;
const THREADS = 128u;
#endif
#endif
#endif

var<workgroup> sums: array<f32, ROWS * COLS>;

// Eight consecutive values.
struct Eight {
    low: vec4<f32>,
    high: vec4<f32>,
}

// Eight weights from element i on, a multiple of 8.
fn weights(i: u32) -> Eight {
#if INT8
    let q = weight[i / 8u];
    let scale = scales[i / 64u];
    return Eight(scale * vec4<f32>(unpack4xI8(q.x)), scale * vec4<f32>(unpack4xI8(q.y)));
#else
#if INT4
    // Byte b of a block of 32 holds the elements b and b + 16.
    let word = i / 32u * 4u + i % 16u / 4u;
    let shift = i % 32u / 16u * 4u;
    let low = (weight[word] >> shift) & 0x0f0f0f0fu;
    let high = (weight[word + 1u] >> shift) & 0x0f0f0f0fu;
    let scale = scales[i / 32u];
    return Eight(scale * (vec4<f32>(unpack4xU8(low)) - 8.0), scale * (vec4<f32>(unpack4xU8(high)) - 8.0));
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

// The weight left over for this lane beyond the last whole group.
fn weight_of_rest(w_row: u32, whole: u32, lane: u32) -> f32 {
    let eight = weights(w_row + whole);
    return select(eight.low[lane % 4u], eight.high[lane % 4u], lane >= 4u);
}

// The sum over the 8 lanes, for each of them.
#if SUBGROUP
fn over_lanes(v: vec4<f32>, thread: u32) -> vec4<f32> {
    var s = v + subgroupShuffleXor(v, 4u);
    s += subgroupShuffleXor(s, 2u);
    return s + subgroupShuffleXor(s, 1u);
}
#else
var<workgroup> partial: array<vec4<f32>, THREADS>;

fn over_lanes(v: vec4<f32>, thread: u32) -> vec4<f32> {
    partial[thread] = v;
    workgroupBarrier();
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        if thread % LANES < half {
            partial[thread] += partial[thread + half];
        }
        workgroupBarrier();
    }
    let total = partial[thread - thread % LANES];
    workgroupBarrier();
    return total;
}
#endif

// The first element of a weight row; rows past the end are read as the last one, and nobody uses their sums.
fn row_start(column: u32) -> u32 {
    return (p.slice_row + min(column, p.count - 1u)) * p.stride;
}

fn input_row(row: u32) -> u32 {
    return p.x_first + min(row, p.rows - 1u);
}

// The first elements of the weight rows of 4 columns.
fn row_starts(column: u32) -> vec4<u32> {
    return vec4<u32>(row_start(column), row_start(column + 1u), row_start(column + 2u), row_start(column + 3u));
}

fn add_columns(s: vec4<f32>, w0: Eight, w1: Eight, w2: Eight, w3: Eight, v: Eight) -> vec4<f32> {
    return vec4<f32>(add_products(s.x, w0, v), add_products(s.y, w1, v), add_products(s.z, w2, v), add_products(s.w, w3, v));
}

fn weights_of_rest(w_row: vec4<u32>, whole: u32, lane: u32) -> vec4<f32> {
    return vec4<f32>(weight_of_rest(w_row.x, whole, lane), weight_of_rest(w_row.y, whole, lane),
                     weight_of_rest(w_row.z, whole, lane), weight_of_rest(w_row.w, whole, lane));
}

fn keep(at: u32, total: vec4<f32>) {
    sums[at] = total.x;
    sums[at + 1u] = total.y;
    sums[at + 2u] = total.z;
    sums[at + 3u] = total.w;
}

#if ONE_ROW
fn products(thread: u32, first_row: u32, first_column: u32) {
    let lane = thread % LANES;
    let column = thread / LANES * 4u;
    let w_row = row_starts(first_column + column);
    let t = input_row(first_row);
    var s = vec4<f32>();
    let whole = p.k / 8u * 8u;
    for (var k = lane * 8u; k < whole; k += LANES * 8u) {
        s = add_columns(s, weights(w_row.x + k), weights(w_row.y + k), weights(w_row.z + k), weights(w_row.w + k), inputs(t, k));
    }
    let rest = whole + lane;
    if rest < p.k {
        s = fma(weights_of_rest(w_row, whole, lane), vec4<f32>(input(t, rest)), s);
    }
    // Every lane has the totals: one of them writes.
    s = over_lanes(s, thread);
    if lane == 0u {
        keep(column, s);
    }
    workgroupBarrier();
}
#else
#if WIDE
fn products(thread: u32, first_row: u32, first_column: u32) {
    let lane = thread % LANES;
    let place = thread / LANES;
    let row = place / 16u * 8u;
    let column = place % 16u * 4u;
    let w_row = row_starts(first_column + column);
    let t = first_row + row;
    let t0 = input_row(t);
    let t1 = input_row(t + 1u);
    let t2 = input_row(t + 2u);
    let t3 = input_row(t + 3u);
    let t4 = input_row(t + 4u);
    let t5 = input_row(t + 5u);
    let t6 = input_row(t + 6u);
    let t7 = input_row(t + 7u);
    var s0 = vec4<f32>();
    var s1 = vec4<f32>();
    var s2 = vec4<f32>();
    var s3 = vec4<f32>();
    var s4 = vec4<f32>();
    var s5 = vec4<f32>();
    var s6 = vec4<f32>();
    var s7 = vec4<f32>();
    let whole = p.k / 8u * 8u;
    for (var k = lane * 8u; k < whole; k += LANES * 8u) {
        let w0 = weights(w_row.x + k);
        let w1 = weights(w_row.y + k);
        let w2 = weights(w_row.z + k);
        let w3 = weights(w_row.w + k);
        s0 = add_columns(s0, w0, w1, w2, w3, inputs(t0, k));
        s1 = add_columns(s1, w0, w1, w2, w3, inputs(t1, k));
        s2 = add_columns(s2, w0, w1, w2, w3, inputs(t2, k));
        s3 = add_columns(s3, w0, w1, w2, w3, inputs(t3, k));
        s4 = add_columns(s4, w0, w1, w2, w3, inputs(t4, k));
        s5 = add_columns(s5, w0, w1, w2, w3, inputs(t5, k));
        s6 = add_columns(s6, w0, w1, w2, w3, inputs(t6, k));
        s7 = add_columns(s7, w0, w1, w2, w3, inputs(t7, k));
    }
    let rest = whole + lane;
    if rest < p.k {
        let w = weights_of_rest(w_row, whole, lane);
        s0 = fma(w, vec4<f32>(input(t0, rest)), s0);
        s1 = fma(w, vec4<f32>(input(t1, rest)), s1);
        s2 = fma(w, vec4<f32>(input(t2, rest)), s2);
        s3 = fma(w, vec4<f32>(input(t3, rest)), s3);
        s4 = fma(w, vec4<f32>(input(t4, rest)), s4);
        s5 = fma(w, vec4<f32>(input(t5, rest)), s5);
        s6 = fma(w, vec4<f32>(input(t6, rest)), s6);
        s7 = fma(w, vec4<f32>(input(t7, rest)), s7);
    }
    // Every lane has the totals: one of them writes.
    s0 = over_lanes(s0, thread);
    s1 = over_lanes(s1, thread);
    s2 = over_lanes(s2, thread);
    s3 = over_lanes(s3, thread);
    s4 = over_lanes(s4, thread);
    s5 = over_lanes(s5, thread);
    s6 = over_lanes(s6, thread);
    s7 = over_lanes(s7, thread);
    if lane == 0u {
        let at = row * COLS + column;
        keep(at, s0);
        keep(at + COLS, s1);
        keep(at + 2u * COLS, s2);
        keep(at + 3u * COLS, s3);
        keep(at + 4u * COLS, s4);
        keep(at + 5u * COLS, s5);
        keep(at + 6u * COLS, s6);
        keep(at + 7u * COLS, s7);
    }
    workgroupBarrier();
}
#else
fn products(thread: u32, first_row: u32, first_column: u32) {
    let lane = thread % LANES;
#if HEAD
    let column = thread / LANES * 2u;
    let other_row = row_start(first_column + column + 1u);
    var other = vec4<f32>();
#else
    let column = thread / LANES;
#endif
    let w_row = row_start(first_column + column);
    let t0 = input_row(first_row);
    let t1 = input_row(first_row + 1u);
    let t2 = input_row(first_row + 2u);
    let t3 = input_row(first_row + 3u);
    var one = vec4<f32>();
    let whole = p.k / 8u * 8u;
    for (var k = lane * 8u; k < whole; k += LANES * 8u) {
        let w = weights(w_row + k);
        let v0 = inputs(t0, k);
        let v1 = inputs(t1, k);
        let v2 = inputs(t2, k);
        let v3 = inputs(t3, k);
        one = vec4<f32>(add_products(one.x, w, v0), add_products(one.y, w, v1),
                        add_products(one.z, w, v2), add_products(one.w, w, v3));
#if HEAD
        let u = weights(other_row + k);
        other = vec4<f32>(add_products(other.x, u, v0), add_products(other.y, u, v1),
                          add_products(other.z, u, v2), add_products(other.w, u, v3));
#endif
    }
    let rest = whole + lane;
    if rest < p.k {
        let v = vec4<f32>(input(t0, rest), input(t1, rest), input(t2, rest), input(t3, rest));
        one = fma(vec4<f32>(weight_of_rest(w_row, whole, lane)), v, one);
#if HEAD
        other = fma(vec4<f32>(weight_of_rest(other_row, whole, lane)), v, other);
#endif
    }
    // Lane j < 4 writes row j.
    one = over_lanes(one, thread);
    if lane < ROWS {
        sums[lane * COLS + column] = one[lane];
    }
#if HEAD
    other = over_lanes(other, thread);
    if lane < ROWS {
        sums[lane * COLS + column + 1u] = other[lane];
    }
#endif
    workgroupBarrier();
}
#endif
#endif
