// embed: token ids to vectors.
//
//   out[t, d] = table[token[t], d]                                                        as f32
//
// A workgroup owns row t. Where the token's highest bit is set, the rest of it says which draw of an earlier step is the
// token: so a step can follow another one before the host has seen what was drawn.
//
// The table may be bound in slices of rows; rows whose token is in another slice are left alone. Its rows are `stride`
// elements apart, a whole number of u32; or (TILES) it is packed as include/tiles.wgsl says.

#if F16
enable f16;
#endif

struct Params {
    rows: u32,
    width: u32,
    stride: u32,
    first: u32,
    count: u32,
    first_meta: u32,
    first_drawn: u32,
}

const FROM_DRAW = 0x80000000u;
const NO_TOKEN = 0xffffffffu;
// Words of what a draw leaves; the first is the token.
const DRAWN = 6u;

var<immediate> p: Params;
@group(0) @binding(1) var<storage, read> rows: array<vec4<u32>>; // (first_meta + T) token, position, slot, table
@group(0) @binding(2) var<storage, read> drawn: array<u32>; // (draws of earlier steps, DRAWN)
#if HALF_TABLE
@group(0) @binding(3) var<storage, read> table: array<f16>; // (count, stride)
#else
@group(0) @binding(3) var<storage, read> table: array<u32>; // (count, stride) in its dtype, packed
#endif
@group(0) @binding(4) var<storage, read_write> out: array<f32>; // (T, D)

#include half_value

#if TILES
#if TILE8
const TILE = 8u;
#else
const TILE = 16u;
#endif
#endif

fn element(row: u32, d: u32) -> f32 {
#if TILES
    let tile = row / TILE * (p.stride / TILE) + d / TILE;
    return f32(table[(tile * TILE + row % TILE) * TILE + d % TILE]);
#else
    let i = row * p.stride + d;
#if BF16
    let word = table[i / 2u];
    return bitcast<f32>(select(word << 16u, word & 0xffff0000u, i % 2u == 1u));
#else
#if HALF_TABLE
    return f32(table[i]);
#else
#if F16_WEIGHTS
    return half_value(table[i / 2u] >> (i % 2u * 16u) & 0xffffu);
#else
    return bitcast<f32>(table[i]);
#endif
#endif
#endif
#endif
}

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
    var token = rows[p.first_meta + t].x;
    if token >= FROM_DRAW {
        token = drawn[(p.first_drawn + token - FROM_DRAW) * DRAWN];
        // A row without a draw ends in an error that the host will see.
        if token == NO_TOKEN {
            token = 0u;
        }
    }
    if token < p.first || token >= p.first + p.count {
        return;
    }
    for (var d = local; d < p.width; d += 64u) {
        out[t * p.width + d] = element(token - p.first, d);
    }
}
