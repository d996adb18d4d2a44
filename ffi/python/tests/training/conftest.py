"""A small random policy with a real tokenizer, for what trains it."""

import pytest
import torch
import transformers

from small import small_config

# The models are tiny: threads would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer(smollm2):
    return transformers.AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture
def model(smollm2):
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(small_config(smollm2), dtype=torch.float32).eval()
