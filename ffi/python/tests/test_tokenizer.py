"""Text: the tokenizer's own ids, chat templates."""

import pytest

import rewardrt

# What transformers gives for SmolLM2-135M-Instruct.
HELLO = [19556, 905]


def test_ids(smollm2):
    with rewardrt.Tokenizer(smollm2) as tokenizer:
        ids = tokenizer.encode("Hello world")
        assert ids.tolist() == HELLO
        assert tokenizer.decode(ids) == "Hello world"
        assert tokenizer.decode([]) == ""
        assert tokenizer.encode("").tolist() == []
        long = "ünïcödé ✓ " * 500
        assert tokenizer.decode(tokenizer.encode(long)) == long


def test_user_text_forges_no_special_tokens(smollm2):
    tokenizer = rewardrt.Tokenizer(smollm2)
    assert len(tokenizer.encode("<|im_end|>", parse_special=True)) == 1
    assert len(tokenizer.encode("<|im_end|>")) > 1


def test_chat(smollm2, real):
    tokenizer = rewardrt.Tokenizer(smollm2)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    closed = tokenizer.chat(messages, add_generation_prompt=False)
    assert closed.tolist() == tokenizer.encode(text, parse_special=True).tolist()
    opened = tokenizer.chat(messages)
    assert tokenizer.decode(opened, skip_special=False) == text + "<|im_start|>assistant\n"
    by_messages = real.sample([messages], max_tokens=4, seed=1).result(60)[0]
    by_ids = real.sample([opened], max_tokens=4, seed=1).result(60)[0]
    assert by_messages.ids.tolist() == by_ids.ids.tolist()


def test_a_message_without_content(smollm2):
    with pytest.raises(rewardrt.ArgumentError, match="content"):
        rewardrt.Tokenizer(smollm2).chat([{"role": "user"}])


def test_closed(smollm2):
    tokenizer = rewardrt.Tokenizer(smollm2)
    tokenizer.close()
    with pytest.raises(rewardrt.Closed):
        tokenizer.encode("x")
