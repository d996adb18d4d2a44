"""Makes the golden checkpoints: small random models of every kind, and what transformers computes from them in f32.

    pip install -r tests/golden/requirements.txt
    python tests/golden/make.py [name …]   # writes tests/golden/<name>/{config.json,*.safetensors,expected.json}

config.json is written by hand in the spelling under test (old and new), and the reference reads that very file.
Weights are stored in the dtype under test and computed with in f32, so rounding of weights is not part of the
difference. The seeds are fixed: running this again gives the same files up to the last bits of the expected values.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

HERE = Path(__file__).parent
BASE = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=48, intermediate_size=80, num_hidden_layers=2,
    num_attention_heads=6, num_key_value_heads=2, vocab_size=101, max_position_embeddings=64, rms_norm_eps=1e-5,
    hidden_act="silu", rope_theta=10000.0, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
MISTRAL = dict(architectures=["MistralForCausalLM"], model_type="mistral")
QWEN2 = dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2")
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)


def classifier(family, labels, **more):
    return dict(architectures=[f"{family}ForSequenceClassification"], model_type=family.lower(),
                id2label={str(i): f"label-{i}" for i in range(labels)},
                label2id={f"label-{i}": i for i in range(labels)}, **more)


# name: (config on top of BASE (None removes a key), stored dtype, shards)
CASES = {
    "llama-gqa-9-3": (dict(hidden_size=72, num_attention_heads=9, num_key_value_heads=3), "bf16", 1),
    "llama-head-dim": (dict(head_dim=20, num_attention_heads=3, num_key_value_heads=1), "f16", 1),
    "llama-odd-widths": (dict(hidden_size=45, num_attention_heads=3, num_key_value_heads=3, head_dim=14,
                              intermediate_size=67, vocab_size=103), "bf16", 1),
    "llama-biases": (dict(attention_bias=True, mlp_bias=True), "f32", 1),
    "llama-tied": (dict(tie_word_embeddings=True, num_key_value_heads=None), "bf16", 1),
    "llama-shards": (dict(), "f32", 3),
    "llama-linear-old": (dict(rope_scaling={"type": "linear", "factor": 2.5}), "f32", 1),
    "llama-linear-new": (dict(rope_theta=None, rope_parameters={"rope_type": "linear", "factor": 2.5,
                                                                "rope_theta": 500.0}), "f32", 1),
    "llama-dynamic-old": (dict(rope_scaling={"type": "dynamic", "factor": 4.0}, max_position_embeddings=16), "f32", 1),
    "llama-dynamic-new": (dict(rope_theta=None, rope_parameters={"rope_type": "dynamic", "factor": 2.0,
                                                                 "rope_theta": 10000.0}), "f16", 1),
    "llama-yarn-old": (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0,
                                          "original_max_position_embeddings": 16}), "f32", 1),
    "llama-yarn-new": (dict(rope_theta=None, rope_parameters={
        "rope_type": "yarn", "factor": 4.0, "rope_theta": 2000.0, "original_max_position_embeddings": 16,
        "beta_fast": 8.0, "beta_slow": 0.5, "truncate": False, "mscale": 0.7, "mscale_all_dim": 1.2}), "f32", 1),
    "llama-llama3-old": (dict(rope_scaling={"rope_type": "llama3", **LLAMA3}), "bf16", 1),
    "llama-llama3-new": (dict(rope_theta=None, rope_parameters={"rope_type": "llama3", "rope_theta": 5000.0,
                                                                **LLAMA3}), "f32", 1),
    "mistral-window": (dict(MISTRAL, sliding_window=7), "bf16", 1),
    "mistral-full": (dict(MISTRAL, sliding_window=None, head_dim=10), "f16", 1),
    "llama-labels-1": (classifier("Llama", 1), "bf16", 1),
    "llama-labels-3": (classifier("Llama", 3, pad_token_id=5), "f32", 1),
    "mistral-labels-2": (dict(classifier("Mistral", 2, sliding_window=6), id2label=None, label2id=None), "f32", 1),
    # Beyond one block of everything the CPU works in: vocabulary chunks, attention chunks, tiles; eight heads a kv head.
    "llama-wide": (dict(hidden_size=160, intermediate_size=400, num_hidden_layers=1, num_attention_heads=16,
                        num_key_value_heads=2, vocab_size=700, max_position_embeddings=256), "bf16", 1),
    # Seven heads a kv head, as in Qwen2.5-7B; what use_sliding_window leaves unread.
    "qwen2-gqa-14-2": (dict(QWEN2, hidden_size=84, num_attention_heads=14, num_key_value_heads=2,
                            use_sliding_window=False, sliding_window=7, max_window_layers=1), "bf16", 1),
    "qwen2-tied-window": (dict(QWEN2, hidden_size=45, num_attention_heads=3, num_key_value_heads=1, head_dim=18,
                               tie_word_embeddings=True, use_sliding_window=True, sliding_window=7,
                               max_window_layers=0), "f32", 1),
    "qwen2-labels-2": (classifier("Qwen2", 2, num_attention_heads=4, use_sliding_window=True, sliding_window=6,
                                  max_window_layers=2, layer_types=["full_attention"] * 2,
                                  rope_scaling={"type": "yarn", "factor": 4.0,
                                                "original_max_position_embeddings": 16}), "f16", 1),
}
# The standard deviation of the embedding table, if not 1: as a tied head, that makes logits too steep for few-bit weights.
EMBEDDING_DEVIATION = {"qwen2-tied-window": 0.15}
NULL_KEPT = {"sliding_window", "num_key_value_heads"}
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def write_checkpoint(folder, config, dtype, shards, seed):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    torch.manual_seed(seed)
    auto = AutoModelForSequenceClassification if "Sequence" in config["architectures"][0] else AutoModelForCausalLM
    model = auto.from_config(AutoConfig.from_pretrained(folder), attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("norm.weight"):
                p.uniform_(0.5, 1.5)
            elif "embed" in name:
                p.normal_(0, EMBEDDING_DEVIATION.get(folder.name, 1.0))
            else:
                p.normal_(0, 0.15)
            p.copy_(p.to(DTYPES[dtype]).float())
    tied = config["tie_word_embeddings"] and "Causal" in config["architectures"][0]
    tensors = {n: t.to(DTYPES[dtype]).clone() for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight")}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return model
    names, weight_map = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i::shards]
        save_file({n: tensors[n] for n in part}, folder / file)
        weight_map.update({n: file for n in part})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return model


def digits(t):
    return [float(f"{v:.8g}") for v in t.flatten().tolist()]


@torch.no_grad()
def expected(model, config, name):
    g = torch.Generator().manual_seed(len(name))
    pad = config["pad_token_id"]
    draw = lambda n: torch.randint(6, config["vocab_size"], (n,), generator=g).tolist()
    # Dynamic rope is tested beyond the trained length too.
    lengths = [1, 2, 17, 41] if "dynamic-old" not in name else [3, 16, 17, 50]
    if "wide" in name:
        lengths = [5, 63, 64, 150]
    sequences = [draw(n) for n in lengths]
    if "Sequence" in config["architectures"][0]:
        sequences += [draw(5) + [pad] * 3, [pad] * 2 + draw(4), draw(3) + [pad] + draw(2) + [pad], [pad] * 3]
        return {"sequences": sequences,
                "scores": [digits(model(torch.tensor([s])).logits[0]) for s in sequences]}
    out = {"sequences": sequences, "logprobs": [], "entropies": [], "top": []}
    for s in sequences:
        logp = model(torch.tensor([s])).logits[0].log_softmax(-1)
        target = torch.tensor(s[1:], dtype=torch.long)
        out["logprobs"].append(digits(logp[:-1].gather(1, target[:, None])))
        out["entropies"].append(digits(-(logp.exp() * logp).sum(-1)[:-1]))
        best = logp[:-1].topk(3)
        out["top"].append([[i, v] for i, v in zip(best.indices.tolist(), [digits(r) for r in best.values])])
    prompt = sequences[-1][:12]
    tokens = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=pad)
    out["greedy"] = {"prompt": prompt, "completion": tokens[0, len(prompt):].tolist()}
    return out


def main():
    unknown = set(sys.argv[1:]) - set(CASES)
    if unknown:
        sys.exit(f"no such case: {', '.join(sorted(unknown))}")
    for seed, (name, (changes, dtype, shards)) in enumerate(CASES.items()):
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        config = {k: v for k, v in {**BASE, **changes}.items() if v is not None or k in NULL_KEPT}
        if config["model_type"] == "mistral" and "sliding_window" not in config:
            config["sliding_window"] = None
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        model = write_checkpoint(folder, config, dtype, shards, seed)
        (folder / "expected.json").write_text(json.dumps(expected(model, config, name)) + "\n")
        print(f"{name:20} {dtype:5} {sum(f.stat().st_size for f in folder.iterdir()) / 1e3:7.0f} kB")


if __name__ == "__main__":
    main()
