"""Times transformers on a GPU, on the jobs of `rewardrt bench`, and prints one JSON object a line.

    python benches/peers/gpu.py MODEL [--device cuda|cpu] [--sequences 1,8,64,256] [--prompt-tokens 32] [--tokens 64]
                                      [--score 64x512] [--repeat 3] [--eager]
    python benches/peers/gpu.py --limits [--device cuda|cpu]

The model is a folder and needs no tokenizer. Weights and arithmetic are bf16, attention is sdpa, ids are random and new
for every run. The first run of each job warms up (and compiles); the median of the others counts, with the device
synchronised before and after. Each job's line has the fields of `rewardrt bench --json`, and `how`:

decode    "static cache, compiled": a StaticCache, the prompt in one eager forward, then one compiled call
          (torch.compile, mode="reduce-overhead") a token, drawing included. Where that fails, or with --eager,
          "generate": generate() with its defaults; the line then says why in `fallback`. Draws at temperature 1; unlike
          rewardrt it returns no log-probs.
logprobs  One forward for up to 16,384 tokens of texts, then the head and a float32 log_softmax for as many positions as
          fit in 1 GiB of logits.
limits    A bf16 matmul of 8192³, and a copy of 4 GiB within the device (bytes read plus bytes written).

A job that fails prints a line with `error` and the rest goes on. If torch cannot be imported or has no such device, the
only line is {"job": "none", "reason": …}. The exit status is 1 if a job failed.
"""

import argparse
import inspect
import json
import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"  # the model is a folder

FORWARD_TOKENS = 16_384
LOGIT_BYTES = 1 << 30


def say(**line):
    print(json.dumps(line), flush=True)


def shape(text):
    texts, tokens = text.split("x")
    return int(texts), int(tokens)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="Hugging Face model folder")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a smoke test")
    parser.add_argument("--sequences", default="1,8,64,256", metavar="N,N…")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--score", type=shape, default=(64, 512), metavar="BxL")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--limits", action="store_true", help="measure the device instead of a model")
    args = parser.parse_args()
    if not args.model and not args.limits:
        parser.error("a model folder or --limits is needed")
    return args


class Clock:
    def __init__(self, device):
        self.cuda = device.type == "cuda"

    def now(self):
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, work):
        start = self.now()
        work()
        return self.now() - start


