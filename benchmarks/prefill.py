"""Prefill throughput: from the first submit until the last of many different random prompts has its first token.

    python -m benchmarks.prefill --config configs/benchmark_moonlight.toml [--repeats 3]

[benchmark] num_prompts prompts of prompt_len tokens are submitted at once and ask for one token each. The last line is
JSON.
"""

import argparse
import json
import statistics
import sys
import time

import numpy as np

from benchmarks.engine import Engine
from nmoe.config import Config, load_config
from nmoe.config_json import read_architecture


def prefill(engine: Engine, config: Config, vocab_size: int, seed: int) -> float:
    """Prompt tokens per second."""
    benchmark = config.benchmark
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, vocab_size, (benchmark.num_prompts, benchmark.prompt_len))
    started = time.monotonic()
    for prompt in prompts:
        engine.submit(prompt, 1)
    ended = 0
    while ended < len(prompts):
        ended += len(engine.receive().ended)
    return prompts.size / (time.monotonic() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--repeats", type=int, default=3, help="the first one warms up and is not counted")
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    vocab_size = read_architecture(config.model.path).vocab_size
    with Engine(config) as engine:
        rates = [prefill(engine, config, vocab_size, config.benchmark.seed + i) for i in range(arguments.repeats)]
    from benchmarks.setting import setting

    report = {
        "benchmark": "prefill",
        "model": config.model_name,
        "prompts": config.benchmark.num_prompts,
        "prompt_len": config.benchmark.prompt_len,
        "first_tokens_s": round(rates[0]),
        "tokens_s": round(statistics.median(rates[1:] or rates)),
        "ready_s": round(engine.ready_s, 1),
        "command": " ".join(sys.argv),
    }
    if config.parallel.device == "cuda":
        from benchmarks.ceilings import measure

        report["ceilings"] = measure()
    print(f"{report['tokens_s']} prompt tokens per second (first time {report['first_tokens_s']})")
    print(json.dumps(report | setting()))


if __name__ == "__main__":
    main()
