"""One step of online RL, by `rewardrt rollout` and by transformers, in turns on the same machine.

    python benches/peers/rollout.py MODEL REWARDRT_BINARY [--prompts N] [-n N] [--tokens N] [--rounds N] [--threads N]

Both sample n answers of exactly --tokens tokens to each prompt at temperature 1, compute a reference model's log-probs of
them, and the probability that a judge says "yes" after each. Policy, reference and judge are three loaded copies of MODEL in
bf16. Times are of the steps, without loading, the median of the rounds after the first; a ratio is transformers' time over
rewardrt's.

rewardrt      the command, once a round; what it says with -v: first submission to last result.
transformers  generate() of all sequences as one batch (sdpa, dynamic cache), then the reference's forward and log_softmax
              of the answers 8 sequences at a time, then the judge's forward for the last logits, 8 at a time: one after the other, as
              trainers without an engine do it.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import tempfile
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

transformers.utils.logging.disable_progress_bar()
parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("binary")
parser.add_argument("--prompts", type=int, default=8)
parser.add_argument("-n", type=int, default=8)
parser.add_argument("--tokens", type=int, default=48)
parser.add_argument("--rounds", type=int, default=4)
parser.add_argument("--threads", type=int, default=os.cpu_count())
args = parser.parse_args()
torch.set_num_threads(args.threads)

# As many tokens in each, so that the peer pads nothing.
prompts = [[(1000 + 131 * i + 17 * k) % 40000 + 100 for k in range(32)] for i in range(args.prompts)]


def load():
    return transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()


policy, reference, judge = load(), load(), load()
tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
yes_no = [tokenizer.convert_tokens_to_ids(t) for t in ("yes", "no")]


@torch.inference_mode()
def by_transformers():
    start = time.perf_counter()
    ids = torch.tensor(prompts).repeat_interleave(args.n, 0)
    length = ids.shape[1]
    whole = policy.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        min_new_tokens=args.tokens, max_new_tokens=args.tokens, pad_token_id=0,
    )
    sampled = time.perf_counter() - start
    for chunk in whole.split(8):
        logits = reference(chunk, logits_to_keep=args.tokens + 1).logits[:, :-1].float()
        logits.log_softmax(-1).gather(-1, chunk[:, length:, None])
    for chunk in whole.split(8):
        judge(chunk, logits_to_keep=1).logits[:, -1, yes_no].float().softmax(-1)
    return sampled, time.perf_counter() - start


def by_rewardrt(folder):
    path = os.path.join(folder, "prompts.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"prompt_ids": ids}) + "\n" for ids in prompts)
    # The policy's own path would be the policy itself: links are other models.
    models = []
    for name in ("policy", "reference", "judge"):
        models.append(os.path.join(folder, name))
        if not os.path.exists(models[-1]):
            os.mkdir(models[-1])
            for file in os.listdir(args.model):
                os.link(os.path.join(args.model, file), os.path.join(models[-1], file))
    command = [args.binary, "-v", "rollout", "--device", "cpu", "--threads", str(args.threads), "--policy", models[0]]
    command += ["--reference", models[1], "--reward", f"{models[2]}:judge:yes,no", "--prompts", path, "-n", str(args.n)]
    command += ["--max-tokens", str(args.tokens), "--ignore-eos", "--out", os.path.join(folder, "out.jsonl")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return tuple(float(t) for t in re.search(r"sampled in ([\d.]+) s, all in ([\d.]+) s", done.stderr).groups())


# Beside the model, where files can be linked.
with tempfile.TemporaryDirectory(dir=os.path.dirname(os.path.realpath(args.model))) as folder:
    args.model = os.path.realpath(args.model)
    rounds = [(by_rewardrt(folder), by_transformers()) for _ in range(args.rounds)][1:]
ours, theirs = ([statistics.median(r[i][j] for r in rounds) for j in (0, 1)] for i in (0, 1))
sequences = args.prompts * args.n
print(f"{args.prompts} prompts × {args.n} answers × {args.tokens} tokens, {args.threads} threads, median of {len(rounds)}\n")
print("| | rewardrt | transformers bf16 | ratio |\n|---|---|---|---|")
for name, j in (("sampled (scoring overlaps it in rewardrt)", 0), ("all", 1)):
    print(f"| {name} | {ours[j]:.2f} s | {theirs[j]:.2f} s | {theirs[j] / ours[j]:.1f} |")
print(f"| tokens sampled a second, scoring included | {sequences * args.tokens / ours[1]:.0f} | {sequences * args.tokens / theirs[1]:.0f} | |")
