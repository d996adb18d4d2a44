"""Runs rewardrt, transformers and llama.cpp on the same work, in turns, and prints one Markdown table.

    python benches/peers/compare.py MODEL WORK_BINARY [--scaling] [--no-f32] [--rounds N] [--only SUBSTRING]
                                    [--gguf FOLDER] [--threads N]

A round runs each of them once, one after the other; the first round warms up (and loads), the table has the median of
the rest, in tokens a second. A ratio is rewardrt's speed over the other's, above 1 where rewardrt is faster. All use the
same number of threads, all have the same random ids, and the time is taken inside the process, without loading.

Decode: 43-token prompts, 48 new tokens each, end-of-sequence ignored, the prompts' prefill included.
Log-probs: of each given token of 16 texts of 256 tokens, or of one text of 4,096. Hidden states: the last ones, no head.
Start to first token: a fresh process, from its start to its exit; it loads the model and samples one token.

rewardrt      examples/work.rs, one long-lived process a configuration. Samples at temperature 1 and returns log-probs.
              Hidden states are those of a reward model's forward: two labels' logits at the last position come on top.
transformers  In this process; sdpa attention, dynamic cache, its defaults. Decode is generate() at temperature 1.
              Given texts are taken 4 at a time (all 16 would take 3 GB of logits), in one forward without a cache;
              for log-probs the head and a float log_softmax follow, for at most 512 positions of each text at a time
              (one text of 4,096 has 805 MB of logits). The first token is a fresh Python that imports torch and
              transformers, loads bf16 and is given ids; rewardrt loads the tokenizer too.
llama.cpp     In this process, through llama-cpp-python's low-level calls: prefill of all prompts in one llama_decode,
              then batches of one token a sequence; a KV stream a sequence (kv_unified = false). Tokens are numpy's
              argmax of the logits, less work than the others' sampling. bf16 GGUF of the same weights; q8_0 in the
              int8 rows.

--no-f32 leaves transformers f32 out. --scaling times rewardrt alone, decoding 1 to 256 sequences, with the weights as
stored and as int8.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # the model is a folder

import numpy as np
import torch
import transformers

try:
    import llama_cpp
except (ImportError, OSError, RuntimeError) as error:
    llama_cpp, NO_LLAMA = None, str(error)

transformers.utils.logging.disable_progress_bar()
PROMPT, NEW = 43, 48
DTYPES = {"transformers bf16": torch.bfloat16, "transformers f32": torch.float32}
FIRST_TOKEN = """
import sys, torch, transformers
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(int(sys.argv[2]))
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
ids = torch.tensor([[504, 3575, 282, 4649, 314]])
model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=True, top_k=0, pad_token_id=0)
"""


def prompts(count, length, vocab=40_000):
    g = torch.Generator().manual_seed(1)
    return torch.randint(100, vocab, (count, length), generator=g)


class Rewardrt:
    """The `work` example: reads one job a line, answers with its seconds."""

    def __init__(self, binary, model, threads, *flags):
        self.process = subprocess.Popen([binary, model, str(threads), *flags], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)

    def run(self, kind, ids):
        self.process.stdin.write(json.dumps({"kind": kind, "ids": ids.tolist(), "new": NEW}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"{' '.join(self.process.args)} ended with {self.process.wait()}")
        return float(answer)


class Transformers:
    def __init__(self, model, dtype):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        self.model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def run(self, kind, ids):
        start = time.perf_counter()
        getattr(self, kind)(ids)
        return time.perf_counter() - start

    def decode(self, ids):
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=True, top_k=0,
                                  pad_token_id=0)
        assert out.shape[1] == PROMPT + NEW

    def states(self, ids):
        return self.model.model(ids, use_cache=False).last_hidden_state

    def hidden(self, ids):
        for texts in ids.split(4):
            self.states(texts)

    def logprobs(self, ids):
        for texts in ids.split(4):
            states, targets = self.states(texts)[:, :-1], texts[:, 1:, None]
            for h, t in zip(states.split(512, dim=1), targets.split(512, dim=1)):
                self.model.lm_head(h).float().log_softmax(-1).gather(-1, t)


class LlamaCpp:
    silent = llama_cpp and llama_cpp.llama_log_callback(lambda *_: None)

    def __init__(self, path, threads):
        self.threads = threads
        llama_cpp.llama_log_set(self.silent, None)
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            sys.exit(f"llama.cpp does not load {path}")

    @functools.cache
    def context(self, sequences):
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = sequences * 256  # llama.cpp's granularity
        params.n_batch = sequences * PROMPT
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = self.threads
        return llama_cpp.llama_init_from_model(self.model, params), llama_cpp.llama_batch_init(params.n_batch, 0, 1)

    def run(self, _, ids):
        """Decodes."""
        context, batch = self.context(len(ids))
        start = time.perf_counter()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        tokens = self.forward(context, batch, ids.tolist(), 0)
        for position in range(PROMPT, PROMPT + NEW - 1):
            tokens = self.forward(context, batch, tokens, position)
        return time.perf_counter() - start

    def forward(self, context, batch, rows, position):
        """Appends each row to its sequence at the position; returns each one's next token, as a row of one."""
        n = 0
        for sequence, row in enumerate(rows):
            for i, token in enumerate(row):
                batch.token[n] = token
                batch.pos[n] = position + i
                batch.n_seq_id[n] = 1
                batch.seq_id[n][0] = sequence
                batch.logits[n] = i == len(row) - 1
                n += 1
        batch.n_tokens = n
        if llama_cpp.llama_decode(context, batch):
            sys.exit("llama_decode failed")
        vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(rows), vocab))
        return logits.argmax(axis=1, keepdims=True).tolist()


