"""Joins what benches/gpu.sh collected into one Markdown table, on stdout.

    python benches/peers/gpu_table.py FOLDER

FOLDER has steps.jsonl (a line a step: step, ok, status, seconds, log), and for each model NAME.bench.jsonl from
`rewardrt bench --json --profile`, NAME.free.jsonl from the same with --batch-variant, and NAME.peer.jsonl from gpu.py; limits.peer.jsonl is gpu.py --limits. Whatever is
missing leaves its cells empty; a step that failed has a row, with the last line of its log. Needs nothing but Python.

A ratio is rewardrt's speed over transformers'. "of read" and "of flops" are what rewardrt's kernels must move and
compute by count, over the median time of the whole job, as a share of the device's limits: the higher of what rewardrt
and torch measured.
"""

import json
import sys
from pathlib import Path

HEADER = ["model", "job", "rewardrt tokens/s", "ms a step", "transformers tokens/s", "ms a step", "ratio", "of read",
          "of flops", "notes"]


def read(path):
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:  # a warning of some library, or a line cut off when the step was ended
            continue
    return [line for line in lines if isinstance(line, dict)]


def number(value, digits=0):
    return "" if value is None else f"{value:.{digits}f}"


def percent(part, whole):
    return f"{100 * part / whole:.0f} %" if part and whole else ""


def name_of(job):
    name = {"logprobs": "log-probs", "score": "scores"}.get(job["job"], job["job"])
    return f"{name} {job['sequences']} x {job['tokens']}"


def best_limits(lines):
    """The highest of each, over all who measured."""
    measured = [line.get("limits") if line.get("job") != "limits" else line for line in lines]
    measured = [m for m in measured if m]
    return {key: max((m[key] for m in measured), default=None) for key in ("bytes_per_second", "flops")}


def row(model, ours, theirs, free, limits):
    kernels = ours.get("kernels", [])
    speed, their_speed = ours.get("tokens_per_second"), theirs.get("tokens_per_second")

    def share(what, limit):
        return percent(sum(k[what] for k in kernels) / ours["seconds"], limits[limit]) if kernels else ""

    how = f"transformers: {theirs['how']}" if "how" in theirs else theirs.get("error", "")
    if theirs.get("fallback"):
        how += f" ({theirs['fallback']})"
    if speed and free.get("tokens_per_second"):
        gain = 100 * (free["tokens_per_second"] / speed - 1)
        how = "; ".join(filter(None, [how, f"without the determinism contract {gain:+.1f} %"]))
    return [model, name_of(ours or theirs), number(speed), number(ours.get("step_ms"), 2), number(their_speed),
            number(theirs.get("step_ms"), 2), number(speed / their_speed, 2) if speed and their_speed else "",
            share("bytes", "bytes_per_second"), share("flops", "flops"), how]


def rows_of(model, ours, theirs, free, limits):
    def keyed(lines):
        return {(x["job"], x["sequences"], x["tokens"]): x for x in lines if "sequences" in x}

    ours, theirs, free = keyed(ours), keyed(theirs), keyed(free)
    return [row(model, ours.get(key, {}), theirs.get(key, {}), free.get(key, {}), limits) for key in dict.fromkeys([*ours, *theirs])]


def failure(step):
    log = Path(step["log"])
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()] if log.exists() else []
    said = next((line for line in reversed(lines) if line), "no output")
    what = "timed out" if step["status"] in (124, 137) else f"FAILED with {step['status']}"
    return [step["step"], f"{what} after {step['seconds']} s", *[""] * (len(HEADER) - 3), said[:160]]


def print_table(rows):
    rows = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in r] for r in rows]
    widths = [max(len(r[i]) for r in [HEADER, *rows]) for i in range(len(HEADER))]

    def line(cells):
        left = (0, 1, len(HEADER) - 1)
        padded = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))]
        print(f"| {' | '.join(padded)} |")

    line(HEADER)
    line(["---" if i in (0, 1, len(HEADER) - 1) else "---:" for i in range(len(HEADER))])
    for cells in rows:
        line(cells)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    steps = list({step["step"]: step for step in read(folder / "steps.jsonl")}.values())  # the last run of each
    suffixes = (".bench.jsonl", ".peer.jsonl", ".free.jsonl")
    models = list(dict.fromkeys(p.name.removesuffix(s) for s in suffixes for p in sorted(folder.glob(f"*{s}"))))
    files = {model: [read(folder / (model + s)) for s in suffixes] for model in models}
    all_lines = [line for both in files.values() for lines in both for line in lines]
    limits = best_limits([line for line in all_lines if line.get("limits") or line.get("job") == "limits"])

    devices = dict.fromkeys(line["device"] for line in all_lines if line.get("device"))
    print(f"Device: {'; '.join(devices) or 'no step got so far as to say'}.", end=" ")
    read_limit, flops = limits["bytes_per_second"], limits["flops"]
    if read_limit:
        print(f"Limits, measured: {read_limit / 1e9:.0f} GB/s, {flops / 1e12:.2f} TFLOP/s.", end=" ")
    peers = dict.fromkeys(line["peer"] for line in all_lines if line.get("peer"))
    reasons = dict.fromkeys(line["reason"] for line in all_lines if line.get("job") == "none")
    print(f"Peer: {'; '.join([*peers, *reasons]) or 'none'}.")
    passed = sum(step["ok"] for step in steps)
    print(f"Steps: {passed} of {len(steps)} passed.\n")
    rows = [r for model, lines in files.items() for r in rows_of(model, *lines, limits)]
    print_table(rows + [failure(step) for step in steps if not step["ok"]])


if __name__ == "__main__":
    main()
