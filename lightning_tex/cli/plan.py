"""Floor 7: ``lightning-tex plan``: what fits, how fast, on which layout, from a recipe or from sizes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from lightning_tex.cli import plan_paper, plan_scaling, plan_tables
from lightning_tex.cli.plan_recipe import own_candidate, read_recipe
from lightning_tex.errors import UserValueError
from lightning_tex.models import DecoderConfig
from lightning_tex.optim.state_config import OPTIMIZER_STATE_FORMATS, ZERO_STAGES
from lightning_tex.parallel.activation_checkpointing import ACTIVATION_CHECKPOINTING
from lightning_tex.parallel.precision import PRECISIONS
from lightning_tex.planner import paper
from lightning_tex.planner.cluster import CLUSTERS, Cluster
from lightning_tex.planner.describe import describe_decoder
from lightning_tex.planner.layouts import Choices, Job
from lightning_tex.planner.search import largest_base, plan, plan_all

# Of a decoder's sizes those that a plan depends on.
_SIZES = [field for field in fields(DecoderConfig) if field.name not in ("max_sequence_length", "rope_base", "dropout")]
_RECOMPUTE = {value or "none": value for value in ACTIVATION_CHECKPOINTING}
# Of what neither options nor recipe say.
_SEQUENCE_LENGTH, _PRECISION, _ACTIVATION = 2048, "bf16-mixed", "gelu"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as all errors of the command line are."""
        raise UserValueError(message)


def main(arguments: Sequence[str]) -> None:
    """Run ``lightning-tex plan``.

    Args:
        arguments: what follows ``plan`` on the command line.

    Raises:
        ValueError: what the user can put right, in one line.
    """
    if "--trace" in arguments:
        from lightning_tex.cli.trace import run  # takes seconds to import

        run(arguments)
        return
    parser = _parser()
    options, more = parser.parse_known_args(arguments)
    if more and options.config is None:
        parser.error(f"unknown: {' '.join(more)}")
    if options.plot and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib; legal: pip install matplotlib, or no --plot")
    if options.reproduce_paper:
        report = paper.reproduce()
        plan_paper.show(report)
        if options.plot:
            plan_paper.draw(report, options.plot)
    else:
        report = _plan(options, more, parser)
    if options.json:
        print(json.dumps(report), flush=True)


def _plan(options: argparse.Namespace, more: list[str], parser: _Parser) -> dict[str, Any]:
    if options.cluster is None:
        parser.error(f"--cluster is needed; legal: {', '.join(CLUSTERS)}, or a .yaml file")
    cluster = Cluster.named(options.cluster)
    if options.gpus_per_node is not None:
        cluster = cluster.with_gpus_per_node(options.gpus_per_node)
    job, own = _job(options, more, parser)
    choices = Choices(
        options.tensor_parallel_size,
        options.expert_parallel_size,
        options.expert_tensor_parallel_size,
        options.micro_batch,
        options.zero_stage,
        [bool(value) for value in options.sequence_parallel],
        [_RECOMPUTE[name] for name in options.activation_checkpointing],
        options.optimizer_state_format or OPTIMIZER_STATE_FORMATS,
    )
    if options.largest_base:
        # Cutting every matrix over many nodes would fit anything, at no speed to speak of.
        formats = options.optimizer_state_format or ["fp32"]
        choices = replace(choices, most_tensor=cluster.gpus_per_node, optimizer_state_format=formats)
        largest = largest_base(job, cluster, choices)
        report = plan_tables.largest_report(job, cluster, largest)
        plan_tables.show_largest(report)
        return report
    if options.weak_scaling:
        report = plan_scaling.report(job, cluster, choices)
        plan_scaling.show(report)
        if options.plot:
            plan_scaling.draw(report, options.plot)
        return report
    plans = plan_all(job, cluster, choices)
    candidate = own_candidate(job, own)
    report = plan_tables.report(job, cluster, plans, None if candidate is None else plan(job, candidate, cluster))
    plan_tables.show(report, options.rows)
    if options.plot:
        plan_tables.draw(report, options.plot, options.rows)
    return report


