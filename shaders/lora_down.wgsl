// lora_down: the first factor of each row's adapter.
//
//   down[t, 1 + j] = scale · its scale · Σ_k x[t, k] · a[j, k]   with a of the adapter that row t has
//   down[t, 0] = the row's slot, as bits
//
// A workgroup owns 8 elements of a row; those of a row without an adapter, and beyond what its adapter has, are nobody's.
// 32 lanes share an element: lane i takes the elements i, i + 32, … in rising k, then the lanes are added by halves. So
// the order depends on K alone. Sums in f32; x may be f16, divided by `scale` and by a scale of the adapter's own, powers of
// two.

#if F16
enable f16;
#endif

struct Params {
    rows: u32,
    k: u32,
    first_meta: u32,
    parts: u32,
    scale: f32,
}

const NO_ADAPTER = 0xffffffffu;
const LANES = 32u;
const COLS = 8u;
const THREADS = 256u;

var<immediate> p: Params;
#if HALF_IN
@group(0) @binding(1) var<storage, read> x: array<f16>; // (T, K)
#else
@group(0) @binding(1) var<storage, read> x: array<f32>; // (T, K)
#endif
@group(0) @binding(2) var<storage, read> slots: array<u32>; // (first_meta + T) the slot of a row's adapter, or NO_ADAPTER
@group(0) @binding(3) var<storage, read> adapters: array<u32>; // (1) stride of down, (slots, 4) a, b, rank, scale; then factors
@group(0) @binding(4) var<storage, read_write> down: array<u32>; // (T, stride) a slot, then f32

var<workgroup> sums: array<f32, THREADS>;

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let t = group.x;
    let lane = thread % LANES;
    let j = group.y * COLS + thread / LANES;
    let slot = slots[p.first_meta + t];
    var count = 0u;
    var a = 0u;
    var scale = p.scale;
    if slot != NO_ADAPTER {
        a = adapters[4u + 4u * slot];
        count = p.parts * adapters[4u + 4u * slot + 2u];
        scale *= bitcast<f32>(adapters[4u + 4u * slot + 3u]);
    }
    // 1. Each lane's share.
    var sum = 0.0;
    if j < count {
        let row = a + j * p.k;
        for (var k = lane; k < p.k; k += LANES) {
            sum = fma(bitcast<f32>(adapters[row + k]), f32(x[t * p.k + k]), sum);
        }
    }
    sums[thread] = sum;
    workgroupBarrier();
    // 2. The sum of the lanes.
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        if lane < half {
            sums[thread] += sums[thread + half];
        }
        workgroupBarrier();
    }
    // 3. Out.
    let at = t * adapters[0];
    if lane == 0u && j < count {
        down[at + 1u + j] = bitcast<u32>(sums[thread] * scale);
    }
    if group.y == 0u && thread == 0u {
        down[at] = slot;
    }
}
