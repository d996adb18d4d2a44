// kv_write: puts each row's key and value into its slot of the paged cache.
//
//   keys[block, g, e, place] = k[t, g, e],  values[block, g, place, e] = v[t, g, e]       slot = block·P + place
//
// A workgroup owns row t. No two rows of a step share a slot.

struct Params {
    rows: u32,
    kv_heads: u32,
    head_dim: u32,
}

const P = 16u;

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> rows: array<vec4<u32>>; // (T) token, position, slot, table
@group(0) @binding(2) var<storage, read> k: array<f32>; // (T, G, E)
@group(0) @binding(3) var<storage, read> v: array<f32>; // (T, G, E)
@group(0) @binding(4) var<storage, read_write> keys: array<f32>; // (blocks, G, E, P)
@group(0) @binding(5) var<storage, read_write> values: array<f32>; // (blocks, G, P, E)

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
    let slot = rows[t].z;
    let width = p.kv_heads * p.head_dim;
    for (var i = local; i < width; i += 64u) {
        let e = i % p.head_dim;
        let start = (slot / P * p.kv_heads + i / p.head_dim) * p.head_dim * P;
        keys[start + e * P + slot % P] = k[t * width + i];
        values[start + slot % P * p.head_dim + e] = v[t * width + i];
    }
}
