#!/usr/bin/env bash
# Tests and times rewardrt on a GPU, unattended, and prints one Markdown table for benches/RESULTS.md.
#
#     benches/gpu.sh [devices] [tests] [limits] [bench] [large]
#
# Without a part named it does all but the last, from scratch; parts by name join what earlier calls left in the table.
#
#   devices  what there is
#   tests    the test binaries that run on a device, on this one
#   limits   what torch measures of the device
#   bench    each model: made of random weights, timed here, timed with transformers, deleted
#   large    a model of 5 GB with tensors beyond 2 GiB: log-probs as the CPU has them
#
# With cargo it builds what it needs; without, it takes target/release/rewardrt and target/release/deps/NAME-*. A step that
# fails has a row in the table and does not stop the rest; the exit status is 0 if every step passed.
#
#   REWARDRT_GPU_DEVICE   the device [gpu]
#   REWARDRT_GPU_CONFIGS  config.json files, by spaces [the three in benches/configs, small ones first]
#   REWARDRT_GPU_QUICK=1  a smoke test: a tiny model, one test binary, transformers on the CPU and not compiled
#   REWARDRT_SCRATCH      where models, results and logs go [target/gpu-bench]
#   REWARDRT_STEP_SECONDS how long a step may take [1800]
#   REWARDRT_CARGO        cargo; empty: take the binaries that are there
#   REWARDRT_PYTHON       a Python with torch and transformers [.cache/venv-ref, else python3]
#   KEEP=1                keep the models
#   OUT                   a folder that the table (gpu.md), results and logs are copied to
set -euo pipefail
cd "$(dirname "$0")/.."

DEVICE=${REWARDRT_GPU_DEVICE:-gpu}
SCRATCH=${REWARDRT_SCRATCH:-target/gpu-bench}
SECONDS_A_STEP=${REWARDRT_STEP_SECONDS:-1800}
BINARY=target/release/rewardrt
PYTHON=${REWARDRT_PYTHON:-.cache/venv-ref/bin/python}
command -v "$PYTHON" >/dev/null || PYTHON=python3
CARGO=${REWARDRT_CARGO-$(command -v cargo || true)}
export XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-/tmp}

if [ "${REWARDRT_GPU_QUICK:-}" = 1 ]; then
    CONFIGS=${REWARDRT_GPU_CONFIGS:-tests/golden/llama-tied/config.json}
    TESTS=(golden)
    SIZES=(--sequences 1,4 --prompt-tokens 8 --tokens 8 --score 4x32 --repeat 1)
    PEER=(--device cpu --eager)
else
    CONFIGS=${REWARDRT_GPU_CONFIGS:-benches/configs/smollm2-135m.json benches/configs/llama-3.2-1b.json benches/configs/qwen2.5-7b.json}
    TESTS=(kernels gpu determinism schedules golden)
    SIZES=(--sequences 1,8,64,256 --prompt-tokens 32 --tokens 64 --score 64x512 --repeat 3)
    PEER=(--device cuda)
fi

PARTS=" ${*:-devices tests limits bench} "
for part in $PARTS; do
    case $part in
    devices | tests | limits | bench | large) ;;
    *) echo "gpu.sh: what is the part ${part@Q}? devices, tests, limits, bench and large are known" >&2 && exit 2 ;;
    esac
done
wants() { [[ $PARTS == *" $1 "* ]]; }