class Peer:
    def __init__(self, args, device):
        self.args, self.device, self.clock = args, device, Clock(device)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            args.model, dtype=torch.bfloat16, attn_implementation="sdpa").to(device).eval()
        self.model.generation_config.eos_token_id = None
        self.vocab = self.model.config.vocab_size
        self.random = torch.Generator().manual_seed(1)
        self.takes_position = "cache_position" in inspect.signature(self.model.forward).parameters
        self.not_compiled = "--eager" if args.eager else None

    def ids(self, count, length):
        return torch.randint(0, self.vocab, (count, length), generator=self.random).to(self.device)

    def line(self, job, sequences, tokens, runs, how, **more):
        """`runs`: (seconds, milliseconds of a decode step or None) of each counted run."""
        seconds, step_ms = sorted(runs)[len(runs) // 2]
        more["prompt_tokens"] = self.args.prompt_tokens if job == "decode" else None
        say(job=job, sequences=sequences, tokens=tokens, tokens_per_second=sequences * tokens / seconds,
            seconds=seconds, step_ms=step_ms, how=how, device=device_name(self.device), model=str(self.args.model),
            peer=f"torch {torch.__version__}, transformers {transformers.__version__}", **more)

    # Decoding

    def decode(self, sequences):
        if not self.not_compiled:
            try:
                runs = self.rounds(self.compiled_decoder(sequences), sequences)
                return self.line("decode", sequences, self.args.tokens, runs, "static cache, compiled")
            except Exception as error:  # whatever the compiler says: the fallback is timed instead
                self.not_compiled = first_line(error)
                torch._dynamo.reset()
                free(self.device)
        runs = self.rounds(self.generate, sequences)
        self.line("decode", sequences, self.args.tokens, runs, "generate", fallback=self.not_compiled)

    def rounds(self, decode, sequences):
        return [decode(self.ids(sequences, self.args.prompt_tokens)) for _ in range(self.args.repeat + 1)][1:]

    def compiled_decoder(self, sequences):
        length = self.args.prompt_tokens + self.args.tokens
        cache = transformers.StaticCache(config=self.model.config, max_cache_len=length)

        def forward(ids, position):
            more = {"cache_position": position} if self.takes_position else {}
            logits = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **more).logits[:, -1]
            return torch.multinomial(logits.float().softmax(-1), 1)

        # A cache and a graph for each number of sequences: nothing is compiled for sizes in general.
        torch._dynamo.reset()
        step = torch.compile(forward, mode="reduce-overhead", dynamic=False)
        positions = torch.arange(length, device=self.device)

        def decode(ids):
            if cache.layers and cache.layers[0].is_initialized:
                cache.reset()
            prompt = ids.shape[1]
            start = self.clock.now()
            token = forward(ids, positions[:prompt])
            tokens = [token]
            begin = self.clock.now()
            for position in range(prompt, length - 1):
                torch.compiler.cudagraph_mark_step_begin()
                token = step(token, positions[position:position + 1]).clone()
                tokens.append(token)
            torch.cat(tokens, dim=1).cpu()
            end = self.clock.now()
            return end - start, step_ms(end - begin, self.args.tokens)

        return decode

    def generate(self, ids):
        def run(new):
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=True,
                                      top_k=0, pad_token_id=0)
            assert out.shape[1] == ids.shape[1] + new

        first = self.clock.seconds(lambda: run(1))
        seconds = self.clock.seconds(lambda: run(self.args.tokens))
        return seconds, step_ms(seconds - first, self.args.tokens)

    # Scoring

    def logprobs(self):
        texts, length = self.args.score
        runs = []
        for _ in range(self.args.repeat + 1):
            ids = self.ids(texts, length)
            runs.append((self.clock.seconds(lambda: self.score(ids)), None))
        self.line("logprobs", texts, length, runs[1:], "micro-batches")

    def score(self, ids):
        positions = max(1, LOGIT_BYTES // (4 * self.vocab))
        scored = []
        for texts in ids.split(max(1, FORWARD_TOKENS // ids.shape[1])):
            states = self.model.model(texts, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
            targets = texts[:, 1:].flatten()[:, None]
            for h, t in zip(states.split(positions), targets.split(positions)):
                scored.append(self.model.lm_head(h).float().log_softmax(-1).gather(-1, t))
        return torch.cat(scored).cpu()


def step_ms(seconds, tokens):
    return 1e3 * seconds / (tokens - 1) if tokens > 1 else None


def first_line(error):
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]


def free(device):
    if device.type == "cuda":
        torch.cuda.empty_cache()


def device_name(device):
    return torch.cuda.get_device_name() if device.type == "cuda" else "cpu"


def limits(device):
    clock = Clock(device)
    on_gpu = device.type == "cuda"
    n, size = (8192, 4 << 30) if on_gpu else (1024, 64 << 20)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = {}
    for name, work in [("matmul", lambda: torch.mm(a, b, out=out)), ("copy", lambda: target.copy_(source))]:
        def ten():
            for _ in range(10):
                work()
        ten()
        times[name] = min(clock.seconds(ten) for _ in range(5)) / 10
    say(job="limits", flops=2 * n**3 / times["matmul"], bytes_per_second=2 * size / times["copy"], matmul=n,
        copy_bytes=size, device=device_name(device), peer=f"torch {torch.__version__}")


def main():
    args = arguments()
    try:
        global torch, transformers
        import torch
        import transformers
    except ImportError as error:
        return say(job="none", reason=f"{error}")
    if args.device == "cuda" and not torch.cuda.is_available():
        return say(job="none", reason="torch.cuda is not available", peer=f"torch {torch.__version__}")
    device = torch.device(args.device)
    transformers.utils.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    if args.limits:
        return limits(device)
    peer = Peer(args, device)
    texts, length = args.score
    jobs = [("decode", int(n), args.tokens, lambda n=int(n): peer.decode(n)) for n in args.sequences.split(",")]
    failed = False
    for job, sequences, tokens, run in [*jobs, ("logprobs", texts, length, peer.logprobs)]:
        try:
            run()
        except Exception as error:  # out of memory at one size says nothing about the others
            failed = True
            say(job=job, sequences=sequences, tokens=tokens, error=first_line(error), model=str(args.model))
        free(device)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
