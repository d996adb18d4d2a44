// attention_join: joins the segments that attention computed side by side.
//
//   out[t, h] = Σ_s o[s] · 2^(m[s] − M) / Σ_s l[s] · 2^(m[s] − M),   M = max_s m[s]
//
// in rising s, by the expressions of attention's step 7: the bits are those of the workgroup that walks all segments. A
// segment of which the row saw nothing (m = LOWEST, l = 0) is passed over; its o need not be there. A workgroup owns
// (t, h); thread i owns the elements e ≡ i (mod 64).

#if F16
enable f16;
#endif

struct Params {
    rows: u32,
    heads: u32,
    head_dim: u32,
    segments: u32,
}

const THREADS = 64u;
const LOWEST = -3.4028234e38;

#if HALF_OUT
alias Out = f16;
#else
alias Out = f32;
#endif

var<immediate> p: Params;
@group(0) @binding(1) var<storage, read> partials: array<f32>; // (S, T, H, 2 + E) m, l, o
@group(0) @binding(2) var<storage, read_write> out: array<Out>; // (T, H, E)

// 2^(before − now), 1 where they are equal.
fn ratio(before: f32, now: f32) -> f32 {
    return select(exp2(before - now), 1.0, before == now);
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let place = workgroup.y * p.heads + workgroup.x;
    for (var e = thread; e < p.head_dim; e += THREADS) {
        var joined_max = LOWEST;
        var joined_total = 0.0;
        var joined = 0.0;
        for (var s = 0u; s < p.segments; s++) {
            let at = (s * p.rows * p.heads + place) * (p.head_dim + 2u);
            let running_max = partials[at];
            let total = partials[at + 1u];
            // Not `!=`, which drivers may answer with false for NaN.
            if !(running_max == LOWEST && total == 0.0) {
                let both = max(joined_max, running_max);
                let a = ratio(joined_max, both);
                let b = ratio(running_max, both);
                joined_total = fma(joined_total, a, total * b);
                joined = fma(joined, a, partials[at + 2u + e] * b);
                joined_max = both;
            }
        }
        let inverse = 1.0 / joined_total;
        out[place * p.head_dim + e] = Out(joined * inverse);
    }
}
