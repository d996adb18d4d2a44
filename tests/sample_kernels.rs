//! Twins of `adjust_logits` and `sample`: every CPU path and the shaders against the definition, written out here in
//! f64, and against what transformers' warpers keep (tests/real/make_controls.py).
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;

use std::sync::OnceLock;

use bytemuck::{bytes_of, cast_slice, pod_collect_to_vec};
use common::{devices, isas};
use rewardrt::backend::gpu::{Flags, Gpu, GpuOptions, Selection, dispatch_once};
use rewardrt::kernels::adjust_logits::{self, Edit};
use rewardrt::kernels::{sample, top_k};
use serde_json::Value;

const NOTHING: f32 = f32::NEG_INFINITY;

/// Every device, and once more with every index and loop of a shader checked.
fn gpus() -> &'static [Gpu] {
    static GPUS: OnceLock<Vec<Gpu>> = OnceLock::new();
    GPUS.get_or_init(|| {
        let names: Vec<String> = devices().into_iter().filter(|d| d != "cpu").collect();
        let open = |name: &String| {
            let with = |shader_checks| GpuOptions { shader_checks, ..GpuOptions::default() };
            let selection = Selection::parse(name).unwrap();
            [false, true].map(|checks| Gpu::select(&selection, &with(checks)).unwrap().unwrap())
        };
        names.iter().flat_map(open).collect()
    })
}

/// A reproducible sequence of floats in (−1, 1).
fn numbers(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed;
    let next = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / 8_388_608.0) - 1.0
    };
    (0..n).map(next).collect()
}

/// What a row is sampled with.
#[derive(Clone)]
struct Case {
    request: sample::Request,
    edits: Vec<Edit>,
    mask: Option<Vec<u32>>,
}

fn case(request: sample::Request) -> Case {
    Case { request, edits: Vec::new(), mask: None }
}

/// What a row got, and the edits' raw logits.
struct Got {
    drawn: sample::Drawn,
    kept_ids: Vec<u32>,
    adjusted: Vec<f32>,
    raw: Vec<f32>,
}

/// The row on the CPU, as the backend runs it.
fn on_cpu(isa: rewardrt::kernels::Isa, logits: &[f32], case: &Case) -> Got {
    let (mut edits, mut adjusted, mut request) = (case.edits.clone(), logits.to_vec(), case.request);
    if case.mask.is_some() {
        request.mask_row = 0;
    }
    adjust_logits::adjust_logits(&mut edits, case.mask.as_deref(), &mut adjusted);
    let mut scratch = sample::Scratch::default();
    let mut drawn = sample::sample(isa, &adjusted, &request, &mut scratch);
    let kept_ids = sample::kept_ids(&adjusted, &request, &drawn, &scratch);
    if drawn.token != top_k::NO_TOKEN {
        drawn.logit = adjust_logits::raw_logit(&edits, &adjusted, drawn.token);
    }
    Got { drawn, kept_ids, adjusted, raw: edits.iter().map(|e| e.raw).collect() }
}

