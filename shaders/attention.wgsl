// attention: causal attention over the paged cache, ragged rows, with a sliding window where there is one.
//
//   out[t, h] = Σ_j w[j] · value[j] / Σ_j w[j],   w[j] = e^(q[t, h] · key[j] / √E − max)
//
// over the keys j ≤ position[t] of the row's sequence and of kv head h·G/H (j > position − window). A workgroup owns
// (t, h). It takes 64 keys at a time from the first block that the window admits, with a running maximum: thread i
// scores key i, then owns the elements e ≡ i (mod 64) of the output. So the order depends on the position alone.
//
// Limit: E ≤ 512.

struct Params {
    rows: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    scale: f32,
    window: u32,
}

const P = 16u;
const KEYS = 64u;
const OWNED = 8u;
const LOWEST = -3.4028234e38;

var<immediate> p: Params;
@group(0) @binding(1) var<storage, read> rows: array<vec4<u32>>; // (T) token, position, slot, table
@group(0) @binding(2) var<storage, read> tables: array<u32>; // (blocks of all sequences)
@group(0) @binding(3) var<storage, read> q: array<f32>; // (T, H, E)
@group(0) @binding(4) var<storage, read> keys: array<f32>; // (blocks, G, E, P)
@group(0) @binding(5) var<storage, read> values: array<f32>; // (blocks, G, P, E)
@group(0) @binding(6) var<storage, read_write> out: array<f32>; // (T, H, E)

var<workgroup> scores: array<f32, KEYS>;
var<workgroup> reduced: array<f32, KEYS>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let h = group.x;
    let t = group.y;
    let e_count = p.head_dim;
    let kv_head = h / (p.heads / p.kv_heads);
    let row = rows[t];
    let position = row.y;
    let first = select(0u, position + 1u - min(p.window, position + 1u), p.window > 0u);
    let q_start = (t * p.heads + h) * e_count;

    var sums: array<f32, OWNED>;
    var running_max = LOWEST;
    var total = 0.0;
    for (var start = first / P * P; start <= position; start += KEYS) {
        // 1. Thread i scores key start + i.
        let key = start + thread;
        let seen = key >= first && key <= position;
        var score = LOWEST;
        if seen {
            let block = tables[row.w + key / P];
            let at = (block * p.kv_heads + kv_head) * e_count * P + key % P;
            var dot = 0.0;
            for (var e = 0u; e < e_count; e++) {
                dot = fma(q[q_start + e], keys[at + e * P], dot);
            }
            score = dot * p.scale;
        }

        // 2. Their maximum, then the weights and their sum, by halves.
        reduced[thread] = score;
        workgroupBarrier();
        for (var half = KEYS / 2u; half > 0u; half /= 2u) {
            if thread < half {
                reduced[thread] = max(reduced[thread], reduced[thread + half]);
            }
            workgroupBarrier();
        }
        let new_max = max(running_max, reduced[0]);
        workgroupBarrier();
        let w = select(0.0, exp(score - new_max), seen);
        scores[thread] = w;
        reduced[thread] = w;
        workgroupBarrier();
        for (var half = KEYS / 2u; half > 0u; half /= 2u) {
            if thread < half {
                reduced[thread] += reduced[thread + half];
            }
            workgroupBarrier();
        }
        let shrink = select(exp(running_max - new_max), 0.0, running_max == LOWEST);
        total = total * shrink + reduced[0];
        running_max = new_max;

        // 3. Values, in rising key.
        let count = min(KEYS, position + 1u - start);
        for (var i = 0u; i < OWNED; i++) {
            let e = thread + i * KEYS;
            if e < e_count {
                var sum = sums[i] * shrink;
                for (var j = 0u; j < count; j++) {
                    let block = tables[row.w + (start + j) / P];
                    let at = ((block * p.kv_heads + kv_head) * P + (start + j) % P) * e_count + e;
                    sum = fma(scores[j], values[at], sum);
                }
                sums[i] = sum;
            }
        }
        workgroupBarrier();
    }

    for (var i = 0u; i < OWNED; i++) {
        let e = thread + i * KEYS;
        if e < e_count {
            out[q_start + e] = sums[i] / total;
        }
    }
}
