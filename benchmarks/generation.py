"""Tokens per second of ``LanguageModel.generate``, and of computing every prefix again for each token.

    python benchmarks/generation.py --prompt 64 --new 128

The model is the quickstart recipe's with random weights and room for the tokens, in one process. Both ways take turns;
medians are printed, by wall and by processor time, and what the cache takes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_tex import LanguageModel
from lightning_tex.models import DecoderConfig
from lightning_tex.models.generation import cache_bytes

# Of recipes/quickstart.yaml.
QUICKSTART = {
    "vocab_size": 2048, "dim": 192, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 512,
    "num_experts": 4, "top_k": 1, "moe_every": 2,
}  # fmt: skip


@torch.no_grad()
def by_prefixes(module: LanguageModel, ids: Tensor, new_tokens: int) -> Tensor:
    """The most likely tokens, each by a forward of all that is there."""
    assert module.decoder is not None
    for _ in range(new_tokens):
        ids = torch.cat([ids, module.decoder.logits(ids)[:, -1:].argmax(-1)], 1)
    return ids


def timed(run: Callable[[], Tensor]) -> tuple[tuple[float, float], Tensor]:
    """How long it takes, by wall and by processor time, and what it gives."""
    start = time.perf_counter(), time.process_time()
    result = run()
    return (time.perf_counter() - start[0], time.process_time() - start[1]), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("prompt", 64), ("new", 128), ("rows", 1), ("turns", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = DecoderConfig(**QUICKSTART, max_sequence_length=options.prompt + options.new)
    module = LanguageModel(config).eval()
    module.configure_model()
    ids = torch.randint(0, config.vocab_size, (options.rows, options.prompt))
    ways: dict[str, Callable[[], Tensor]] = {
        "every prefix again": lambda: by_prefixes(module, ids, options.new),
        "cached": lambda: module.generate(ids, options.new, temperature=0),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(options.turns):
        results = []
        for name, way in ways.items():
            taken, result = timed(way)
            times[name].append(taken)
            results.append(result)
        assert torch.equal(*results), "both ways give the same tokens"
    for name, every in times.items():
        wall, processor = (options.rows * options.new / statistics.median(one) for one in zip(*every, strict=True))
        print(f"{name:20} {wall:8.0f} tokens/s, {processor:8.0f} per second of processor time")
    size = cache_bytes(config, options.rows, options.prompt + options.new - 1, 4)
    print(f"{'memory of the cache':20} {size / 2**20:8.2f} MiB")


if __name__ == "__main__":
    main()