/// Several rows of the same logits in one dispatch of each shader.
fn on_gpu(gpu: &Gpu, logits: &[f32], cases: &[Case]) -> Vec<Got> {
    let (vocab, rows) = (logits.len() as u32, cases.len() as u32);
    // Behind a row of another step.
    let first = 1;
    let mut requests = vec![sample::Request { active: 0, ..sample::Request::default() }];
    let (mut edits, mut masks) = (Vec::<Edit>::new(), Vec::<u32>::new());
    for case in cases {
        let mut request = case.request;
        (request.first_edit, request.edit_count) = (edits.len() as u32, case.edits.len() as u32);
        edits.extend(&case.edits);
        if let Some(mask) = &case.mask {
            request.mask_row = (masks.len() / mask.len()) as u32;
            masks.extend(mask);
        }
        requests.push(request);
    }
    let some = |bytes: &[u8]| if bytes.is_empty() { vec![0; 32] } else { bytes.to_vec() };
    let all: Vec<f32> = cases.iter().flat_map(|_| logits).copied().collect();
    let requests = cast_slice::<_, u8>(&requests).to_vec();
    let params = adjust_logits::Params { rows, vocab, first };
    let mut storage = [requests.clone(), some(cast_slice(&masks)), some(cast_slice(&edits)), cast_slice(&all).to_vec()];
    let groups = [rows, 1, 1];
    dispatch_once(gpu, &adjust_logits::KERNEL, Flags::default(), bytes_of(&params), &mut storage, groups).unwrap();
    let [_, _, edits_after, adjusted] = storage;
    let params = sample::Params { rows, vocab, first };
    let drawn = vec![0u8; requests.len() / size_of::<sample::Request>() * size_of::<sample::Drawn>()];
    let ids = vec![0u8; cases.len() * sample::MAX_KEPT_IDS * 4];
    let mut storage = [adjusted.clone(), requests, edits_after.clone(), drawn, ids];
    dispatch_once(gpu, &sample::KERNEL, Flags::default(), bytes_of(&params), &mut storage, groups).unwrap();
    let mut drawn: Vec<sample::Drawn> = pod_collect_to_vec(&storage[3]);
    assert_eq!(drawn.remove(0), bytemuck::Zeroable::zeroed());
    let ids: Vec<u32> = pod_collect_to_vec(&storage[4]);
    let adjusted: Vec<f32> = pod_collect_to_vec(&adjusted);
    let edits: Vec<Edit> = pod_collect_to_vec(&edits_after);
    let mut first_edit = 0;
    let got = |(i, case): (usize, &Case)| {
        let drawn = drawn[i];
        let kept_ids = match drawn.kept {
            kept if kept == 0 || kept > case.request.kept_ids => Vec::new(),
            _ if case.request.inverse_temperature < 0.0 => vec![drawn.token],
            kept => ids[i * sample::MAX_KEPT_IDS..][..kept as usize].to_vec(),
        };
        let raw = edits[first_edit..first_edit + case.edits.len()].iter().map(|e| e.raw).collect();
        first_edit += case.edits.len();
        let adjusted = adjusted[i * logits.len()..(i + 1) * logits.len()].to_vec();
        Got { drawn, kept_ids, adjusted, raw }
    };
    cases.iter().enumerate().map(got).collect()
}

/// The row after edits and mask, by their definition.
fn adjusted_by_definition(logits: &[f32], case: &Case) -> Vec<f32> {
    let mut out = logits.to_vec();
    for e in &case.edits {
        let biased = logits[e.token as usize] + e.bias;
        out[e.token as usize] = if biased > 0.0 { biased / e.penalty } else { biased * e.penalty } - e.subtract;
    }
    if let Some(mask) = &case.mask {
        for (v, l) in out.iter_mut().enumerate() {
            if mask[v / 32] >> (v % 32) & 1 == 0 {
                *l = NOTHING;
            }
        }
    }
    out
}

