"""Processor time of a training step on a model that others train as well.

The model of ``slow_network.yaml`` with 8 sequences in a step and a clipped norm, on 4 ranks of this machine: tensor 2 x
expert 2, or expert 4. It runs without recomputation and in the communication options' baseline, in turns; each
``--peer`` runs somebody else's command in the same turns, which prints a JSON object with ``cpu_ms_per_step`` last:

    python benchmarks/common_model.py --turns 5 --peer "python their_model.py --steps 20" "python another.py"
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WARMUP = 3
# The strategy's options of each run, beside the recipe's.
RUNS: dict[str, dict[str, Any]] = {
    "no recomputation": {"activation_checkpointing": None},
    "no recomputation, expert 4": {
        "activation_checkpointing": None,
        "tensor_parallel_size": 1,
        "expert_parallel_size": 4,
    },
    "no recomputation, no DTD": {"activation_checkpointing": None, "duplicate_token_dropping": False},
    "full recomputation, no DTD": {"activation_checkpointing": "full", "duplicate_token_dropping": False},
    "DTD and CAC": {"activation_checkpointing": "communication_aware"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps timed together")
    parser.add_argument("--turns", type=int, default=3, help="turns of all runs")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="runs")
    parser.add_argument(
        "--peer", nargs="+", default=[], help="commands that print cpu_ms_per_step in a JSON object, last"
    )
    parser.add_argument("--run", choices=RUNS, help="train one run in this process and those it starts, and print it")
    options = parser.parse_args()
    if options.run:
        train(options.run, options.steps)
        return
    own = [sys.executable, __file__, "--steps", str(options.steps), "--run"]
    commands = {name: [*own, name] for name in options.only}
    commands |= {command: shlex.split(command) for command in options.peer}
    seen: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(options.turns):
        for name, command in commands.items():
            seen[name].append(last_line(command)["cpu_ms_per_step"])
            print(f"{name}: {seen[name][-1]:.0f} ms", flush=True)
    medians = {name: statistics.median(times) for name, times in seen.items()}
    print(json.dumps({"cpu_ms_per_step_all_ranks": medians, "all": seen}))


def last_line(command: list[str]) -> dict[str, Any]:
    """The JSON object that a command prints last."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def train(name: str, steps: int) -> None:
    """Train for a few steps; Lightning starts the other ranks by this same command."""
    from lightning_tex.bench.stopwatch import Stopwatch
    from lightning_tex.recipe import BARE_TRAINER, Recipe

    sizes = ["--data.init_args.global_batch_size", "8", "--trainer.gradient_clip_val", "1.0"]
    watch = Stopwatch(WARMUP, steps)
    length = {"max_steps": WARMUP + steps, "max_epochs": -1, "limit_val_batches": 0}
    fit = Recipe(str(HERE / "slow_network.yaml"), sizes).instantiate(RUNS[name], {**BARE_TRAINER, **length})
    fit.trainer.callbacks = [watch]  # and nothing that writes the configuration here
    fit.trainer.fit(fit.model, fit.datamodule)
    if fit.trainer.is_global_zero:
        measured = watch.measured
        assert measured is not None
        line = {"cpu_ms_per_step": measured.cpu_ms, "step_ms": measured.step_ms, "loss": measured.loss}
        print(json.dumps({"run": name, **line}), flush=True)


if __name__ == "__main__":
    main()