RESULTS=$SCRATCH/results
LOGS=$SCRATCH/logs
mkdir -p "$RESULTS" "$LOGS"
[ $# -gt 0 ] || rm -f "$RESULTS"/*.jsonl "$LOGS"/*.log
FAILED=0

# step NAME OUTPUT COMMAND…: runs the command, its stdout into OUTPUT (- for the log); notes how it ended.
step() {
    local name=$1 output=$2 log=$LOGS/${1// /-}.log status=0 begin=$SECONDS ok=true
    shift 2
    [ "$output" != - ] || output=$log
    : >"$output"
    echo "+ $*" >"$log"
    timeout -k 10 "$SECONDS_A_STEP" "$@" >>"$output" 2>>"$log" </dev/null || status=$?
    [ $status = 0 ] || ok=false FAILED=1
    printf '{"step": "%s", "ok": %s, "status": %d, "seconds": %d, "log": "%s"}\n' \
        "$name" $ok $status $((SECONDS - begin)) "$log" >>"$RESULTS/steps.jsonl"
    echo "$([ $ok = true ] && echo passed || echo "FAILED with $status"): $name, $((SECONDS - begin)) s" >&2
    return $status
}

# The newest binary of a test that was built beforehand.
prebuilt() {
    find target/release/deps -maxdepth 1 -type f -executable -name "$1-*" ! -name '*.*' -printf '%T@ %p\n' |
        sort -rn | sed -n '1s/^[^ ]* //p'
}

run_test() {
    local binary
    if [ -n "$CARGO" ]; then
        step "tests $1" - env REWARDRT_TEST_DEVICES="$DEVICE" "$CARGO" test --release --test "$1" || true
        return
    fi
    binary=$(prebuilt "$1")
    step "tests $1" - env REWARDRT_TEST_DEVICES="$DEVICE" "${binary:-no-binary-of-the-test-$1}" || true
}

run_model() {
    local config=$1 name model
    name=$(basename "$config" .json)
    [ "$name" != config ] || name=$(basename "$(dirname "$config")")
    model=$SCRATCH/$name
    rm -rf "$model" "$model".partial-*
    if step "synth $name" - "$BINARY" synth "$config" --out "$model"; then
        step "bench $name" "$RESULTS/$name.bench.jsonl" \
            "$BINARY" bench --model "$model" --device "$DEVICE" --json --profile "${SIZES[@]}" || true
        step "contract off $name" "$RESULTS/$name.free.jsonl" \
            "$BINARY" bench --model "$model" --device "$DEVICE" --json --batch-variant "${SIZES[@]}" || true
        step "peer $name" "$RESULTS/$name.peer.jsonl" \
            "$PYTHON" benches/peers/gpu.py "$model" "${PEER[@]}" "${SIZES[@]}" || true
    fi
    [ "${KEEP:-}" = 1 ] || rm -rf "$model"
}

run_large() {
    local model=$SCRATCH/large-vocab input=$SCRATCH/large-vocab.jsonl device
    rm -rf "$model" "$model".partial-*
    # Tokens of both ends of the vocabulary, and around multiples of a slice's rows.
    echo '{"ids": [1, 599999, 524288, 32767, 32768, 262143, 104746, 3, 599998, 450000, 2]}' >"$input"
    if step "synth large-vocab" - "$BINARY" synth benches/configs/large-vocab.json --out "$model"; then
        for device in cpu "$DEVICE"; do
            step "large-vocab on ${device//:/-}" "$RESULTS/large-vocab.${device//:/-}.jsonl" "$BINARY" logprobs \
                --model "$model" --device "$device" --input "$input" --precision f32 --kv-tokens 512 -v || true
        done
        step "large-vocab agrees" - "$PYTHON" -c '
import json, sys
host, device = (json.load(open(path))["logprobs"][1:] for path in sys.argv[1:])
worst = max(abs(a - b) for a, b in zip(host, device, strict=True))
print(f"{len(host)} log-probs, {worst:.1e} apart at most")
sys.exit(worst > 1e-3)' "$RESULTS/large-vocab.cpu.jsonl" "$RESULTS/large-vocab.${DEVICE//:/-}.jsonl" || true
    fi
    [ "${KEEP:-}" = 1 ] || rm -rf "$model"
}

if [ -n "$CARGO" ]; then
    step "build" - "$CARGO" build --release --bin rewardrt || true
fi
if wants devices; then
    step "devices" - "$BINARY" devices --json || true
    cat "$LOGS/devices.log" >&2
fi
if wants tests; then
    for name in "${TESTS[@]}"; do run_test "$name"; done
fi
if wants limits; then
    step "limits" "$RESULTS/limits.peer.jsonl" "$PYTHON" benches/peers/gpu.py --limits "${PEER[@]}" || true
fi
if wants bench; then
    for config in $CONFIGS; do run_model "$config"; done
fi
if wants large; then
    run_large
fi

"$PYTHON" benches/peers/gpu_table.py "$RESULTS" | tee "$SCRATCH/gpu.md" || FAILED=1
if [ -n "${OUT:-}" ]; then
    mkdir -p "$OUT"
    cp -r "$SCRATCH/gpu.md" "$RESULTS" "$LOGS" "$OUT/"
fi
exit $FAILED
