// top_k: the K largest logits of a row, largest first; of equal ones the smaller id first.
//
//   best[m, i] = (token, logit) with i larger ones before it
//
// A workgroup owns row m. K rounds: each lane finds the best of its tokens that comes after the last one found, then
// the lanes are compared by halves. NaN is never among the best; missing places are token 0xffffffff.

struct Params {
    rows: u32,
    vocab: u32,
    k: u32,
}

struct Candidate {
    token: u32,
    logit: f32,
}

const LANES = 256u;
const NO_TOKEN = 0xffffffffu;
const LOWEST = -3.4028234e38;

var<immediate> p: Params;
@group(0) @binding(1) var<storage, read> logits: array<f32>; // (M, V)
@group(0) @binding(2) var<storage, read_write> best: array<Candidate>; // (M, K)

var<workgroup> found: array<Candidate, LANES>;

fn before(a: Candidate, b: Candidate) -> bool {
    if b.token == NO_TOKEN {
        return a.token != NO_TOKEN;
    }
    return a.token != NO_TOKEN && (a.logit > b.logit || (a.logit == b.logit && a.token < b.token));
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let m = group.y * groups.x + group.x;
    let start = min(m, p.rows - 1u) * p.vocab;
    var last = Candidate(NO_TOKEN, 0.0);
    for (var i = 0u; i < p.k; i++) {
        var mine = Candidate(NO_TOKEN, LOWEST);
        for (var v = lane; v < p.vocab; v += LANES) {
            let c = Candidate(v, logits[start + v]);
            let eligible = c.logit == c.logit && (i == 0u || before(last, c));
            if eligible && before(c, mine) {
                mine = c;
            }
        }
        found[lane] = mine;
        workgroupBarrier();
        for (var half = LANES / 2u; half > 0u; half /= 2u) {
            if lane < half && before(found[lane + half], found[lane]) {
                found[lane] = found[lane + half];
            }
            workgroupBarrier();
        }
        // After the last token there is nothing: NO_TOKEN comes before nothing, so the rest stays empty.
        last = found[0];
        workgroupBarrier();
        if lane == 0u && m < p.rows {
            best[m * p.k + i] = last;
        }
    }
}
