"""rewardrt.trl with TRL's own GRPOTrainer, against transformers' numbers."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import GRPOConfig, GRPOTrainer

import rewardrt
import rewardrt.trl

from checkpoints import ROOT
from small import small_config

EXAMPLE = ROOT / "ffi" / "python" / "examples" / "grpo.py"
IDS = [[101, 2002, 300, 4004, 55, 66], [7, 8, 9, 1010]]


def torch_logprobs(model, ids, temperature=1.0):
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1] / temperature
    return torch.log_softmax(logits.float(), -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()


def assert_same(policy, model):
    for row, ids in zip(policy.logprobs(IDS).result(60), IDS, strict=True):
        np.testing.assert_allclose(row[1:], torch_logprobs(model, ids), atol=1e-4)


def changed(model):
    """The model after what a step of training may do to it."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def test_a_model_in_memory_is_loaded_as_it_is(runtime, model, tokenizer):
    with rewardrt.trl.load_policy(runtime, model, tokenizer) as policy:
        assert {t.dtype for t in policy.tensors()} == {"float32"}
        assert_same(policy, model)
        # The folder that it was loaded from is gone.
        assert policy.tokenizer.encode("Hi there").tolist() == tokenizer("Hi there")["input_ids"]


@pytest.mark.parametrize("tied", [True, False])
def test_pushed_weights_are_the_trainers(runtime, smollm2, tokenizer, tied):
    config = small_config(smollm2, tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with rewardrt.trl.load_policy(runtime, model, tokenizer) as policy:
        assert rewardrt.trl.push(policy, changed(model)) == 1
        assert policy.version == 1
        assert_same(policy, model)


def test_an_adapter_is_pushed_merged(runtime, model, tokenizer):
    with rewardrt.trl.load_policy(runtime, model, tokenizer) as policy:
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        adapted = get_peft_model(model, config).eval()
        want = [torch_logprobs(adapted, ids) for ids in IDS]
        rewardrt.trl.push(policy, adapted)
        for row, values in zip(policy.logprobs(IDS).result(60), want, strict=True):
            np.testing.assert_allclose(row[1:], values, atol=1e-4)
        # The trainer's model is as it was.
        for values, ids in zip(want, IDS, strict=True):
            np.testing.assert_allclose(torch_logprobs(adapted, ids), values, atol=1e-5)


def test_another_model_is_refused(runtime, smollm2, model, tokenizer):
    with rewardrt.trl.load_policy(runtime, model, tokenizer) as policy:
        before = policy.logprobs(IDS).result(60).values.copy()
        for changes, kind in (
            ({"hidden_size": 32}, rewardrt.ShapeError),
            ({"num_hidden_layers": 3}, rewardrt.NotFound),
            ({"num_hidden_layers": 1}, rewardrt.ShapeError),
            ({"tie_word_embeddings": False}, rewardrt.NotFound),
        ):
            other = transformers.AutoModelForCausalLM.from_config(small_config(smollm2, **changes), dtype=torch.float32)
            with pytest.raises(kind):
                rewardrt.trl.push(policy, other)
        assert policy.version == 0
        np.testing.assert_array_equal(policy.logprobs(IDS).result(60).values, before)


@pytest.fixture
def trainer(runtime, model, tokenizer, tmp_path):
    """Trains; its policy; and of every rollout (prompts, what it returned, the trainer's own log-probs at the time)."""
    returned = []
    policy = rewardrt.trl.load_policy(runtime, model, tokenizer)
    sample = rewardrt.trl.rollout_func(policy)

    def rollout(prompts, trainer):
        output = sample(prompts, trainer)
        answers = zip(output["prompt_ids"], output["completion_ids"], strict=True)
        own = [torch_logprobs(model, p + c, trainer.temperature)[len(p) - 1 :] for p, c in answers]
        returned.append((prompts, output, own))
        return output

    rows = [{"prompt": [{"role": "user", "content": f"Say {word}"}]} for word in ("one", "two", "three", "four")]

    def trained(**options):
        config = GRPOConfig(
            output_dir=str(tmp_path),
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=6,
            **{"learning_rate": 1e-2, "seed": 3, **options},
        )
        trainer = GRPOTrainer(
            model=model,
            args=config,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(rows),
            reward_funcs=lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids],
            rollout_func=rollout,
        )
        trainer.train()
        return trainer

    yield trained, policy, returned
    policy.close()


