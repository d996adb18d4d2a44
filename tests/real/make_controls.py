"""What transformers computes in f32 under sampling controls: greedy answers of SmolLM2, and what its warpers keep.

    pip install -r tests/golden/requirements.txt
    python tests/real/make_controls.py .cache/smollm2        # writes tests/real/controls.json

The order in which generate() of transformers 5.23.0 applies what is used here (GenerationMixin._get_logits_processor):

    sequence_bias, repetition_penalty, bad_words_ids, min_new_tokens, prefix_allowed_tokens_fn, then processors of the
    caller's own (presence and frequency penalty below); when sampling: temperature, top_k, top_p, min_p, typical_p.

So with l a logit, b its bias, r the repetition penalty (over prompt and answer), c how often the answer has the token:

    s = l + b;  z = (s / r if s > 0 else s * r if the token was seen, else s) − frequency · c − presence · [c > 0]

and −∞ for what is banned or not allowed, and for EOS while the answer has fewer than min_new_tokens. `scored` computes
that anew from the raw logits, and every case is checked against it. Stop strings do not wait for min_new_tokens,
and transformers finds one that begins in the prompt too: none here does.

A case is kept if the best token leads by MARGIN everywhere: trailing tokens go until it does, else the case does.
"""

import json
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from transformers import (AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList, MinPLogitsWarper,
                          TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper)

HERE = Path(__file__).parent
MAX_TOKENS, LEAST_TOKENS, MARGIN, LEAST_CASES = 48, 12, 5e-3, 4
CHATS = ["capital", "haiku", "sum", "primes", "tea"]
TEXTS = {
    "village": "Once upon a time, in a small village by the sea, there lived an old fisherman who",
    "water": "Water boils at 100 degrees Celsius at sea level. At higher altitudes, the boiling point",
    "history": "The Roman Empire was one of the largest empires of the ancient world. It",
}
NEVER = "qxzzy"


class CountPenalties(LogitsProcessor):
    """Presence and frequency penalty as OpenAI's API and vLLM define them: tokens of the answer only."""

    def __init__(self, prompt_len, presence, frequency):
        self.prompt_len, self.presence, self.frequency = prompt_len, presence, frequency

    def __call__(self, input_ids, scores):
        count = torch.zeros_like(scores).scatter_add_(1, input_ids[:, self.prompt_len:], torch.ones_like(scores))
        return scores - self.frequency * count - self.presence * (count > 0)


class Reference:
    def __init__(self, folder):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.eos = self.model.generation_config.eos_token_id

    def text(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    @torch.no_grad()
    def generate(self, prompt, controls):
        """The answer's ids, its raw logits and its processed scores (T, V)."""
        c, more = controls, {}
        if "repetition_penalty" in c:
            more["repetition_penalty"] = c["repetition_penalty"]
        if "logit_bias" in c:
            more["sequence_bias"] = [[[token], value] for token, value in c["logit_bias"]]
        if "banned_ids" in c:
            more["bad_words_ids"] = [[token] for token in c["banned_ids"]]
        if "min_tokens" in c:
            more["min_new_tokens"] = c["min_tokens"]
        if "allowed_ids" in c:
            more["prefix_allowed_tokens_fn"] = lambda *_: c["allowed_ids"]
        if "stop" in c:
            more.update(stop_strings=c["stop"], tokenizer=self.tokenizer)
        if {"presence_penalty", "frequency_penalty"} & c.keys():
            more["logits_processor"] = LogitsProcessorList([CountPenalties(
                len(prompt), c.get("presence_penalty", 0.0), c.get("frequency_penalty", 0.0))])
        input_ids = torch.tensor([prompt])
        out = self.model.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=MAX_TOKENS, do_sample=False,
            return_dict_in_generate=True, output_scores=True, output_logits=True, **more)
        return out.sequences[0, len(prompt):].tolist(), torch.cat(out.logits), torch.cat(out.scores)

    def case(self, prompt, controls):
        """A case in the file's form and its raw logits, or None if too many of its choices are close."""
        ids, logits, scores = self.generate(prompt, controls)
        torch.testing.assert_close(scored(prompt, ids, logits, controls, self.eos), scores, rtol=0, atol=1e-4)
        assert scores.argmax(-1).tolist() == ids
        best = scores.topk(2).values
        lead = (best[:, 0] - best[:, 1]).tolist()
        n = next((i for i, d in enumerate(lead) if d < MARGIN), len(ids))
        while n and self.text(ids[:n]).endswith("\ufffd"):  # a character is not finished
            n -= 1
        text = self.text(ids[:n])
        if n < len(ids) and n < LEAST_TOKENS or "\ufffd" in text:
            return None
        hits = [text.find(s) for s in controls.get("stop", []) if s in text]
        stopped = n == len(ids) and (ids[-1] == self.eos or bool(hits))
        assert stopped or n < len(ids) or n == MAX_TOKENS, (controls, text)
        case = {"prompt_ids": prompt, "max_tokens": n if n < len(ids) else MAX_TOKENS, "controls": controls,
                "completion_ids": ids[:n], "finish": "stop" if stopped else "length",
                "text": text[:min(hits)] if hits else text, "margin": float(f"{min(lead[:n]):.4g}")}
        return case, logits[:n]

    def borders(self, prompt, ids, first):
        """Stop strings, each with a token border inside, that occur in the text of `ids` from token `first` on."""
        tail = self.tokenizer.decode(prompt)[-20:]
        text, ends = self.text(ids), [len(self.text(ids[:n])) for n in range(len(ids) + 1)]
        for k in range(max(first, 1), len(ids) - 1):
            before, token, after = ends[k] - ends[k - 1], ends[k + 1] - ends[k], ends[k + 2] - ends[k + 1]
            if min(before, token, after) < 3:
                continue
            shapes = [(ends[k] - 2, ends[k] + 2),   # from inside a token into the next
                      (ends[k] - 1, ends[k + 1]),   # up to a token's end
                      (ends[k] - 2, ends[k + 1] + 1)]  # over a whole token into a third
            start, end = shapes[k % 3]
            if (tail + text).find(text[start:end]) == len(tail) + start:
                yield text[start:end]


