"""Runs rewardrt and transformers on the same work, in turns, and prints the ratios.

    make bench-peers            (or: python benches/peers/transformers_peer.py MODEL BINARY [--rounds N] [--f32])

Both are timed inside their process, after loading and one warm-up: decode at 1, 8 and 64 sequences (43-token prompts,
48 new tokens, end-of-sequence ignored; prefill included on both sides), and log-probs of 16 texts of 256 tokens.
transformers runs bf16 with sdpa attention and a dynamic cache, its default; --f32 adds f32.
"""

import argparse
import json
import statistics
import subprocess
import time

import torch
from transformers import AutoModelForCausalLM

PROMPT, NEW = 43, 48


def prompts(count, length, vocab=40_000):
    g = torch.Generator().manual_seed(1)
    return torch.randint(100, vocab, (count, length), generator=g)


class Transformers:
    def __init__(self, path, dtype):
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()

    @torch.no_grad()
    def decode(self, batch):
        self.model.generate(prompts(batch, PROMPT), attention_mask=torch.ones(batch, PROMPT, dtype=torch.long),
                            max_new_tokens=NEW, min_new_tokens=NEW, do_sample=True, top_k=0, pad_token_id=0)

    @torch.no_grad()
    def score(self, count, length):
        ids = prompts(count, length)
        for row in ids.split(4):  # all 16 at once need 3 GB of logits
            logits = self.model(row).logits[:, :-1].float()
            logits.log_softmax(-1).gather(-1, row[:, 1:, None])


class Rewardrt:
    """The `work` example: reads one job a line, answers with its seconds."""

    def __init__(self, path, binary, threads):
        self.process = subprocess.Popen([binary, path, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, kind, rows, new=0):
        self.process.stdin.write(json.dumps({"kind": kind, "ids": rows.tolist(), "new": new}) + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("binary")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--f32", action="store_true")
    args = parser.parse_args()
    threads = torch.get_num_threads()
    ours = Rewardrt(args.model, args.binary, threads)
    peers = {"bf16": Transformers(args.model, torch.bfloat16)}
    if args.f32:
        peers["f32"] = Transformers(args.model, torch.float32)

    def timed(f, *a):
        start = time.perf_counter()
        f(*a)
        return time.perf_counter() - start

    print(f"torch {torch.__version__}, {threads} threads; tokens a second (median of {args.rounds})")
    print(f"{'work':<28}{'rewardrt':>10}" + "".join(f"{'transformers ' + n:>20}{'ratio':>8}" for n in peers))
    for name, tokens, mine, theirs in [
        *[(f"decode, {b} sequences", b * NEW, lambda b=b: ours.run("decode", prompts(b, PROMPT), NEW),
           lambda p, b=b: timed(p.decode, b)) for b in (1, 8, 64)],
        ("log-probs, 16 x 256", 16 * 256, lambda: ours.run("logprobs", prompts(16, 256)), lambda p: timed(p.score, 16, 256)),
    ]:
        times = {"ours": [], **{n: [] for n in peers}}
        for i in range(args.rounds + 1):
            t = {"ours": mine(), **{n: theirs(p) for n, p in peers.items()}}
            if i or args.rounds == 0:  # the first round warms up
                for k, v in t.items():
                    times[k].append(v)
        rate = {k: tokens / statistics.median(v) for k, v in times.items()}
        line = f"{name:<28}{rate['ours']:>10.0f}"
        for n in peers:
            line += f"{rate[n]:>20.0f}{rate['ours'] / rate[n]:>8.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
