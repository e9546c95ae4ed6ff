"""``lightning-tex plan``: what fits, how fast, on which layout, from a recipe or from sizes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_type_hints

from jsonargparse.typing import PositiveFloat

from lightning_tex.cli import plan_scaling, plan_tables
from lightning_tex.cli.options import Command, Count
from lightning_tex.cli.plan_recipe import language_model_on_meta, own_candidate, read_recipe
from lightning_tex.cli.tables import require_matplotlib
from lightning_tex.models import DecoderConfig
from lightning_tex.optim.state_config import OPTIMIZER_STATE_FORMATS, ZERO_STAGES, OptimizerStateFormat, ZeroStage
from lightning_tex.parallel.activation_checkpointing import ACTIVATION_CHECKPOINTING
from lightning_tex.parallel.errors import UserFileError, UserValueError
from lightning_tex.planner.batches import TokenBlocks
from lightning_tex.planner.cluster import CLUSTERS, Cluster
from lightning_tex.planner.describe import describe_decoder
from lightning_tex.planner.largest_base import largest_base
from lightning_tex.planner.layouts import Choices, Job
from lightning_tex.planner.optimizers import LANGUAGE_MODELS_OWN
from lightning_tex.planner.search import plan, plan_all
from lightning_tex.planner.states_only import StatesOnly
from lightning_tex.planner.traced import TracedActivations, UntraceableError

_BENCHMARKS = Path(__file__).parents[2] / "benchmarks"  # beside the package in a clone
_RECOMPUTE = {value or "none": value for value in ACTIVATION_CHECKPOINTING}
# Of what neither options nor recipe say.
_SEQUENCE_LENGTH, _PRECISION, _ACTIVATION = 2048, "bf16-mixed", "gelu"


@dataclass(frozen=True)
class JobOptions:
    """What is planned.

    Args:
        config: a recipe; sizes given as options take precedence.
        cluster: a built-in cluster, or a .yaml file of its fields; left out: the recipe's.
        gpus: ranks; left out: the recipe's.
        gpus_per_node: used of each node; left out: all.
        sequence_length: tokens; left out: the recipe's, else 2048.
        global_batch_size: sequences of an optimizer step over all ranks; left out: the recipe's.
        precision: as the Trainer's; left out: the recipe's, else bf16-mixed.
        imbalance: dropless: rows of the fullest rank over the mean.
    """

    config: str | None = None
    cluster: str | None = None
    gpus: int | None = None
    gpus_per_node: int | None = None
    sequence_length: int | None = None
    global_batch_size: int | None = None
    precision: str | None = None
    imbalance: PositiveFloat = 1.0


# Of a decoder's sizes those that a plan depends on.
_SIZE_HINTS = {
    size.name: get_type_hints(DecoderConfig)[size.name]
    for size in fields(DecoderConfig)
    if size.name not in ("max_sequence_length", "rope_base", "dropout", "router", "rope_scaling")
}
SizeOptions = make_dataclass(
    "SizeOptions", [(name, hint | None, field(default=None)) for name, hint in _SIZE_HINTS.items()], frozen=True
)
SizeOptions.__doc__ = "Sizes of the model; as in lightning_tex.models.DecoderConfig."


@dataclass(frozen=True)
class ChoiceOptions:
    """What is tried; left out: everything legal.

    Args:
        tensor_parallel_size: size of the axis.
        expert_parallel_size: size of the axis.
        expert_tensor_parallel_size: size of the axis.
        micro_batch: sequences of a rank at once.
        zero_stage: to try.
        sequence_parallel: to try.
        activation_checkpointing: to try.
        optimizer_state_format: to try.
        expert_chunks: of a MoE layer's tokens; left out: as the strategy's "auto".
    """

    tensor_parallel_size: Count | None = None
    expert_parallel_size: Count | None = None
    expert_tensor_parallel_size: Count | None = None
    micro_batch: Count | None = None
    zero_stage: list[ZeroStage] = field(default_factory=lambda: list(ZERO_STAGES))
    sequence_parallel: list[bool] = field(default_factory=lambda: [False, True])
    activation_checkpointing: list[Literal["none", "full", "communication_aware"]] = field(
        default_factory=lambda: list(_RECOMPUTE)
    )
    optimizer_state_format: list[OptimizerStateFormat] | None = None
    expert_chunks: Count | None = None

    def choices(self) -> Choices:
        """As the planner takes them."""
        return Choices(
            self.tensor_parallel_size,
            self.expert_parallel_size,
            self.expert_tensor_parallel_size,
            self.micro_batch,
            self.zero_stage,
            self.sequence_parallel,
            [_RECOMPUTE[name] for name in self.activation_checkpointing],
            self.optimizer_state_format or OPTIMIZER_STATE_FORMATS,
            expert_chunks=self.expert_chunks or "auto",
        )


@dataclass(frozen=True)
class ShowOptions:
    """What is shown.

    Args:
        trace: run the recipe itself without its memory; see --trace --help.
        largest_base: the largest base model that fits, tensor ranks within a node.
        weak_scaling: growth with ranks, experts and base size, and what axes pay.
        reproduce_paper: the figures of the TED paper, beside the planner's.
        rows: layouts in the table.
        plot: draw memory and time to this file (needs matplotlib).
    """

    trace: bool = False
    largest_base: bool = False
    weak_scaling: bool = False
    reproduce_paper: bool = False
    rows: Count = Count(12)
    plot: Path | None = None


def foresee(
    wanted: JobOptions, sizes: Any, choices: ChoiceOptions, shown: ShowOptions, more: list[str]
) -> dict[str, Any]:
    """Foresee memory, step time and bytes sent of every legal layout of a mixture-of-experts model on a cluster, and
    recommend one. Sizes come from a recipe (--config) or from options (--dim, --num_layers, ..); with a recipe,
    further options are the recipe's own, such as --trainer.num_nodes 16.
    """
    if more and wanted.config is None:
        raise UserValueError(PLAN.unknown(more))
    require_matplotlib(shown.plot)
    if shown.reproduce_paper:
        return _paper(shown)
    given = {name: value for name in _SIZE_HINTS if (value := getattr(sizes, name)) is not None}
    return _plan(wanted, given, choices, shown, more)


PLAN = Command("plan", foresee, (JobOptions, SizeOptions, ChoiceOptions, ShowOptions), takes_recipe=True)


def main(words: Sequence[str]) -> None:
    """Run ``lightning-tex plan``, or its dry run."""
    if "--trace" not in words:
        PLAN(words)
        return
    from lightning_tex.cli import trace  # takes seconds to import

    trace.main(words)


def _paper(shown: ShowOptions) -> dict[str, Any]:
    if shown.plot is not None:
        raise UserValueError(
            "--plot draws layouts, and --reproduce_paper has none; legal: no --plot, or "
            "benchmarks/paper_figures.py --plot"
        )
    if not (_BENCHMARKS / "paper_figures.py").is_file():
        raise UserFileError(
            "--reproduce_paper runs benchmarks/paper_figures.py, which is in the project's repository and not in what "
            "is installed; legal: an installation from a clone, `pip install -e .`, or without one `python "
            "benchmarks/paper_figures.py` in a clone"
        )
    sys.path.insert(0, str(_BENCHMARKS))  # as if that script were run
    report: dict[str, Any] = import_module("paper_figures").reproduce()
    return report


def _plan(
    wanted: JobOptions, given: dict[str, Any], choose: ChoiceOptions, shown: ShowOptions, more: list[str]
) -> dict[str, Any]:
    cluster = None if wanted.cluster is None and wanted.config is not None else _cluster(wanted.cluster)
    job, own, named = _job(wanted, given, more)
    cluster = cluster or _cluster(named)
    if wanted.gpus_per_node is not None:
        cluster = cluster.with_gpus_per_node(wanted.gpus_per_node)
    choices = replace(choose.choices(), ranks_per_node=cluster.gpus_per_node)
    if shown.largest_base:
        # Sharding every matrix over many nodes would fit anything, at no speed to speak of.
        formats = choose.optimizer_state_format or ["fp32"]
        choices = replace(choices, most_tensor=cluster.gpus_per_node, optimizer_state_format=formats)
        report = plan_tables.largest_report(job, cluster, largest_base(job, cluster, choices))
        plan_tables.show_largest(report)
        return report
    if shown.weak_scaling:
        report = plan_scaling.report(job, cluster, choices)
        plan_scaling.show(report)
        if shown.plot:
            plan_scaling.draw(report, shown.plot)
        return report
    report = _report(job, cluster, choices, own, shown.rows)
    plan_tables.show(report, shown.rows)
    if shown.plot:
        plan_tables.draw(report, shown.plot, shown.rows)
    return report


def _cluster(name: str | None) -> Cluster:
    if name is None:
        raise UserValueError(f"--cluster is needed; legal: {', '.join(CLUSTERS)}, or a .yaml file")
    return Cluster.named(name)


def _report(job: Job, cluster: Cluster, choices: Choices, own: dict[str, Any], rows: int) -> dict[str, Any]:
    candidate = own_candidate(job, own, cluster.gpus_per_node)
    try:
        plans = plan_all(job, cluster, choices, wanted=rows)
        planned = None if candidate is None else plan(job, candidate, cluster)
    except UntraceableError as error:
        return _report(replace(job, activations=StatesOnly(str(error))), cluster, choices, own, rows)
    return plan_tables.report(job, cluster, plans, planned)


def _job(wanted: JobOptions, given: dict[str, Any], more: list[str]) -> tuple[Job, dict[str, Any], str | None]:
    """The job of the options, over that of the recipe; what the recipe gives the strategy, and the cluster it names."""
    own: dict[str, Any] = {}
    cluster = None
    defaults: dict[str, Any] = {"sequence_length": _SEQUENCE_LENGTH, "precision": _PRECISION}
    if wanted.config is None:
        if missing := [f"--{name}" for name in ("dim", "num_layers", "num_heads", "vocab_size") if name not in given]:
            raise UserValueError(f"--config, or sizes are needed: {', '.join(missing)} are missing")
        model = describe_decoder(DecoderConfig(**{"activation": _ACTIVATION, **given}))
        if not model.declared:
            defaults["activations"] = TracedActivations(
                language_model_on_meta(model), None, TokenBlocks(given["vocab_size"])
            )
    else:
        recipe = read_recipe(wanted.config, more, given)
        model, defaults, own, cluster = recipe.model, recipe.numbers, recipe.strategy, recipe.cluster
    if (sizes := model.config) is not None and not model.experts:
        where = f"recipe {wanted.config}" if wanted.config else "the model"
        raise UserValueError(
            f"{where} has no MoE layer (num_experts={sizes.num_experts}, num_layers={sizes.num_layers}, "
            f"moe_every={sizes.moe_every}); legal: num_experts of at least 2 and moe_every of at most num_layers"
        )
    gpus = wanted.gpus or defaults.get("gpus")
    batch = wanted.global_batch_size or defaults.get("global_batch_size")
    if gpus is None:
        raise UserValueError("--gpus is needed: how many ranks there are")
    if batch is None:
        raise UserValueError("--global_batch_size is needed: sequences of one optimizer step over all ranks")
    length = wanted.sequence_length or defaults["sequence_length"]
    precision = wanted.precision or defaults["precision"]
    optimizer, activations = defaults.get("optimizer", LANGUAGE_MODELS_OWN), defaults.get("activations")
    documents = defaults.get("document_mask", False)
    job = Job(model, gpus, length, batch, precision, wanted.imbalance, optimizer, activations, documents)
    return job, own, cluster