def test_what_the_trainer_is_given(trainer, tokenizer):
    train, _, returned = trainer
    train(max_steps=1)
    ((prompts, output, _),) = returned
    assert len(prompts) == len(output["prompt_ids"]) == len(output["completion_ids"]) == len(output["logprobs"]) == 8
    for prompt, ids in zip(prompts, output["prompt_ids"], strict=True):
        assert ids == tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert len(set(map(tuple, output["completion_ids"]))) == 8  # every answer has draws of its own
    assert all(1 <= len(ids) <= 6 for ids in output["completion_ids"])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_weights_after_each_step(trainer, temperature):
    """Whatever the optimiser did: the trainer's own log-probs, at its temperature, of every answer, at each of three
    steps."""
    train, policy, returned = trainer
    train(max_steps=3, temperature=temperature)
    assert len(returned) == 3
    for _, output, trainers in returned:
        for logprobs, want in zip(output["logprobs"], trainers, strict=True):
            np.testing.assert_allclose(logprobs, want, atol=1e-4)
    assert policy.version == 3  # pushed before the first rollout, and after two steps


def test_steps_that_share_a_rollout(trainer):
    """Two optimiser steps from one generation: TRL asks half as often, and is not sampled anew in between."""
    train, policy, returned = trainer
    train(max_steps=4, num_iterations=2)
    assert (policy.version, len(returned)) == (2, 2)


def test_training_again_pushes_again(trainer):
    """A second train() begins at step 0, where the first one pushed other weights; torch does not count what its fused
    optimizer wrote meanwhile."""
    train, policy, returned = trainer
    again = train(max_steps=1)
    again.train()
    assert policy.version == len(returned) == 2
    for _, output, trainers in returned:
        for logprobs, want in zip(output["logprobs"], trainers, strict=True):
            np.testing.assert_allclose(logprobs, want, atol=1e-4)


def test_weights_are_pushed_when_they_were_written_to(trainer, model):
    train, policy, _ = trainer
    ended = train(max_steps=1)
    sample = rewardrt.trl.rollout_func(policy)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    prompts = ["One", "Two"]
    model.eval()
    first = sample(prompts, ended)
    present = policy.version
    sample(prompts, ended)
    assert policy.version == present
    changed(model)
    other = sample(prompts, ended)
    assert policy.version == present + 1
    assert other["logprobs"] != first["logprobs"]
    model.load_state_dict(saved)  # as load_best_model_at_end does, at the same step
    assert sample(prompts, ended) == first
    assert policy.version == present + 2
    # Somebody else's weights in the policy are replaced too.
    rewardrt.trl.push(policy, changed(transformers.AutoModelForCausalLM.from_config(model.config)))
    assert sample(prompts, ended) == first


def test_an_evaluation_changes_no_draw_of_training(trainer, model):
    train, policy, _ = trainer
    ended = train(max_steps=1)
    prompts = ["One", "Two"]
    alone = rewardrt.trl.rollout_func(policy)
    want = [alone(prompts, ended) for _ in range(2)]
    assert want[0]["completion_ids"] != want[1]["completion_ids"]
    between = rewardrt.trl.rollout_func(policy)
    assert model.training
    assert between(prompts, ended) == want[0]
    model.eval()
    evaluated = between(prompts, ended)
    model.train()
    assert between(prompts, ended) == want[1]
    assert evaluated["completion_ids"] not in [output["completion_ids"] for output in want]


def test_the_same_seed_samples_the_same(trainer):
    train, _, returned = trainer
    for _ in range(2):
        train(max_steps=1, learning_rate=0.0)
    train(max_steps=1, learning_rate=0.0, seed=4)
    first, second, other = (output["completion_ids"] for _, output, _ in returned)
    assert first == second
    assert first != other


def test_another_engines_arguments_are_refused(trainer):
    train, _, _ = trainer
    with pytest.raises(rewardrt.Unsupported, match="typical_p"):
        train(max_steps=1, generation_kwargs={"typical_p": 0.9})