def _job(options: argparse.Namespace, more: list[str], parser: _Parser) -> tuple[Job, dict[str, Any]]:
    """The job of the options, over that of the recipe; and what the recipe gives the strategy."""
    given = {size.name: value for size in _SIZES if (value := getattr(options, size.name)) is not None}
    own: dict[str, Any] = {}
    defaults: dict[str, Any] = {"sequence_length": _SEQUENCE_LENGTH, "precision": _PRECISION}
    if options.config is None:
        if missing := [name for name in ("dim", "num_layers", "num_heads", "vocab_size") if name not in given]:
            parser.error(f"--config, or sizes are needed: {', '.join(map(_flag, missing))} are missing")
        model = describe_decoder(DecoderConfig(**{"activation": _ACTIVATION, **given}))
    else:
        recipe = read_recipe(options.config, more, given)
        model, defaults, own = recipe.model, recipe.numbers, recipe.strategy
    if (sizes := model.config) is not None and not model.experts:
        where = f"recipe {options.config}" if options.config else "the model"
        parser.error(
            f"{where} has no MoE layer (num_experts={sizes.num_experts}, num_layers={sizes.num_layers}, "
            f"moe_every={sizes.moe_every}); legal: num_experts of at least 2 and moe_every of at most num_layers"
        )
    gpus = options.gpus or defaults.get("gpus")
    batch = options.global_batch_size or defaults.get("global_batch_size")
    if gpus is None:
        parser.error("--gpus is needed: how many ranks there are")
    if batch is None:
        parser.error("--global-batch-size is needed: sequences of one optimizer step over all ranks")
    length = options.sequence_length or defaults["sequence_length"]
    precision = options.precision or defaults["precision"]
    two_groups = defaults.get("two_groups", True)
    return Job(model, gpus, length, batch, precision, options.imbalance, two_groups), own


def _parser() -> _Parser:
    parser = _Parser(
        "lightning-tex plan",
        usage="lightning-tex plan --cluster NAME (--config RECIPE | --dim D --num-layers L ...) [--OPTION VALUE ...]",
        description="Foresee memory, step time and bytes sent of every legal layout of a mixture-of-experts model on a "
        "cluster, and recommend one. Sizes come from a recipe or from options; with a recipe, further options are "
        "the recipe's own, such as --trainer.num_nodes 16.",
    )
    parser.add_argument("--config", help="a recipe; sizes given as options take precedence")
    parser.add_argument(
        "--cluster", metavar="NAME|FILE", help=f"{', '.join(CLUSTERS)}, or a .yaml file of their fields"
    )
    parser.add_argument("--gpus", type=int, help="ranks (default: the recipe's)")
    parser.add_argument("--gpus-per-node", type=int, help="used of each node (default: all)")
    parser.add_argument("--sequence-length", type=int, help=f"tokens (default: the recipe's, else {_SEQUENCE_LENGTH})")
    parser.add_argument("--global-batch-size", type=int, help="sequences of an optimizer step (default: the recipe's)")
    parser.add_argument("--precision", help=f"{', '.join(PRECISIONS)} (default: the recipe's, else {_PRECISION})")
    parser.add_argument("--imbalance", type=float, default=1.0, help="dropless: rows of the fullest rank over the mean")
    sizes = parser.add_argument_group("sizes", "of the model; as in lightning_tex.models.DecoderConfig")
    for field in _SIZES:
        kind: Any = {"activation": str, "capacity_factor": float}.get(field.name, int)
        if "coefficient" in field.name:
            kind = float
        sizes.add_argument(_flag(field.name), type=_yes_no if "bool" in str(field.type) else kind, metavar="N")
    kept = parser.add_argument_group("choices", "what is tried; left out: everything legal")
    for name in ("tensor_parallel_size", "expert_parallel_size", "expert_tensor_parallel_size", "micro_batch"):
        kept.add_argument(_flag(name), type=_positive, metavar="N")
    kept.add_argument("--zero-stage", nargs="+", type=int, choices=ZERO_STAGES, default=list(ZERO_STAGES))
    kept.add_argument("--sequence-parallel", nargs="+", type=_yes_no, default=[False, True], metavar="true|false")
    kept.add_argument("--activation-checkpointing", nargs="+", choices=list(_RECOMPUTE), default=list(_RECOMPUTE))
    kept.add_argument("--optimizer-state-format", nargs="+", choices=OPTIMIZER_STATE_FORMATS)
    shown = parser.add_argument_group("what is shown")
    shown.add_argument("--trace", action="store_true", help="run the recipe itself without memory; --trace --help")
    shown.add_argument(
        "--largest-base",
        action="store_true",
        help="the largest base model that fits, tensor ranks within a node",
    )
    shown.add_argument("--weak-scaling", action="store_true", help="growth with ranks, experts, base; what axes pay")
    shown.add_argument("--reproduce-paper", action="store_true", help="the figures of the TED paper, beside its own")
    shown.add_argument("--rows", type=_positive, default=12, help="layouts in the table (default: 12)")
    shown.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    shown.add_argument("--plot", type=Path, metavar="FILE", help="draw memory and time as stacked bars")
    return parser


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}; legal: a whole number of at least 1")
    return int(text)


def _yes_no(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text}; legal: true, false")
    return text.lower() == "true"
