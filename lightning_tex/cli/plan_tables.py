"""What ``lightning-tex plan`` reports, as one object, as tables and as a figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lightning_tex.cli.tables import console, figure, parts_in, save, seconds, stack, table
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.planner.cluster import GIB, Cluster
from lightning_tex.planner.collective import sent_bytes
from lightning_tex.planner.declared import DeclaredFormulas
from lightning_tex.planner.describe import describe_decoder
from lightning_tex.planner.largest_base import LargestBase, decoder_config
from lightning_tex.planner.layouts import Job
from lightning_tex.planner.memory import activation_source, size
from lightning_tex.planner.search import Planned, Plans
from lightning_tex.planner.states_only import StatesOnly
from lightning_tex.planner.traced import TracedActivations
from lightning_tex.planner.traffic import step_collectives

FLOPS = (
    "MFU: model FLOPs over peak; model FLOPs are 3 x 2mnk of every product on whole matrices (a backward is twice), "
    "attention over the whole square, top_k experts a token, no recomputation.\n"
    "Times are a lower bound, kernels following each other without gaps: far below a small model's real step. "
    "A profile that `lightning-tex bench calibrate` measured comes closer."
)


# What the sources of activations mean for a plan.
ACTIVATIONS = {
    DeclaredFormulas.name: "what this package's layers are known to keep, for its decoder.",
    TracedActivations.name: "one micro-step of the module's own training_step, run without its memory; times are those "
    "of the package's layers and of torch.nn.Linear.",
    StatesOnly.name: "what forwards keep for backwards is not in the memory, and the time is that of the package's "
    "layers and of torch.nn.Linear. `lightning-tex plan --trace` runs the recipe and sees all.",
}


def row(planned: Planned) -> dict[str, Any]:
    """One layout of the report."""
    memory, time = planned.memory, planned.time
    return {
        **planned.candidate.options(),
        "layout": str(planned.candidate.layout),
        "fits": planned.fits,
        "peak_bytes": memory.peak,
        "memory_bytes": memory.parts(),
        "at_least": memory.at_least,
        "step_seconds": time.total,
        "step_seconds_by_part": time.parts(),
        "hidden_seconds": time.hidden,
        "tokens_per_second": time.tokens_per_second,
        "mfu": time.mfu,
    }


def _job(job: Job, cluster: Cluster) -> dict[str, Any]:
    activations = activation_source(job)
    return {
        "sizes": None if job.model.config is None else asdict(job.model.config),
        "parameters": job.model.counts(),
        "activations": activations.name,
        "activations_reason": activations.reason,
        "optimizer": {
            "class": job.optimizer.name,
            "groups": len(job.optimizer.grouping(job.model)),
            "assumed": job.optimizer.assumed,
        },
        "gpus": job.world,
        "sequence_length": job.sequence_length,
        "global_batch_size": job.global_batch_size,
        "precision": job.precision,
        "imbalance": job.imbalance,
        "cluster": asdict(cluster),
        "usable_bytes": cluster.usable_bytes,
        "flops": FLOPS,
    }


def report(job: Job, cluster: Cluster, plans: Plans, own: Planned | None) -> dict[str, Any]:
    """Everything of a plan, as it is printed with ``--json``.

    Args:
        job, cluster, plans: the plan.
        own: what the recipe itself says.
    """
    recommended = plans.recommendation
    rows = [row(each) for each in plans.found]
    found: dict[str, Any] = {
        **_job(job, cluster),
        "considered": plans.considered,
        "left_out": plans.left_out,
        "fitting": len(plans.fitting),
        "layouts": rows,
        "recommended": None,
        "recipe": None if own is None else row(own),
    }
    if recommended is not None:
        best = recommended.planned
        sent = sent_bytes(step_collectives(job, best.candidate))
        found["recommended"] = {
            **row(best),
            "place": next(place for place, each in enumerate(plans.found) if each is best),
            "reason": recommended.reason,
            "sent_bytes": {"/".join(key): float(n) for key, n in sent.items()},
        }
    return found


def show(found: Mapping[str, Any], rows: int) -> None:
    """Print a report: the first layouts and the recommended one as a table, and that one broken down."""
    out = console()
    counts = found["parameters"]
    out.print(
        f"{_many(sum(counts.values()))} parameters ({_many(counts['sharded'] + counts['replicated'])} dense, "
        f"{_many(counts['expert'])} experts) on {found['gpus']} x {found['cluster']['name']} with "
        f"{size(found['usable_bytes'])} for tensors; {found['global_batch_size']} x {found['sequence_length']} "
        f"tokens a step, {found['precision']}"
    )
    ways = table(
        "tensor", "expert", "e.tensor", "ZeRO", "seq.", "recompute", "states", "micro", "memory", "step", "waiting",
        "tokens/s", "MFU", left=["recompute", "states"],
    )  # fmt: skip
    best = found["recommended"]
    recommended = None if best is None else best["place"]
    for place in dict.fromkeys([*range(min(rows, len(found["layouts"]))), *([] if best is None else [recommended])]):
        first, *others = _cells(found["layouts"][place])
        ways.add_row(f"* {first}" if place == recommended else first, *others)
    out.print(ways)
    fitting = found["fitting"]
    out.print(f"{fitting} of {len(found['layouts'])} ways fit ({found['considered']} with their micro-batches).")
    if found["left_out"]:
        out.print(f"Of these {found['left_out']} were not traced, being slower than the {fitting} that fit.")
    if found["recipe"] is not None:
        own = found["recipe"]
        out.print(
            f"The recipe's own layout: {size(own['peak_bytes'])}, "
            f"{'fits' if own['fits'] else 'does not fit'}, {seconds(own['step_seconds'])} a step."
        )
    if best is None:
        least = min(each["peak_bytes"] for each in found["layouts"])
        out.print(f"Nothing fits: the least that any layout needs is {size(least)}.")
    else:
        _break_down(best)
    reason = f" ({found['activations_reason']})" if found["activations_reason"] else ""
    out.print(f"Activations: {found['activations']}{reason}: {ACTIVATIONS[found['activations']]}")
    out.print(_optimizer(found["optimizer"]))
    out.print(found["flops"])


def _optimizer(described: Mapping[str, Any]) -> str:
    if described["assumed"]:
        return f"Optimizer: {described['class']} over all parameters is assumed ({described['assumed']})."
    return f"Optimizer: {described['class']}, {described['groups']} parameter group(s)."


def waiting_seconds(planned: Mapping[str, Any]) -> float:
    """Of a layout's step: what its computation waits for others."""
    return sum(t for part, t in planned["step_seconds_by_part"].items() if " over " in part or "hidden" in part)


