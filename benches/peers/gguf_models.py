"""Writes llama.cpp's input files from a Hugging Face model folder.

    python benches/peers/gguf_models.py MODEL_FOLDER OUT_FOLDER

writes OUT_FOLDER/smollm2-bf16.gguf and OUT_FOLDER/smollm2-q8_0.gguf from model.safetensors, config.json and
tokenizer.json, so that llama.cpp runs the very weights that rewardrt and transformers run: bf16 matrices bit for bit, or
rounded to Q8_0 by gguf's own quantiser. Norms are f32. The embedding is stored like the other matrices and serves as the
head too, as in the folder. Rows of q and k are put into the order of llama.cpp's converter.

Llama with tied embeddings, bf16 weights and plain rope only. Files that are there are kept: remove them when the model
changes. Needs numpy and gguf, no torch.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType, TokenType

FILES = {
    "smollm2-bf16.gguf": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "smollm2-q8_0.gguf": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
OUTSIDE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
INSIDE = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}


def read_safetensors(path):
    """Yields (name, f32 array) of each bf16 tensor."""
    data = np.memmap(path, dtype=np.uint8, mode="r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    for name, info in json.loads(data[8:start].tobytes()).items():
        if name == "__metadata__":
            continue
        if info["dtype"] != "BF16":
            sys.exit(f"{name}: {info['dtype']}, expected BF16")
        begin, end = info["data_offsets"]
        bits = data[start + begin:start + end].view("<u2").astype(np.uint32) << 16
        yield name, bits.view(np.float32).reshape(info["shape"])


def gguf_name(name):
    if name in OUTSIDE:
        return OUTSIDE[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{INSIDE[rest.removesuffix('.weight')]}.weight"


def permute(w, heads):
    """Puts the rows of q or k into llama.cpp's order: rotary pairs side by side."""
    rows, cols = w.shape
    return w.reshape(heads, 2, rows // heads // 2, cols).swapaxes(1, 2).reshape(rows, cols)


def check(config):
    expected = {"model_type": "llama", "rope_scaling": None, "tie_word_embeddings": True, "attention_bias": False,
                "mlp_bias": False}
    for key, value in expected.items():
        if config[key] != value:
            sys.exit(f"config.json: {key} is {config[key]}, this script knows {value} only")


def add_architecture(writer, config):
    heads = config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def add_tokenizer(writer, config, tokenizer):
    tokens = {id: token for token, id in tokenizer["model"]["vocab"].items()}
    types = {}
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    ids = range(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([tokens[i] for i in ids])
    writer.add_token_types([types.get(i, TokenType.NORMAL) for i in ids])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def add_tensors(writer, path, config, kind):
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, w in read_safetensors(path):
        name = gguf_name(name)
        if w.ndim == 1:
            writer.add_tensor(name, w)
            continue
        for part, count in heads.items():
            if f".{part}." in name:
                w = permute(w, count)
        writer.add_tensor(name, gguf.quants.quantize(w, kind), raw_dtype=kind)


def write_models(model, out):
    """Writes the files that are not there yet; returns their paths, bf16 first."""
    model, out = Path(model), Path(out)
    config = json.loads((model / "config.json").read_text())
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    check(config)
    out.mkdir(parents=True, exist_ok=True)
    for name, (kind, file_type) in FILES.items():
        if (out / name).exists():
            continue
        unfinished = out / f"{name}.unfinished"
        writer = gguf.GGUFWriter(unfinished, "llama")
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_architecture(writer, config)
        add_tokenizer(writer, config, tokenizer)
        add_tensors(writer, model / "model.safetensors", config, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        unfinished.rename(out / name)
    return [out / name for name in FILES]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    for path in write_models(*sys.argv[1:]):
        print(f"{path}: {path.stat().st_size / 1e6:.0f} MB")