/// The kept tokens and their probabilities, by sorting.
fn kept_by_definition(adjusted: &[f32], r: &sample::Request) -> (Vec<usize>, Vec<f64>) {
    let z: Vec<f32> = adjusted
        .iter()
        .map(|l| if r.inverse_temperature == 0.0 && *l == NOTHING { NOTHING } else { l * r.inverse_temperature })
        .collect();
    let max = z.iter().copied().fold(NOTHING, f32::max);
    let w = |v: usize| (f64::from(z[v]) - f64::from(max)).exp();
    let mut order: Vec<usize> = (0..z.len()).filter(|v| z[*v] > NOTHING).collect();
    order.sort_by(|a, b| z[*b].total_cmp(&z[*a]));
    let mut floor = f32::MIN;
    if r.top_k > 0 && (r.top_k as usize) < order.len() {
        floor = z[order[r.top_k as usize - 1]];
    }
    if r.top_p < 1.0 {
        let left: Vec<usize> = order.iter().copied().filter(|v| z[*v] >= floor).collect();
        let wanted = f64::from(r.top_p) * left.iter().map(|v| w(*v)).sum::<f64>();
        let mut mass = 0.0;
        for v in left {
            mass += w(v);
            if mass >= wanted {
                floor = floor.max(z[v]);
                break;
            }
        }
    }
    if r.min_p > 0.0 {
        floor = floor.max((max + r.min_p.ln()).min(max));
    }
    let mut kept: Vec<usize> = (0..z.len()).filter(|v| z[*v] >= floor).collect();
    if r.typical_p < 1.0 {
        // Without a probability there is no surprise.
        kept.retain(|v| w(*v) > 0.0);
        let total: f64 = kept.iter().map(|v| w(*v)).sum();
        let surprise = |v: usize| -(w(v) / total).ln();
        let entropy: f64 = kept.iter().map(|v| w(*v) / total * surprise(*v)).sum();
        let mut near = kept.clone();
        near.sort_by(|a, b| (surprise(*a) - entropy).abs().total_cmp(&(surprise(*b) - entropy).abs()));
        let mut mass = 0.0;
        let mut most = 0.0;
        for v in near {
            mass += w(v) / total;
            most = (surprise(v) - entropy).abs();
            if mass >= f64::from(r.typical_p) {
                break;
            }
        }
        // Equal z have equal deviations; rounding must not part them.
        kept.retain(|v| (surprise(*v) - entropy).abs() <= most + 1e-9);
    }
    let total: f64 = kept.iter().map(|v| w(*v)).sum();
    let p = kept.iter().map(|v| w(*v) / total).collect();
    (kept, p)
}

fn mask_of(vocab: usize, keep: impl Fn(usize) -> bool) -> Option<Vec<u32>> {
    let mut mask = vec![0u32; vocab.div_ceil(32)];
    (0..vocab).filter(|v| keep(*v)).for_each(|v| mask[v / 32] |= 1 << (v % 32));
    Some(mask)
}

fn edit(token: usize, bias: f32, penalty: f32, subtract: f32) -> Edit {
    Edit { token: token as u32, bias, penalty, subtract, raw: f32::NAN }
}

fn cases(vocab: usize) -> Vec<Case> {
    let base = sample::Request { kept_ids: 1024, ..sample::Request::default() };
    let requests = [
        base,
        sample::Request { inverse_temperature: 1.0 / 0.6, ..base },
        sample::Request { top_k: 1, ..base },
        sample::Request { top_k: 7, ..base },
        sample::Request { top_k: 1_000_000, ..base },
        sample::Request { top_p: 0.0, ..base },
        sample::Request { top_p: 0.37, ..base },
        sample::Request { top_p: 0.95, inverse_temperature: 0.3, ..base },
        sample::Request { min_p: 0.02, ..base },
        sample::Request { min_p: 1.0, ..base },
        sample::Request { typical_p: 0.2, ..base },
        sample::Request { typical_p: 0.9, inverse_temperature: 0.5, ..base },
        sample::Request { typical_p: 0.0, ..base },
        sample::Request { typical_p: 0.6, top_k: 40, top_p: 0.97, min_p: 0.001, kept_ids: 3, ..base },
        sample::Request { top_k: 40, top_p: 0.9, min_p: 0.01, inverse_temperature: 1.25, ..base },
        sample::Request { inverse_temperature: 0.0, kept_ids: 0, ..base },
        sample::Request { inverse_temperature: -1.0, ..base },
    ];
    let last = vocab - 1;
    let penalties: Vec<Edit> = (0..vocab).step_by(3).map(|v| edit(v, 0.0, 1.3, 0.1 * (v % 4) as f32)).collect();
    let biases = vec![edit(0, -3.0, 1.0, 0.0), edit(last, 4.5, 1.5, 0.25)];
    let mut all = Vec::new();
    for request in requests {
        let plain = case(request);
        all.push(Case { edits: penalties.clone(), ..plain.clone() });
        all.push(Case { edits: biases.clone(), mask: mask_of(vocab, |v| v % 2 == 1 || v == last), ..plain.clone() });
        all.push(Case { mask: mask_of(vocab, |v| v == last), ..plain.clone() });
        all.push(plain);
    }
    all
}

