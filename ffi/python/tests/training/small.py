"""A config small enough to train in a test."""

import transformers


def small_config(smollm2, **changes):
    """SmolLM2's config and vocabulary, two layers of 64."""
    config = transformers.AutoConfig.from_pretrained(smollm2)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    for name, value in {**sizes, **changes}.items():
        setattr(config, name, value)
    return config