@pytest.fixture
def classifier(runtime, smollm2, tokenizer, tmp_path):
    """A random reward model, in transformers and here."""
    torch.manual_seed(2)
    config = small_config(smollm2, num_labels=2, pad_token_id=tokenizer.pad_token_id, max_position_embeddings=64)
    model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    with runtime.load_model(tmp_path / "reward", precision="f32") as loaded:
        yield model, loaded


@pytest.mark.parametrize("label", [0, 1])
def test_rewards_are_those_of_transformers(classifier, tokenizer, label):
    model, loaded = classifier
    prompts = [[{"role": "user", "content": f"Say {word}"}] for word in ("one", "two")]
    completions = [[{"role": "assistant", "content": text}] for text in ("One.", "Two, of course.")]
    reward = rewardrt.trl.reward_func(loaded, label=label)
    assert reward.__name__ == "reward"
    for p, c, got in zip(
        prompts, completions, reward(prompts=prompts, completions=completions, other=[1, 2]), strict=True
    ):
        text = tokenizer.apply_chat_template(p + c, tokenize=False)
        with torch.no_grad():
            want = model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0, label]
        assert got == pytest.approx(want.item(), abs=1e-5)


def test_texts_are_encoded_as_trl_does_it(classifier, tokenizer, runtime, tmp_path):
    """With a tokenizer that begins texts with BOS by itself, and special tokens in the text."""
    model, _ = classifier
    path = tmp_path / "reward" / "tokenizer.json"
    data = json.loads(path.read_text())
    bos = "<|im_start|>"
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [1], "tokens": [bos]}},
    }
    path.write_text(json.dumps(data))
    begins = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    assert begins("Hi")["input_ids"][0] == 1
    prompts, completions = ["Hi<|im_end|>", "One"], [" there<|im_end|>", " two"]
    with runtime.load_model(tmp_path / "reward", precision="f32") as loaded:
        assert loaded.tokenizer.encode("Hi").tolist() == begins("Hi")["input_ids"]
        got = rewardrt.trl.reward_func(loaded)(prompts=prompts, completions=completions)
    for prompt, completion, value in zip(prompts, completions, got, strict=True):
        inputs = begins(prompt + completion, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            assert value == pytest.approx(model(input_ids=inputs).logits[0, 0].item(), abs=1e-5)


def test_a_score_that_is_not_finite_costs_no_other(classifier, tokenizer):
    model, loaded = classifier
    reward = rewardrt.trl.reward_func(loaded)
    texts = ["Hi there", "One two", "Three four"]
    want = reward(prompts=texts, completions=["."] * 3)
    broken = tokenizer(texts[1])["input_ids"][0]
    with torch.no_grad():
        model.get_input_embeddings().weight[broken] = float("nan")
    rewardrt.trl.push(loaded, model)
    assert reward(prompts=texts, completions=["."] * 3) == [want[0], None, want[2]]


def test_what_cannot_be_scored_is_none(classifier):
    _, loaded = classifier
    reward = rewardrt.trl.reward_func(loaded, name="mine")
    assert reward.__name__ == "mine"
    values = reward(prompts=["Hi", "Hi"], completions=[" there", " there" * 100])
    assert values[0] is not None
    assert values[1] is None
    assert reward(prompts=["Hi"], completions=[" there" * 100]) == [None]


def test_the_example(smollm2, tmp_path):
    """Three steps with a random model: the whole script, and ratios as DESIGN.md wants them in f32."""
    report = tmp_path / "report.json"
    command = [
        sys.executable,
        EXAMPLE,
        "--model",
        smollm2,
        "--random",
        "--steps",
        "3",
        "--prompts",
        "2",
        "--generations",
        "4",
        "--device",
        "cpu",
        "--max-tokens",
        "8",
        "--json",
        report,
        "--plot",
        tmp_path / "grpo.svg",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert len(found["steps"]) == 3
    assert found["summary"]["tokens"] >= 3 * 8
    assert 0.999 < found["summary"]["ratio_min"] <= found["summary"]["ratio_max"] < 1.001
    assert (tmp_path / "grpo.svg").stat().st_size > 1000