class FreshProcess:
    """From the start of a process to its end."""

    def __init__(self, *command):
        self.command = command

    def run(self, *_):
        start = time.perf_counter()
        subprocess.run(self.command, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start


class Row(NamedTuple):
    name: str
    kind: str
    ids: torch.Tensor | None
    engines: dict  # column -> function that returns the engine, started when first called

    def medians(self, rounds):
        times = {column: [] for column in self.engines}
        for i in range(rounds + 1):
            for column, engine in self.engines.items():
                seconds = engine().run(self.kind, self.ids)
                if i:  # the first round warms up
                    times[column].append(seconds)
        return {column: statistics.median(t) for column, t in times.items()}

    def tokens(self):
        return len(self.ids) * NEW if self.kind == "decode" else self.ids.numel()


def decode_row(name, sequences, engines):
    ids = prompts(sequences, PROMPT)
    return Row(f"{name}, {sequences} sequence{'s' * (sequences > 1)}", "decode", ids, engines)


def comparison(args, rewardrt, ggufs):
    """The rows against transformers and llama.cpp; ggufs maps kinds to files, and is empty without llama.cpp."""
    torch_model = functools.cache(lambda dtype: Transformers(args.model, dtype))
    llama = functools.cache(lambda kind: LlamaCpp(ggufs[kind], args.threads))
    auto = {"rewardrt": rewardrt}
    int8 = {"rewardrt": functools.partial(rewardrt, "--weights", "int8")}
    f32 = {"rewardrt": functools.partial(rewardrt, "--precision", "f32")}
    torches = {column: functools.partial(torch_model, dtype) for column, dtype in DTYPES.items()
               if dtype != torch.float32 or not args.no_f32}
    torch_f32 = {column: torches[column] for column in torches if DTYPES[column] == torch.float32}
    llamas = {kind: {"llama.cpp": functools.partial(llama, kind)} if ggufs else {} for kind in ("bf16", "q8_0")}
    fresh_python = FreshProcess(sys.executable, "-c", FIRST_TOKEN, args.model, str(args.threads))
    fresh_rewardrt = FreshProcess(args.binary, "--first-token", args.model, str(args.threads))
    texts = prompts(16, 256)
    return [
        *[decode_row("decode", n, auto | torches | llamas["bf16"]) for n in (1, 8, 64)],
        *[decode_row("decode, int8", n, int8 | llamas["q8_0"]) for n in (1, 8)],
        Row("log-probs, 16 x 256", "logprobs", texts, auto | torches),
        Row("log-probs, 16 x 256, f32", "logprobs", texts, f32 | {"auto": rewardrt} | torch_f32),
        Row("hidden states, 16 x 256", "hidden", texts, auto | torches),
        Row("log-probs, 1 x 4096", "logprobs", prompts(1, 4096), auto | torches),
        Row("start to first token", "first token", None,
            {"rewardrt": lambda: fresh_rewardrt, "transformers bf16": lambda: fresh_python}),
    ]


def scaling(rewardrt):
    engines = {"auto": rewardrt, "int8": functools.partial(rewardrt, "--weights", "int8")}
    return [decode_row("decode", 2**i, engines) for i in range(9)]


def llama_files(args):
    """Makes the GGUF files where they are missing. Empty, and says so, if llama_cpp could not be imported."""
    if not llama_cpp:
        print(f"\n*** NO LLAMA.CPP: its column is left out ({NO_LLAMA}).\n"
              "*** pip install -r benches/peers/requirements.txt\n", file=sys.stderr, flush=True)
        return {}
    import gguf_models  # needs the package gguf
    folder = args.gguf or Path(args.model).resolve().parent / "gguf"
    return dict(zip(("bf16", "q8_0"), gguf_models.write_models(args.model, folder)))


def versions():
    yield f"torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()})"
    yield f"transformers {transformers.__version__}"
    if llama_cpp:
        features = llama_cpp.llama_print_system_info().decode().replace(" = 1", "").strip(" |")
        yield f"llama-cpp-python {llama_cpp.__version__} ({features})"


def table(header):
    """Prints the header of a Markdown table; returns a function that prints a line."""
    widths = [40, *[max(6, len(cell)) for cell in header[1:]]]

    def line(cells):
        cells = [cells[0].ljust(widths[0]), *[cell.rjust(width) for cell, width in zip(cells[1:], widths[1:])]]
        print(f"| {' | '.join(cells)} |", flush=True)

    line(header)
    line(["---", *["---:"] * (len(header) - 1)])
    return line


def print_scaling(rows, rounds):
    line = table(["tokens a second", "auto", "int8"])
    for row in rows:
        line([row.name, *[f"{row.tokens() / t:.0f}" for t in row.medians(rounds).values()]])


def print_comparison(rows, rounds):
    peers = [c for c in (*DTYPES, "llama.cpp") if any(c in row.engines for row in rows)]
    line = table(["tokens a second", "rewardrt", *[cell for c in peers for cell in (c, "ratio")]])
    for row in rows:
        times = row.medians(rounds)
        speed = (lambda t: f"{t:.2f} s") if row.ids is None else (lambda t: f"{row.tokens() / t:.0f}")
        name = row.name
        if "auto" in times:
            name += f" ({times['auto'] / times['rewardrt']:.2f} of auto)"
        cells = [name, speed(times["rewardrt"])]
        for c in peers:
            cells += [speed(times[c]), f"{times[c] / times['rewardrt']:.2f}"] if c in times else ["", ""]
        line(cells)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face model folder")
    parser.add_argument("binary", help="the built example `work`")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds (3)")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="rows whose name has it")
    parser.add_argument("--gguf", metavar="FOLDER", help="llama.cpp's files (gguf beside the model's folder)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-f32", action="store_true", help="without transformers f32")
    parser.add_argument("--scaling", action="store_true", help="rewardrt alone, 1 to 256 sequences")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rewardrt = functools.cache(lambda *flags: Rewardrt(args.binary, args.model, args.threads, *flags))
    if args.scaling:
        print(f"rewardrt, {args.threads} threads; median of {args.rounds} after a warm-up\n", flush=True)
        return print_scaling([row for row in scaling(rewardrt) if args.only in row.name], args.rounds)
    rows = comparison(args, rewardrt, llama_files(args))
    print(f"{'; '.join(versions())}; {args.threads} threads; median of {args.rounds} after a warm-up\n", flush=True)
    print_comparison([row for row in rows if args.only in row.name], args.rounds)


if __name__ == "__main__":
    main()
