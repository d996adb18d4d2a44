"""GRPO on sums of reasoning-gym: TRL trains, rewardrt samples.

    pip install rewardrt[trl] reasoning-gym matplotlib
    python grpo.py --model path/to/SmolLM2-135M-Instruct --steps 40 --plot grpo.svg
    python grpo.py --model path/to/SmolLM2-135M-Instruct --steps 40 --generate transformers

Prints a line a step: mean reward, seconds in all and for sampling, and the ratios p_trainer / p_sampler of the tokens,
which are 1 when the trainer's model gives each token the probability that it was drawn with.
"""

import argparse
import json
import time

import reasoning_gym
import torch
import transformers
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

import rewardrt
import rewardrt.trl


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a language model with its tokenizer")
    parser.add_argument(
        "--random", action="store_true", help="train a small random model with this model's tokenizer instead"
    )
    parser.add_argument("--generate", choices=["rewardrt", "transformers"], default="rewardrt")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=4, help="prompts a step")
    parser.add_argument("--generations", type=int, default=8, help="answers a prompt")
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="auto", help="of rewardrt")
    parser.add_argument("--threads", type=int, default=0, help="of torch and of rewardrt each; 0: one a core")
    parser.add_argument("--plot", help="file for the picture")
    parser.add_argument("--json", help="file for the numbers of each step")
    return parser.parse_args()


def policy_and_tokenizer(options):
    """The model in float32, so that trainer and sampler compute with the same numbers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    if not options.random:
        return transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32), tokenizer
    config = transformers.AutoConfig.from_pretrained(options.model)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 64, 128, 2
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 16
    torch.manual_seed(options.seed)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer


def sums(count, seed):
    """Sums of two one-digit numbers, and a reward: 1 for the number, less for an answer that only contains it."""
    task = reasoning_gym.create_dataset(
        "chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1, size=count, seed=seed
    )
    rows = [{"prompt": e["question"], "answer": e["answer"]} for e in task]

    def correct(completions, answer, **_):
        texts = [completion.strip().removesuffix(".") for completion in completions]
        return [task.score_answer(text, {"answer": right}) for text, right in zip(texts, answer, strict=True)]

    return Dataset.from_list(rows), correct


class Trainer(GRPOTrainer):
    """GRPOTrainer that also notes the times of sampling, and p_trainer / p_sampler where the sampler said its
    log-probs."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ratios, self.sampling_seconds = [], []

    def _generate(self, prompts):
        start = time.perf_counter()
        result = super()._generate(prompts)
        self.sampling_seconds.append(time.perf_counter() - start)
        return result

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.trainer_logps = result[0].detach()
        return result

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if "sampling_per_token_logps" in inputs:
            ratio = torch.exp(self.trainer_logps - inputs["sampling_per_token_logps"])
            self.ratios.append(ratio[inputs["completion_mask"].bool()])
        return loss


class Report(transformers.TrainerCallback):
    """A line a step."""

    def __init__(self):
        self.rows, self.trainer = [], None

    def on_step_begin(self, *_, **__):
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds = time.perf_counter() - self.start

    def on_log(self, args, state, control, logs=None, **_):
        if "reward" not in logs:
            return
        row = {
            "step": state.global_step,
            "reward": logs["reward"],
            "seconds": self.seconds,
            "sampling_seconds": self.trainer.sampling_seconds[-1],
        }
        if self.trainer.ratios:
            row["ratio_min"] = self.trainer.ratios[-1].min().item()
            row["ratio_max"] = self.trainer.ratios[-1].max().item()
        self.rows.append(row)
        print(" ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)


def plot(path, rows, ratios):
    """The mean reward of each step, and the histogram of all ratios."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3), constrained_layout=True)
    rewards = [row["reward"] for row in rows]
    left.plot(range(1, len(rows) + 1), rewards, ".", color="0.7", label="step")
    window = min(5, len(rewards))
    mean = [sum(rewards[i - window : i]) / window for i in range(window, len(rewards) + 1)]
    left.plot(range(window, len(rewards) + 1), mean, color="C0", label=f"mean of {window}")
    left.set(xlabel="optimiser step", ylabel="mean reward", ylim=(0, 1))
    left.legend(frameon=False)
    right.hist(ratios.numpy(), bins=101, range=(0.95, 1.05), color="C0")
    right.set(xlabel="p_trainer / p_sampler of a token", ylabel="tokens", yscale="log", ylim=(0.5, None))
    figure.savefig(path, dpi=120)


def main():
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    model, tokenizer = policy_and_tokenizer(options)
    batch = options.prompts * options.generations
    dataset, correct = sums(options.steps * options.prompts, options.seed)
    config = GRPOConfig(
        output_dir="grpo-run",
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        seed=options.seed,
        max_steps=options.steps,
        per_device_train_batch_size=batch,
        num_generations=options.generations,
        max_completion_length=options.max_tokens,
        temperature=1.0,
        beta=0.0,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
    )
    report = Report()
    with rewardrt.Runtime(options.device, threads=options.threads) as runtime:
        sampler = {}
        if options.generate == "rewardrt":
            policy = rewardrt.trl.load_policy(runtime, model, tokenizer)
            sampler["rollout_func"] = rewardrt.trl.rollout_func(policy)
        trainer = Trainer(
            model=model,
            args=config,
            processing_class=tokenizer,
            reward_funcs=correct,
            train_dataset=dataset,
            callbacks=[report],
            **sampler,
        )
        report.trainer = trainer
        trainer.train()

    rows = report.rows
    third = max(1, len(rows) // 3)
    first, last = (sum(r["reward"] for r in part) / third for part in (rows[:third], rows[-third:]))
    summary = {
        "generate": options.generate,
        "steps": len(rows),
        "reward_first_third": first,
        "reward_last_third": last,
        "seconds_per_step": sum(r["seconds"] for r in rows[1:]) / max(1, len(rows) - 1),
        "sampling_seconds_per_step": sum(r["sampling_seconds"] for r in rows[1:]) / max(1, len(rows) - 1),
    }
    if trainer.ratios:
        ratios = torch.cat(trainer.ratios)
        summary |= {"ratio_min": ratios.min().item(), "ratio_max": ratios.max().item(), "tokens": ratios.numel()}
    print(json.dumps(summary))
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"summary": summary, "steps": rows}, file)
    if options.plot:
        plot(options.plot, rows, torch.cat(trainer.ratios) if trainer.ratios else torch.empty(0))


if __name__ == "__main__":
    main()