STAGES = ("bias", "repetition", "counts", "bans")


def scored(prompt, ids, logits, controls, eos, stages=STAGES):
    """The processed scores (T, V) of the answer `ids`, from its raw logits."""
    z, c = logits.clone(), controls
    for t, row in enumerate(z):
        answer = torch.tensor(ids[:t], dtype=torch.long)
        count = torch.bincount(answer, minlength=len(row)).float()
        for stage in stages:
            if stage == "bias":
                for token, value in c.get("logit_bias", []):
                    row[token] += value
            elif stage == "repetition":
                seen = torch.cat([torch.tensor(prompt, dtype=torch.long), answer]).unique()
                r = c.get("repetition_penalty", 1.0)
                row[seen] = torch.where(row[seen] > 0, row[seen] / r, row[seen] * r)
            elif stage == "counts":
                row -= c.get("frequency_penalty", 0.0) * count + c.get("presence_penalty", 0.0) * (count > 0)
            else:
                row[c.get("banned_ids", [])] = -torch.inf
                if t < c.get("min_tokens", 0):
                    row[eos] = -torch.inf
                if "allowed_ids" in c:
                    allowed = torch.zeros_like(row, dtype=torch.bool)
                    allowed[c["allowed_ids"]] = True
                    row[~allowed] = -torch.inf
    return z


class Plain:
    """A prompt and its answer without controls, from which the controls are chosen."""

    def __init__(self, reference, index, prompt):
        self.index, self.prompt = index, prompt
        self.ids, _, scores = reference.generate(prompt, {})
        self.second = scores.topk(2).indices[:, 1].tolist()
        self.ends = self.ids[-1] == reference.eos

    def every(self, step, start=1):
        """Tokens of the answer without EOS, `step` apart, each once."""
        body = self.ids[:-1] if self.ends else self.ids
        return list(dict.fromkeys(body[start % len(body)::step]))

    def bias(self, step, up, down):
        """Tokens of the answer down, runners-up (which may have been seen) up."""
        lowered = self.every(step)
        raised = [t for t in dict.fromkeys(self.second[::step]) if t not in lowered]
        return [[t, -down] for t in lowered] + [[t, up] for t in raised]