fn rows(vocab: usize) -> Vec<Vec<f32>> {
    let spread: Vec<f32> = numbers(vocab as u64, vocab).iter().map(|l| l * 6.0).collect();
    let ties: Vec<f32> = spread.iter().map(|l| (l / 2.0).round()).collect();
    let sharp: Vec<f32> = spread.iter().map(|l| l * 12.0).collect();
    vec![spread, ties, sharp, vec![-0.0; vocab]]
}

fn check(what: &str, logits: &[f32], case: &Case, got: &Got) {
    let (r, drawn) = (&case.request, &got.drawn);
    let what = format!("{what} V{} {r:?}: {drawn:?}", logits.len());
    let adjusted = adjusted_by_definition(logits, case);
    for (v, (got, want)) in got.adjusted.iter().zip(&adjusted).enumerate() {
        assert!(got == want || (got - want).abs() <= 1e-6 * want.abs().max(1.0), "{what} logit {v}: {got} {want}");
    }
    let raw: Vec<f32> = case.edits.iter().map(|e| logits[e.token as usize]).collect();
    assert_eq!(got.raw, raw, "{what}");
    // From here on what was adjusted is given: edits may round differently on a device.
    let greedy = r.inverse_temperature < 0.0;
    let (kept, p) = if greedy {
        let best =
            (0..logits.len()).rev().max_by(|a, b| got.adjusted[*a].total_cmp(&(got.adjusted[*b] + 0.0))).unwrap();
        let best = (0..logits.len()).find(|v| got.adjusted[*v] == got.adjusted[best]).unwrap();
        (vec![best], vec![1.0])
    } else {
        kept_by_definition(&got.adjusted, r)
    };
    assert_eq!(drawn.kept as usize, kept.len(), "{what}");
    let place = kept.iter().position(|v| *v == drawn.token as usize).unwrap_or_else(|| panic!("{what}"));
    // The draw lies where the uniform number falls in the cumulative distribution, up to rounding.
    let (below, u) = (p[..place].iter().sum::<f64>(), f64::from(r.uniform));
    assert!(greedy || (below <= u + 1e-5 && u <= below + p[place] + 1e-5), "{what}: {below}");
    let want = p[place].ln();
    assert!((f64::from(drawn.logprob) - want).abs() < 2e-5 * want.abs().max(1.0), "{what}: {want}");
    assert_eq!(drawn.logit, logits[drawn.token as usize], "{what}");
    if kept.len() == 1 {
        assert_eq!(drawn.logprob, 0.0, "{what}");
    }
    let ids: Vec<u32> = kept.iter().map(|v| *v as u32).collect();
    let reported = if kept.len() <= r.kept_ids as usize { ids } else { Vec::new() };
    assert_eq!(got.kept_ids, reported, "{what}");
    // Threshold and ceiling rebuild the set.
    if !greedy {
        let z = |l: f32| if r.inverse_temperature == 0.0 && l == NOTHING { l } else { l * r.inverse_temperature };
        let inside = |v: &usize| (drawn.threshold..=drawn.ceiling).contains(&z(got.adjusted[*v]));
        assert_eq!((0..logits.len()).filter(inside).collect::<Vec<_>>(), kept, "{what}");
    }
}

