// adjust_logits: changes rows of logits in place before tokens are drawn from them.
//
//   edits of row m:  l' = penalise(l + bias) − subtract, where penalise(x) = x / penalty if x > 0, else x · penalty
//   then             l' = −Inf for every token without a bit in the row's mask
//
// A workgroup owns row m: its lanes take the edits in turns, wait for each other, then apply the mask to the ids
// lane, lane + 256, … Rows that are not active, or ask for neither, stay as they are. `raw` keeps the model's logit.

struct Params {
    rows: u32,
    vocab: u32,
    first: u32,
}

struct Request {
    uniform_number: f32,
    inverse_temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    typical_p: f32,
    first_edit: u32,
    edit_count: u32,
    mask_row: u32,
    kept_ids: u32,
    is_active: u32,
}

struct Edit {
    token: u32,
    bias: f32,
    penalty: f32,
    subtract: f32,
    raw: f32,
}

const LANES = 256u;
const NO_MASK = 0xffffffffu;

var<immediate> p: Params;
@group(0) @binding(1) var<storage, read> requests: array<Request>; // (first + M)
@group(0) @binding(2) var<storage, read> masks: array<u32>; // (rows with a mask, ⌈V / 32⌉) one bit a token
@group(0) @binding(3) var<storage, read_write> edits: array<Edit>; // (edits of all rows)
@group(0) @binding(4) var<storage, read_write> logits: array<f32>; // (M, V)

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let m = group.y * groups.x + group.x;
    let r = requests[p.first + min(m, p.rows - 1u)];
    let works = m < p.rows && r.is_active == 1u;
    let start = m * p.vocab;

    // 1. Edits: no token twice, so no two lanes share a logit.
    if works {
        for (var i = lane; i < r.edit_count; i += LANES) {
            let e = edits[r.first_edit + i];
            let logit = logits[start + e.token];
            let biased = logit + e.bias;
            let penalised = select(biased * e.penalty, biased / e.penalty, biased > 0.0);
            edits[r.first_edit + i].raw = logit;
            logits[start + e.token] = penalised - e.subtract;
        }
    }
    storageBarrier();

    // 2. The mask. −Inf as a constant is not WGSL.
    if works && r.mask_row != NO_MASK {
        let lowest = bitcast<f32>(0xff800000u | (p.rows & 0u));
        let words = (p.vocab + 31u) / 32u;
        for (var v = lane; v < p.vocab; v += LANES) {
            if (masks[r.mask_row * words + v / 32u] >> (v % 32u) & 1u) == 0u {
                logits[start + v] = lowest;
            }
        }
    }
}