def choices(reference, plains):
    """Control → function from a prompt to the settings to try in turn."""
    common = sorted({t for p in plains for t in p.ids})
    common = [t for i, t in enumerate(common) if i % 4 and t != reference.eos]
    allowed = sorted(set(common) | set(range(260, 260 + 2 * (300 - len(common)), 2)))

    def min_tokens(p):
        if not p.ends:
            return [{"min_tokens": 20}]
        return [{"min_tokens": len(p.ids) + more} for more in (8, 5, 12, 3, 16) if len(p.ids) + more < MAX_TOKENS]

    def stop(p):
        for s in reference.borders(p.prompt, p.ids, min(3 + 4 * p.index, len(p.ids) // 3)):
            yield {"stop": ([s], [NEVER, s], [s, NEVER])[p.index % 3]}

    def combined(p):
        for step in (5, 4, 6, 3):
            c = {"repetition_penalty": 1.25, "logit_bias": p.bias(step, 3.5, 4.25),
                 "min_tokens": 12 + p.index, "banned_ids": p.every(7, start=3)}
            ids, *_ = reference.generate(p.prompt, c)
            for s in islice(reference.borders(p.prompt, ids, c["min_tokens"] + 2 * p.index), 2):
                yield {**c, "stop": [NEVER, s]}

    return {
        "repetition_penalty": lambda p: [{"repetition_penalty": 1.3}],
        "logit_bias": lambda p: ({"logit_bias": p.bias(s, up, 4.5)} for s, up in ((4, 3.25), (3, 2.0), (5, 5.5))),
        "min_tokens": min_tokens,
        "stop": stop,
        "banned_ids": lambda p: ({"banned_ids": p.every(step)} for step in (4, 3, 5, 2)),
        # EOS is in the set for every second prompt.
        "allowed_ids": lambda p: [{"allowed_ids": sorted(allowed + [reference.eos] * (p.index % 2))}],
        # Large enough that it shows which of the two comes first.
        "bias_and_repetition": lambda p: ({"logit_bias": p.bias(s, up, 6.5), "repetition_penalty": 1.4}
                                          for s, up in ((2, 5.5), (3, 6.0), (2, 4.5), (4, 5.0))),
        "combined": combined,
        "presence_penalty": lambda p: ({"presence_penalty": v} for v in (1.5, 1.75, 1.25, 2.0)),
        "frequency_penalty": lambda p: ({"frequency_penalty": v} for v in (0.75, 1.0, 1.25, 1.5)),
        "negative_counts": lambda p: [{"presence_penalty": -1.5, "frequency_penalty": -0.5}],
        "counts_and_repetition": lambda p: (
            {"presence_penalty": a, "frequency_penalty": b, "repetition_penalty": r}
            # Against a repetition penalty, negative ones show which comes first.
            for a, b, r in (((1.5, 0.75, 1.3), (2.0, 0.5, 1.25)), ((-2.0, -1.0, 1.4), (-2.0, -0.5, 1.5)))[p.index % 2]),
    }


def serves(control, case, plain, eos):
    """Whether the case shows what its control does."""
    ids, c = case["completion_ids"], case["controls"]
    if control == "min_tokens":
        return len(ids) > len(plain.ids) or not plain.ends
    if "stop" in c:
        by_text = case["finish"] == "stop" and ids[-1] != eos
        return by_text and len(ids) > c.get("min_tokens", 0) and not any(s in case["text"] for s in c["stop"])
    return True


# What an implementation may get wrong, as the order of stages and whether the prompt counts as seen.
MISTAKES = {
    "repetition before bias": (("repetition", "bias", "counts", "bans"), True),
    "counts before repetition": (("bias", "counts", "repetition", "bans"), True),
    "repetition of the answer alone": (STAGES, False),
}


def answers(reference):
    records = map(json.loads, (HERE / "../../examples/prompts.jsonl").read_text().splitlines())
    template = lambda m: reference.tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=True)
    prompts = {r["id"]: template(r["messages"])["input_ids"] for r in records if r["id"] in CHATS}
    prompts |= {name: reference.tokenizer(text).input_ids for name, text in TEXTS.items()}
    plains = {name: Plain(reference, i, ids) for i, (name, ids) in enumerate(prompts.items())}
    print(f"EOS {reference.eos}; plain lengths", {name: len(p.ids) for name, p in plains.items()})
    out, shown = [], dict.fromkeys(MISTAKES, 0)
    for control, settings in choices(reference, list(plains.values())).items():
        cases, changed = [], 0
        for name, plain in plains.items():
            tries = (reference.case(plain.prompt, c) for c in islice(settings(plain), 8))
            found = next((t for t in tries if t and serves(control, t[0], plain, reference.eos)), None)
            if found is None:
                print(f"  {control}/{name} left out")
                continue
            case, logits = found
            ids = case["completion_ids"]
            for mistake, (stages, with_prompt) in MISTAKES.items():
                z = scored(plain.prompt if with_prompt else [], ids, logits, case["controls"], reference.eos, stages)
                shown[mistake] += z.argmax(-1).tolist() != ids
            changed += ids != plain.ids[:case["max_tokens"]]
            cases.append({"name": f"{control}/{name}", **case})
        print(f"{control:22} {len(cases)} cases, {changed} changed, margin {min(c['margin'] for c in cases)}, tokens",
              [len(c["completion_ids"]) for c in cases])
        assert len(cases) >= LEAST_CASES, control
        assert changed > len(cases) / 2 or control == "min_tokens" and changed >= 2, control
        out += cases
    print("cases that show a mistake:", shown)
    assert all(shown.values())
    return out


ROWS, VOCAB = 6, 211
WARPERS = {  # in the order of generate()
    "temperature": TemperatureLogitsWarper, "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper, "typical_p": TypicalLogitsWarper,
}
SETTINGS = [
    *({"temperature": v} for v in (0.3, 0.7, 1.6)),
    *({"top_k": v} for v in (1, 2, 7, 50, 300)),
    *({"top_p": v} for v in (0.05, 0.3, 0.5, 0.8, 0.95, 0.999)),
    *({"min_p": v} for v in (0.01, 0.05, 0.2, 0.6, 1.0)),
    *({"typical_p": v} for v in (0.05, 0.2, 0.5, 0.8, 0.95, 0.99)),
    {"temperature": 0.8, "top_k": 40},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 2.0, "min_p": 0.1},
    {"temperature": 0.6, "typical_p": 0.7},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 12, "min_p": 0.03},
    {"top_k": 10, "typical_p": 0.5},
    {"top_p": 0.9, "min_p": 0.02},
    {"top_p": 0.9, "typical_p": 0.6},
    {"min_p": 0.02, "typical_p": 0.9},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.95, "min_p": 0.05},
    {"temperature": 1.5, "top_k": 30, "top_p": 0.9, "typical_p": 0.8},
    {"temperature": 1.3, "top_k": 60, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.9},
]