#[test]
fn twins_follow_the_definition() {
    let uniforms = [0.0f32, 1e-7, 0.37, 0.83, 0.999_999_9];
    for vocab in [3usize, 100, 1333] {
        for logits in rows(vocab) {
            let cases: Vec<Case> = cases(vocab)
                .into_iter()
                .flat_map(|c| {
                    uniforms.map(|uniform| Case { request: sample::Request { uniform, ..c.request }, ..c.clone() })
                })
                .collect();
            for isa in isas() {
                for case in &cases {
                    check(isa.name(), &logits, case, &on_cpu(isa, &logits, case));
                }
            }
            for gpu in gpus() {
                for cases in cases.chunks(60) {
                    for (case, got) in cases.iter().zip(on_gpu(gpu, &logits, cases)) {
                        check("gpu", &logits, case, &got);
                    }
                }
            }
        }
    }
}

/// Vocabularies around the shader's tiles, and rows that are hard on its searches.
#[test]
fn sizes_and_extremes() {
    let off = sample::Request { uniform: 0.37, kept_ids: 1024, ..sample::Request::default() };
    for vocab in [1usize, 2, 255, 256, 257, 1000, 49152, 151_936] {
        let spread: Vec<f32> = numbers(vocab as u64, vocab).iter().map(|l| l * 8.0).collect();
        let steps: Vec<f32> = spread.iter().map(|l| (l * 2.0).round() / 2.0).collect();
        let two: Vec<f32> = (0..vocab).map(|v| if v % 7 == 3 { -1.0 } else { 0.5 }).collect();
        let mut outlier = steps.clone();
        outlier[vocab / 2] = -1e36;
        let most = vocab as u32;
        let exact = [
            case(off),
            case(sample::Request { inverse_temperature: -1.0, ..off }),
            case(sample::Request { uniform: 0.999_999_9, inverse_temperature: 0.01, ..off }),
            case(sample::Request { top_k: 1, ..off }),
            case(sample::Request { top_k: most / 3, ..off }),
            case(sample::Request { top_k: most - 1, ..off }),
            case(sample::Request { top_k: most, ..off }),
            case(sample::Request { top_k: 900, ..off }),
            case(sample::Request { min_p: 0.3, inverse_temperature: 100.0, ..off }),
            Case { mask: mask_of(vocab, |v| v == vocab / 2), ..case(sample::Request { top_k: 3, top_p: 0.5, ..off }) },
        ];
        // Where the mass that decides has many summands, the sets are only told apart if many of them are equal.
        let summed = [
            case(sample::Request { top_p: 1e-6, ..off }),
            case(sample::Request { top_p: 0.9999, ..off }),
            case(sample::Request { top_p: 0.9, inverse_temperature: 100.0, ..off }),
            case(sample::Request { top_p: 0.43, inverse_temperature: 0.01, ..off }),
            case(sample::Request { typical_p: 0.3, ..off }),
            case(sample::Request { typical_p: 0.93, top_k: most / 2 + 1, min_p: 1e-4, ..off }),
        ];
        for (logits, is_summed) in
            [(spread, vocab < 1000), (steps, true), (vec![0.25; vocab], true), (two, true), (outlier, true)]
        {
            let mut cases = exact.to_vec();
            cases.extend(summed.iter().filter(|_| is_summed).cloned());
            for gpu in gpus() {
                let together = on_gpu(gpu, &logits, &cases);
                for (case, got) in cases.iter().zip(&together) {
                    check("gpu", &logits, case, got);
                }
                // A row's result has the same bits alone.
                let last = cases.len() - 1;
                let alone = &on_gpu(gpu, &logits, &cases[last..])[0];
                assert_eq!(bytes_of(&alone.drawn), bytes_of(&together[last].drawn));
                assert_eq!(alone.kept_ids, together[last].kept_ids);
            }
        }
    }
}

