"""Planned against measured time of a step, on the slow network of two hosts of ``slow_network.py``.

At every rate: ``lightning-tex bench calibrate`` measures the profile of the two hosts; the planner foresees a step of
the recipe from it, on every layout below; then the layouts run in turns, each for some steps, and medians are compared:

    sudo python benchmarks/planned_steps.py --rates 500mbit 1gbit --json out.json

Needs root and iproute2, as ``slow_network.py`` does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slow_network import HERE, HOSTS, RANKS_PER_HOST, hosts, run

from lightning_tex.bench.combinations import Combination
from lightning_tex.bench.communication import CommunicationBench
from lightning_tex.cli.plan_recipe import own_candidate, read_recipe
from lightning_tex.parallel.layout import Communication
from lightning_tex.planner.cluster import Cluster
from lightning_tex.planner.layouts import Job
from lightning_tex.planner.step_time import step_time
from lightning_tex.recipe import Recipe

WORLD = HOSTS * RANKS_PER_HOST
ON_RANKS = ["--trainer.devices", str(RANKS_PER_HOST), "--trainer.num_nodes", str(HOSTS)]
CAC = {"activation_checkpointing": "communication_aware"}


def ways(tensor: int, expert: int, **more: Any) -> dict[str, Any]:
    return {"tensor_parallel_size": tensor, "expert_parallel_size": expert, "activation_checkpointing": None, **more}


LAYOUTS = {
    "tensor 2, expert 2": ways(2, 2),
    "tensor 2, expert 2, recomputed": ways(2, 2, activation_checkpointing="full"),
    "tensor 2, expert 2, replayed": ways(2, 2, **CAC),
    "tensor 2, expert 1": ways(2, 1),
    "expert 4": ways(1, 4),
    "data 4": ways(1, 1),
    "tensor 4": ways(4, 1),
    "tensor 2, expert 4 folded, sequence": ways(2, 4, expert_tensor_parallel_size=1, sequence_parallel=True),
}


@dataclass(frozen=True)
class Way(Combination):
    """A run with just these arguments of the strategy."""

    name: str = ""

    def options(self, tensor: int, expert: int | str) -> dict[str, Any]:
        return {"expert_tensor_parallel_size": None, **LAYOUTS[self.name]}

    def communication(self, by_options: Communication) -> Communication:
        """As the arguments say."""
        return by_options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=["500mbit", "1gbit"], help="tc rates, or 'unshaped'")
    parser.add_argument("--config", type=Path, default=HERE / "slow_network.yaml", help="the recipe")
    parser.add_argument("--steps", type=int, default=2, help="steps timed together")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them: the first ones are slower")
    parser.add_argument("--turns", type=int, default=3, help="turns of all layouts")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        measure(options)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # the hosts are taken down
    result = {}
    for rate in options.rates:
        result[rate] = compare(rate, options)
        show(rate, result[rate])
        if options.json:
            options.json.write_text(json.dumps(result, indent=2))


def compare(rate: str, options: argparse.Namespace) -> dict[str, Any]:
    """Profile, plans and measured steps at one rate."""
    with tempfile.TemporaryDirectory() as folder, hosts(rate) as names:
        profile = Path(folder) / "profile.yaml"
        calibrate = ["-m", "lightning_tex", "bench", "calibrate", "--device", "cpu", "--json", "--output", str(profile)]
        launcher = {"WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(RANKS_PER_HOST)}
        run(names, calibrate, launcher)
        cluster = Cluster.named(str(profile))
        numbers = ["--config", str(options.config), "--warmup", str(options.warmup)]
        numbers += ["--steps", str(options.steps), "--turns", str(options.turns)]
        measured = run(names, [__file__, "--rank", *numbers])["combinations"]
    rows = {}
    for name, given in LAYOUTS.items():
        planned = plan(options.config, given, cluster)
        seconds = measured[name]["step_ms"] / 1e3
        rows[name] = {"planned": planned["total"], "measured": seconds, "ratio": planned["total"] / seconds,
                      "all": measured[name]["step_ms_all"], "parts": planned["parts"]}  # fmt: skip
    return {"profile": vars(cluster), "layouts": rows}


def plan(config: Path, given: dict[str, Any], cluster: Cluster) -> dict[str, Any]:
    """Seconds of a step by the planner, and what they are made of."""
    recipe = read_recipe(str(config), ON_RANKS)
    numbers = recipe.numbers
    job = Job(recipe.model, WORLD, numbers["sequence_length"], numbers["global_batch_size"],
              numbers["precision"], optimizer=numbers["optimizer"])  # fmt: skip
    candidate = own_candidate(job, {**recipe.strategy, **given})
    assert candidate is not None
    time = step_time(job, candidate, cluster)
    return {"total": time.total, "parts": time.parts()}


def measure(options: argparse.Namespace) -> None:
    """On every rank: the layouts in turns."""
    bench = CommunicationBench(
        Recipe(str(options.config), ON_RANKS), options.warmup, options.steps, next(iter(LAYOUTS))
    )
    for _ in range(options.turns):
        bench.turn({name: Way(name=name) for name in LAYOUTS})
    if bench.is_first_rank:
        print(json.dumps(bench.report()), flush=True)


def show(rate: str, result: dict[str, Any]) -> None:
    """Print the comparison, and whether pairs of layouts are ranked alike."""
    rows = result["layouts"]
    print(f"--- {rate}\n{'':36}  planned s  measured s   ratio  spread", flush=True)
    for name, row in rows.items():
        spread = (max(row["all"]) - min(row["all"])) / statistics.median(row["all"])
        print(f"{name:36}  {row['planned']:9.3f}  {row['measured']:10.3f}  {row['ratio']:6.3f}  {spread:6.2f}")
    pairs = list(itertools.combinations(rows.values(), 2))
    right = sum((a["planned"] < b["planned"]) == (a["measured"] < b["measured"]) for a, b in pairs)
    print(f"{right} of {len(pairs)} pairs ranked as measured", flush=True)


if __name__ == "__main__":
    if os.geteuid() != 0:
        sys.exit("needs root: it builds two network namespaces")
    main()
