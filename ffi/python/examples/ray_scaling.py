"""What actors cost and bring: tokens a second of one runtime, of one actor and of two, one thread each, in turns.

python ray_scaling.py --model path/to/SmolLM2-135M-Instruct
"""

import argparse
import statistics
import time

import numpy as np
import ray

import rewardrt
import rewardrt.ray


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    prompts = [f"The number {i} is" for i in range(options.prompts)]
    sampling = {"max_tokens": options.tokens, "seed": 1, "ignore_eos": True}

    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    runtime = rewardrt.Runtime("cpu", threads=1)
    model = runtime.load_model(options.model)
    pools = {n: rewardrt.ray.Pool(options.model, actors=n, device="cpu", threads=1) for n in (1, 2)}
    ways = {
        "one runtime": lambda: model.sample(prompts, **sampling).result(),
        "one actor": lambda: pools[1].sample(prompts, **sampling),
        "two actors": lambda: pools[2].sample(prompts, **sampling),
    }
    seconds = {name: [] for name in ways}
    for _ in range(options.rounds + 1):
        for name, sample in ways.items():
            start = time.perf_counter()
            result = sample()
            seconds[name].append(time.perf_counter() - start)
            assert len(result.ids) == options.prompts * options.tokens
    for name, times in seconds.items():
        # The first round warms up.
        median = statistics.median(times[1:])
        print(f"{name:12} {options.prompts * options.tokens / median:6.0f} tokens/s  {median:.2f} s")

    weights = [(t.name, np.zeros(t.shape, np.float16)) for t in model.tensors()]
    start = time.perf_counter()
    pools[2].update(weights, convert=True)
    size = sum(value.nbytes for _, value in weights)
    print(f"update of two actors, {size / 1e6:.0f} MB: {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main()
