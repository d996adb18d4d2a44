"""Makes the golden adapters: small random LoRA adapters of the golden checkpoints as PEFT saves them, and what
transformers with PEFT computes from them in f32.

    pip install -r tests/golden/requirements.txt
    python tests/golden/make_adapters.py [name …]
        # writes tests/golden/adapters/<name>/{adapter_config.json,adapter_model.safetensors,expected.json}

The files are PEFT's own; `base_model_name_or_path` is the name of the golden checkpoint. The expected values come from
an adapter that PEFT has loaded from these very files. The seeds are fixed.
"""

import json
import shutil
import sys

import torch
from make import DTYPES, HERE, expected
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

LM, CLASSIFIER = dict(task_type="CAUSAL_LM"), dict(task_type="SEQ_CLS")

# name: (base, LoraConfig's arguments, stored dtype)
CASES = {
    "tied-qv": ("llama-tied", dict(LM, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]), "f32"),
    "tied-all": ("llama-tied", dict(LM, r=8, lora_alpha=4, use_rslora=True, target_modules="all-linear"), "bf16"),
    "tied-mlp": ("llama-tied", dict(LM, r=16, lora_alpha=16, target_modules=["gate_proj", "down_proj"]), "f32"),
    "odd-patterns": ("llama-odd-widths", dict(
        LM, r=16, lora_alpha=16, use_rslora=True, target_modules=r".*\.(self_attn\.(q|k|v|o)|mlp\.(up|down))_proj",
        rank_pattern={"down_proj": 5, r"^model\.layers\.0\.self_attn\.q_proj": 3, "k_proj": 1},
        alpha_pattern={r"1\.mlp\.up_proj": 3.5, "q_proj": 7}), "f32"),
    "qwen2-layers": ("qwen2-gqa-14-2", dict(
        LM, r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "up_proj"], layers_to_transform=[1]), "f16"),
    "biases-outputs": ("llama-biases", dict(
        LM, r=8, lora_alpha=12, target_modules=["o_proj", "gate_proj", "up_proj", "v_proj"],
        exclude_modules=["layers.0.mlp.up_proj"]), "f16"),
    "window-all": ("mistral-window", dict(LM, r=4, lora_alpha=6, target_modules="all-linear"), "f32"),
    "wide-all": ("llama-wide", dict(LM, r=16, lora_alpha=16, target_modules="all-linear"), "f16"),
    "labels-1-all": ("llama-labels-1", dict(CLASSIFIER, r=16, lora_alpha=16, target_modules="all-linear"), "f32"),
    "labels-3-qv": ("llama-labels-3", dict(CLASSIFIER, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]), "f32"),
    "labels-3-base-head": ("llama-labels-3", dict(r=8, lora_alpha=8, target_modules=["k_proj", "down_proj"]), "f32"),
}


def base_model(name):
    folder = HERE / name
    config = json.loads((folder / "config.json").read_text())
    auto = AutoModelForSequenceClassification if "Sequence" in config["architectures"][0] else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval(), config


def write_adapter(folder, base, arguments, dtype, seed):
    torch.manual_seed(seed)
    model, _ = base_model(base)
    model = get_peft_model(model, LoraConfig(**arguments))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.normal_(0, 0.12)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    file = folder / "adapter_model.safetensors"
    tensors = {n: t.to(DTYPES[dtype]).contiguous() for n, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()), indent=1, sort_keys=True) + "\n")


def main():
    unknown = set(sys.argv[1:]) - set(CASES)
    if unknown:
        sys.exit(f"no such case: {', '.join(sorted(unknown))}")
    for seed, (name, (base, arguments, dtype)) in enumerate(CASES.items()):
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        folder = HERE / "adapters" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_adapter(folder, base, arguments, dtype, seed)
        model, config = base_model(base)
        before = model(torch.tensor([[7, 8, 9]])).logits
        model = PeftModel.from_pretrained(model, folder).eval()
        change = (model(torch.tensor([[7, 8, 9]])).logits - before).abs().max().item()
        assert change > 0.05, f"{name} changes next to nothing"
        out = {"base": base, **expected(model, config, base)}
        (folder / "expected.json").write_text(json.dumps(out) + "\n")
        print(f"{name:20} {dtype:5} {sum(f.stat().st_size for f in folder.iterdir()) / 1e3:7.0f} kB, changes {change:.2f}")


if __name__ == "__main__":
    main()