def kept_with_ties(row, settings):
    """The kept ids by the rule that equal values share a fate, in f64."""
    z = row.astype(np.float64) / settings.get("temperature", 1.0)
    kept = np.ones(len(z), bool)

    def normalised():
        w = np.where(kept, np.exp(z - z.max()), 0)
        return w / w.sum()

    def until(mass, badness):
        """Keeps what is no worse than the first at which the sum, in order of badness, reaches `mass`."""
        order = np.argsort(badness, kind="stable")
        last = min(int((np.cumsum(normalised()[order]) < mass).sum()), len(z) - 1)
        return kept & (badness <= badness[order[last]])

    if "top_k" in settings:
        kept &= z >= np.sort(z)[-min(settings["top_k"], len(z))]
    if "top_p" in settings:
        kept = until(settings["top_p"], np.where(kept, -z, np.inf))
    if "min_p" in settings:
        kept &= z >= z.max() + np.log(settings["min_p"])
    if "typical_p" in settings:
        p = normalised()
        surprise = np.where(kept, -np.log(np.where(kept, p, 1)), np.inf)
        entropy = (p[kept] * surprise[kept]).sum()
        kept = until(settings["typical_p"], np.abs(surprise - entropy))
    return np.flatnonzero(kept).tolist()


def warpers():
    rng = np.random.default_rng(7)
    rows = rng.normal(0, 3, (ROWS, VOCAB)).astype(np.float32)
    rows[3:5] = np.round(rows[3:5] * 4) / 4  # many ties
    rows[5, 1::2] = rows[5, :-1:2]           # pairs
    cases, left_out = [], []
    for i, row in enumerate(rows):
        # Equal values stay equal: shows whether a threshold is too near to be decided in f32.
        shaken = [kept_with_ties(row + sign * 1e-5 * np.sin(997.0 * row.astype(np.float64)), s)
                  for s in SETTINGS for sign in (-1, 1)]
        for j, settings in enumerate(SETTINGS):
            scores = torch.from_numpy(row)[None]
            for name, warper in WARPERS.items():
                if name in settings:
                    scores = warper(settings[name])(None, scores)
            kept = torch.isfinite(scores[0]).nonzero()[:, 0].tolist()
            with_ties = kept_with_ties(row, settings)
            if kept != with_ties or any(with_ties != s for s in shaken[2 * j:2 * j + 2]):
                # Nothing but top-p splits ties; anything else would be a fault of the rule above.
                assert kept == with_ties or "top_p" in settings and i >= 3, (i, settings)
                left_out.append((i, settings, len(kept), len(with_ties)))
                continue
            logprobs = scores[0].double().log_softmax(-1)[kept]
            cases.append({"row": i, "settings": settings, "kept": kept,
                          "logprobs": [float(f"{v:.8g}") for v in logprobs.tolist()]})
    print(f"warpers: {len(cases)} cases; left out (row, settings, kept, kept with ties):", *left_out, sep="\n  ")
    exact = [[float(f"{v:.9g}") for v in row] for row in rows.tolist()]
    assert (np.array(exact, np.float32) == rows).all()
    return {"rows": exact, "cases": cases}


def main():
    reference = Reference(sys.argv[1])
    out = {"eos_token_id": reference.eos, "cases": answers(reference), "warpers": warpers()}
    (HERE / "controls.json").write_text(json.dumps(out, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