/// Rows without a distribution are reported as such, not drawn from; tokens that the model itself makes impossible are.
#[test]
fn broken_rows() {
    let plain = sample::Request::default();
    let forbidden = Case { mask: Some(vec![0]), ..case(plain) };
    let rows = [
        (vec![1.0, f32::NAN, 2.0], case(plain), true),
        (vec![1.0, f32::INFINITY, 2.0], case(plain), true),
        (vec![1.0, f32::INFINITY, 2.0], case(sample::Request { inverse_temperature: 0.0, ..plain }), true),
        (vec![1.0, f32::NAN, 2.0], case(sample::Request { inverse_temperature: 0.0, ..plain }), true),
        (vec![NOTHING; 3], case(plain), true),
        (vec![1.0, 2.0, 3.0], forbidden, true),
        (vec![NOTHING, 2.0, NOTHING], case(plain), false),
        (vec![NOTHING, 2.0, NOTHING], case(sample::Request { typical_p: 0.5, top_k: 2, ..plain }), false),
        (vec![NOTHING, 2.0, NOTHING], case(sample::Request { inverse_temperature: 0.0, ..plain }), false),
    ];
    for (logits, case, broken) in rows {
        let mut all: Vec<Got> = isas().into_iter().map(|isa| on_cpu(isa, &logits, &case)).collect();
        all.extend(gpus().iter().flat_map(|gpu| on_gpu(gpu, &logits, std::slice::from_ref(&case))));
        for got in all {
            let want = if broken { top_k::NO_TOKEN } else { 1 };
            assert_eq!(got.drawn.token, want, "{logits:?}");
            assert!(got.drawn.logprob.is_nan() == broken, "{logits:?}: {:?}", got.drawn);
        }
    }
}

/// The sets and log-probabilities that transformers' warpers leave.
#[test]
fn warpers_of_transformers() {
    let text = std::fs::read_to_string(format!("{}/tests/real/controls.json", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let json: Value = serde_json::from_str(&text).unwrap();
    let number = |v: &Value| v.as_f64().unwrap() as f32;
    let rows: Vec<Vec<f32>> = json["warpers"]["rows"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row.as_array().unwrap().iter().map(number).collect())
        .collect();
    let wanted = json["warpers"]["cases"].as_array().unwrap();
    assert!(wanted.len() >= 200);
    // All cases of a row go to a device together: building the pipeline is what takes time there.
    for (r, logits) in rows.iter().enumerate() {
        let wanted: Vec<&Value> = wanted.iter().filter(|w| w["row"].as_u64() == Some(r as u64)).collect();
        let cases: Vec<Case> = wanted
            .iter()
            .flat_map(|want| {
                let or = |name: &str, off: f32| want["settings"].get(name).map_or(off, number);
                [0.0, 0.2, 0.5, 0.9].map(|uniform| {
                    case(sample::Request {
                        uniform,
                        inverse_temperature: 1.0 / or("temperature", 1.0),
                        top_k: or("top_k", 0.0) as u32,
                        top_p: or("top_p", 1.0),
                        min_p: or("min_p", 0.0),
                        typical_p: or("typical_p", 1.0),
                        kept_ids: 1024,
                        ..sample::Request::default()
                    })
                })
            })
            .collect();
        let on_isa = |isa| cases.iter().map(|c| on_cpu(isa, logits, c)).collect();
        let mut all: Vec<Vec<Got>> = isas().into_iter().map(on_isa).collect();
        all.extend(gpus().iter().map(|gpu| on_gpu(gpu, logits, &cases)));
        for (i, got) in all.iter().flat_map(|got| got.iter().enumerate()) {
            let want = wanted[i / 4];
            let kept: Vec<u32> = want["kept"].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect();
            let logprobs: Vec<f32> = want["logprobs"].as_array().unwrap().iter().map(number).collect();
            assert_eq!(got.kept_ids, kept, "{want}");
            let place = kept.iter().position(|v| *v == got.drawn.token).unwrap();
            assert!((got.drawn.logprob - logprobs[place]).abs() < 1e-4, "{want}: {:?}", got.drawn);
        }
    }
}