def _cells(each: Mapping[str, Any]) -> list[str]:
    recompute = {None: "no", "communication_aware": "comm.-aware"}.get(each["activation_checkpointing"], "full")
    return [
        str(each["tensor_parallel_size"]),
        str(each["expert_parallel_size"]),
        str(each["expert_tensor_parallel_size"]),
        str(each["zero_stage"]),
        "yes" if each["sequence_parallel"] else "no",
        recompute,
        each["optimizer_state_format"],
        str(each["micro_batch"]),
        (">" if each["at_least"] else "") + size(each["peak_bytes"]) + ("" if each["fits"] else " !"),
        seconds(each["step_seconds"]),
        seconds(waiting_seconds(each)),
        f"{each['tokens_per_second']:,.0f}",
        f"{100 * each['mfu']:.1f} %",
    ]


def _break_down(best: Mapping[str, Any]) -> None:
    out = console()
    options = {key: best[key] for key in ("tensor_parallel_size", "expert_parallel_size",
               "expert_tensor_parallel_size", "zero_stage", "sequence_parallel", "activation_checkpointing",
               "optimizer_state_format")}  # fmt: skip
    arguments = ", ".join(f"{key}={value!r}" for key, value in options.items())
    out.print(f"Recommended: TexMoEStrategy({arguments}),", soft_wrap=True)
    out.print(
        f"micro-batches of {best['micro_batch']}, accumulate_grad_batches={best['accumulate_grad_batches']}: "
        f"{best['layout']}"
    )
    if "reason" in best:
        out.print(f"It is row *, of all ways that fit number {best['place'] + 1} by speed: {best['reason']}.")
    named = ("memory of a rank", "time of a step")
    parts = table(named[0], "", named[1], "", "%", left=named)
    memory = [(name, size(taken)) for name, taken in best["memory_bytes"].items() if taken]
    memory.append(("peak", size(best["peak_bytes"])))
    total = best["step_seconds"]
    time = [(name, seconds(t), f"{100 * t / total:.1f}") for name, t in best["step_seconds_by_part"].items() if t]
    time.append(("step", seconds(total), "100"))
    for i in range(max(len(memory), len(time))):
        left = memory[i] if i < len(memory) else ("", "")
        parts.add_row(*left, *(time[i] if i < len(time) else ("", "", "")))
    out.print(parts)
    out.print(f"Beside these, {seconds(best['hidden_seconds'])} of gradients and parameters are hidden behind others.")


