"""The words of ``lightning-tex bench``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lightning_tex.bench import communication
from lightning_tex.bench.combinations import COMBINATIONS
from lightning_tex.recipe import Recipe


def main(arguments: Sequence[str]) -> None:
    """Run ``lightning-tex bench``.

    Args:
        arguments: what follows ``bench`` on the command line.
    """
    parser = argparse.ArgumentParser("lightning-tex bench", description="Measure where it runs.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    add_communication(kinds)
    options, more = parser.parse_known_args(arguments)
    options.run(options, more)


def add_communication(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``bench communication``: a recipe under every combination of communication options."""
    names = [name.strip() for name in COMBINATIONS]
    parser = kinds.add_parser(
        "communication",
        help="step time and bytes sent under every combination of communication options",
        description="Train a recipe's model for a few steps under every combination of communication options, in "
        "turns, and show step time, speed against the baseline (full recomputation, no duplicate-token dropping) and "
        "bytes sent by axis. Further options are the recipe's own, such as --trainer.devices 8.",
    )
    parser.add_argument("--config", required=True, help="the recipe")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps timed together (default: 5)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them (default: 2)")
    parser.add_argument("--turns", type=int, default=3, help="turns of all combinations (default: 3)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {names}; baseline is added")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")

    def run(options: argparse.Namespace, recipe_options: list[str]) -> None:
        if min(options.steps, options.turns, options.warmup) < 1:
            parser.error("--steps, --turns and --warmup must be at least 1")
        wanted = {name.strip() for name in options.only or names}
        if unknown := wanted - set(names):
            parser.error(f"--only {sorted(unknown)}; legal: {names}")
        combinations = {n: c for n, c in COMBINATIONS.items() if n.strip() in wanted or n == "baseline"}
        recipe = Recipe(options.config, recipe_options)
        communication.run(recipe, combinations, options.warmup, options.steps, options.turns, options.json)

    parser.set_defaults(run=run)
