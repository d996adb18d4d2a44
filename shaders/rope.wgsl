// rope: rotates each head by its position.
//
//   (a, b) ← (a·cos − b·sin, b·cos + a·sin)   for a = x[t, h, i], b = x[t, h, i + E/2]
//
// A thread owns a pair; a workgroup owns row t. The angles come from the host, the same for both backends.

struct Params {
    rows: u32,
    heads: u32,
    half: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> cos_sin: array<f32>; // (T, 2, E/2)
@group(0) @binding(2) var<storage, read_write> x: array<f32>; // (T, heads, E)

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = group.y * groups.x + group.x;
    if t >= p.rows {
        return;
    }
    for (var pair = local; pair < p.heads * p.half; pair += 64u) {
        let i = pair % p.half;
        let low = (t * p.heads + pair / p.half) * 2u * p.half + i;
        let c = cos_sin[t * 2u * p.half + i];
        let s = cos_sin[t * 2u * p.half + p.half + i];
        let a = x[low];
        let b = x[low + p.half];
        x[low] = a * c - b * s;
        x[low + p.half] = b * c + a * s;
    }
}