def largest_report(job: Job, cluster: Cluster, largest: LargestBase | None) -> dict[str, Any]:
    """The largest base model that fits, as it is printed with ``--json``.

    Raises:
        ValueError: none fits.
    """
    if largest is None:
        raise UserValueError(
            f"no model of the family with {decoder_config(job).num_experts} experts fits {job.world} x {cluster.name}: "
            "not even width 768"
        )
    return {
        **_job(replace(job, model=describe_decoder(largest.config)), cluster),
        "base_parameters": largest.base,
        "recommended": row(largest.planned),
    }


def show_largest(found: Mapping[str, Any]) -> None:
    """Print the largest base model."""
    out, sizes = console(), found["sizes"]
    out.print(
        f"Largest base model with {sizes['num_experts']} experts in every {sizes['moe_every']}. layer on "
        f"{found['gpus']} x {found['cluster']['name']}: {_many(found['base_parameters'])} parameters "
        f"({sizes['num_layers']} layers, {sizes['dim']} wide, {sizes['num_heads']} heads); "
        f"{_many(sum(found['parameters'].values()))} with its experts"
    )
    _break_down(found["recommended"])


def draw(found: Mapping[str, Any], path: Path, rows: int) -> None:
    """Draw memory and time of the first layouts as stacked bars."""
    shown = found["layouts"][:rows]
    drawn = figure(13, 2.4 + 0.42 * len(shown))
    names = [_name(each) for each in shown]
    memory, time = drawn.subplots(1, 2, sharey=True)
    for axes, key, unit, label in (
        (memory, "memory_bytes", GIB, "GiB of a rank; dashed: what tensors can use"),
        (time, "step_seconds_by_part", 1, "seconds of a step"),
    ):
        rows_drawn = [each[key] for each in shown]
        stack(axes, names, rows_drawn, parts_in(rows_drawn), unit)
        axes.set_xlabel(label)
        axes.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    memory.invert_yaxis()
    memory.axvline(found["usable_bytes"] / GIB, color="black", linestyle="--", linewidth=1)
    save(drawn, path)


def _name(each: Mapping[str, Any]) -> str:
    sequence = " seq." if each["sequence_parallel"] else ""
    recompute = {None: "", "full": " full", "communication_aware": " CAC"}[each["activation_checkpointing"]]
    return (
        f"t{each['tensor_parallel_size']} e{each['expert_parallel_size']} et{each['expert_tensor_parallel_size']} "
        f"z{each['zero_stage']}{sequence}{recompute} {each['optimizer_state_format']} b{each['micro_batch']}"
    )


def _many(parameters: float) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.2f}M"
