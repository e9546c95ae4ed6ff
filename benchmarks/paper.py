"""The figures of the TED paper (arXiv 2303.06318, v1 and ICS'23) from the planner's formulas.

The paper's model is a GPT with biases, LayerNorms and learned positions; ours has none of them, so both are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning_tex.models.config import DecoderConfig
from lightning_tex.parallel.layout import Communication, Layout
from lightning_tex.planner.cluster import CLUSTERS, Cluster
from lightning_tex.planner.describe import describe_decoder
from lightning_tex.planner.largest_base import largest_base
from lightning_tex.planner.layouts import Candidate, Choices, Job
from lightning_tex.planner.memory import memory
from lightning_tex.planner.model import ModelDescription
from lightning_tex.planner.states import FlatBuffers, state_bytes, tile_bytes, untiled_bytes
from lightning_tex.planner.step_time import StepTime, step_time

VOCABULARY, LENGTH, BATCH = 51200, 2048, 1024


def _base(width: int, num_experts: int) -> ModelDescription:
    """GPT-3 6.7B or 2.7B, experts in every second layer, one expert a token."""
    config = DecoderConfig(
        VOCABULARY, width, 32, 32, num_experts=num_experts, capacity_factor=1.0, moe_every=2, activation="gelu"
    )
    return describe_decoder(config)


BASE_6_7B, BASE_2_7B = partial(_base, 4096), partial(_base, 2560)
PAPER_PARAMETERS = {"non_expert": 4.52e9, "expert": 34.37e9, "total": 38.9e9}
PAPER_STATES_GB = {1: 30.3, 2: 17.0, 4: 10.3}
PAPER_SPIKE_GB, PAPER_TILED_GB = 4.5, 1.0
PAPER_GAIN = {"v1": 0.21, "v2": 0.26}
PAPER_PEAK = {"baseline": 0.20, "+DTD +CAC": 0.27}
# Of a rank's untiled step: an fp32 copy of each 16-bit gradient, and beside it up to one more in 16 bits.
UNTILED_BYTES = (4, 6)
VARIANTS = {
    "baseline": ("full", False),
    "+DTD": ("full", True),
    "+CAC": ("communication_aware", False),
    "+DTD +CAC": ("communication_aware", True),
}


def gpt_parameters(layers: int, width: int, vocabulary: int, positions: int, experts: int) -> dict[str, int]:
    """Parameters of the paper's GPT with experts in every second layer.

    Attention 4h^2 + 4h; feed-forward 8h^2 + 5h; two LayerNorms a layer and one at the end, 2h each; a router of E h;
    embeddings of tokens, shared with the head, and of positions.
    """
    moe, h = layers // 2, width
    feed_forward = 8 * h * h + 5 * h
    shared = layers * (4 * h * h + 4 * h + 4 * h) + (layers - moe) * feed_forward + moe * experts * h + 2 * h
    return {"non_expert": shared + (vocabulary + positions) * h, "expert": moe * experts * feed_forward}


def states_bytes(non_expert: float, expert: float, world: int, tensor: int, expert_parallel: int) -> float:
    """The paper's memory model: 4 P + 12 N / G with P = N_ne/G_t + N_e/(G_t G_e): 16-bit parameters and gradients of a
    rank, fp32 master and two moments shared by all."""
    held = non_expert / tensor + expert / (tensor * expert_parallel)
    return 4 * held + 12 * (non_expert + expert) / world


def base_ratio(world: int, experts: int, tensor: int) -> float:
    """How much larger a base model fits than at tensor 1: (1 + x) / (1/G_t + x), x = (E + 2) / G.

    From the memory model with N_ne = 2/3 N, N_e = E/3 N of a base model of N parameters, and as many expert ranks as
    experts.
    """
    x = (experts + 2) / world
    return (1 + x) / (1 / tensor + x)


def paper_flops(batch: float, length: float, layers: float, width: float, vocabulary: float) -> float:
    """F = 96 B s l h^2 (1 + s/6h + V/16lh): FLOPs of a batch with full recomputation (the paper, after Megatron-LM)."""
    return 96 * batch * length * layers * width**2 * (1 + length / (6 * width) + vocabulary / (16 * layers * width))


def reproduce() -> dict[str, Any]:
    """All figures, with the paper's beside them."""
    return {
        "parameters": _parameters(),
        "states": _states(),
        "largest_base": _largest(),
        "spike": _spike(),
        "step_time": _times(),
    }


def _parameters() -> dict[str, Any]:
    gpt = gpt_parameters(32, 4096, VOCABULARY, LENGTH, 16)
    own = BASE_6_7B(num_experts=16).counts()
    return {
        "paper": PAPER_PARAMETERS,
        "gpt": {**gpt, "total": sum(gpt.values())},
        "own": {"non_expert": own["sharded"] + own["replicated"], "expert": own["expert"], "total": sum(own.values())},
    }


def _states() -> list[dict[str, Any]]:
    gpt = gpt_parameters(32, 4096, VOCABULARY, LENGTH, 16)
    rows = []
    for tensor, paper in PAPER_STATES_GB.items():
        job = Job(BASE_6_7B(num_experts=16), 128, LENGTH, BATCH, "16-mixed")
        own = state_bytes(FlatBuffers.of(job, Candidate(Layout(128, tensor, 16, tensor))), 1, "fp32")
        formula = states_bytes(gpt["non_expert"], gpt["expert"], 128, tensor, 16)
        rows.append({"tensor": tensor, "paper_gb": paper, "formula_gb": formula / 1e9, "own_gb": own.total / 1e9})
    return rows


def _largest() -> list[dict[str, Any]]:
    return _largest_of((32, 64, 128, 256, 512), (8, 16, 32, 64, 128))


def _largest_of(worlds: Sequence[int], numbers_of_experts: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for world in worlds:
        for experts in numbers_of_experts:
            bases: dict[int, float] = {}
            for tensor in (1, 2, 4, 8):
                if experts * tensor > world:
                    continue
                largest = _planned_base(world, experts, tensor)
                if largest is not None:
                    bases[tensor] = largest
                rows.append(
                    {
                        "gpus": world,
                        "experts": experts,
                        "tensor": tensor,
                        "ratio": base_ratio(world, experts, tensor),
                        "planned_base": largest,
                        "planned_ratio": largest / bases[1] if largest and 1 in bases else None,
                        "four_to_eight": base_ratio(world, experts, tensor) >= 4,
                    }
                )
    return rows


def _planned_base(world: int, experts: int, tensor: int) -> float | None:
    """The largest base model of the GPT-3 family that fits Summit's GPUs, activations included, by our memory model."""
    job = Job(BASE_6_7B(num_experts=experts), world, LENGTH, BATCH, "16-mixed")
    choices = Choices(tensor, experts, tensor, 1, (1,), (False,), ("full",), ("fp32",))
    found = largest_base(job, CLUSTERS["summit-v100-16gb"], choices)
    return None if found is None else found.base


def _spike() -> list[dict[str, Any]]:
    rows = []
    for experts in (4, 8, 16, 32, 64, 128):
        gpt = gpt_parameters(32, 2560, VOCABULARY, LENGTH, experts)
        job = Job(BASE_2_7B(num_experts=experts), 32, LENGTH, 32, "16-mixed")
        flat = FlatBuffers.of(job, Candidate(Layout(32, 1, min(experts, 32), 1)))
        shard = sum(gpt.values()) / 32
        rows.append(
            {
                "experts": experts,
                "shard_elements": shard,
                "untiled_gb": [per * shard / 1e9 for per in UNTILED_BYTES],
                "own_untiled_gb": untiled_bytes(flat) / 1e9,
                "own_tiled_gb": tile_bytes(flat, "fp32") / 1e9,
                "paper_untiled_gb": PAPER_SPIKE_GB if experts == 32 else None,
                "paper_tiled_gb": PAPER_TILED_GB if experts == 32 else None,
            }
        )
    return rows


@dataclass(frozen=True)
class _Run:
    """The paper's 40B model on 128 V100."""

    cluster: Cluster

    @property
    def job(self) -> Job:
        return Job(BASE_6_7B(num_experts=16), 128, LENGTH, BATCH, "16-mixed")

    def candidate(self, variant: str, micro_batch: int) -> Candidate:
        recompute, split = VARIANTS[variant]
        how = Communication(duplicate_token_dropping=split, fused=False)  # as in the paper: an all-reduce, then a split
        layout = Layout(128, 4, 16, 4)
        share = BATCH // layout.data
        return Candidate(layout, micro_batch, share // micro_batch, 1, recompute, "fp32", how)  # type: ignore[arg-type]

    def micro_batch(self) -> int:
        """The largest that all variants hold."""
        fits = [1]
        for size in (2, 4, 8):
            needed = max(memory(self.job, self.candidate(variant, size)).peak for variant in VARIANTS)
            fits += [size] if needed <= self.cluster.usable_bytes else []
        return max(fits)


def _times() -> dict[str, Any]:
    flops = paper_flops(BATCH, LENGTH, 32, 4096, VOCABULARY)
    summit = CLUSTERS["summit-v100-16gb"]
    machines = []
    # Tensor groups of 4 do not divide nodes of 6: as numbered some cross nodes; with two GPUs idle none does.
    for cluster in (summit, summit.with_gpus_per_node(4)):
        run = _Run(cluster)
        micro = run.micro_batch()
        times = {name: step_time(run.job, run.candidate(name, micro), cluster) for name in VARIANTS}
        base, best = times["baseline"], times["+DTD +CAC"]
        # What the paper's best step takes beside our communication; its baseline has that and our baseline's.
        saved = _waiting(base) - _waiting(best)
        theirs = flops / (PAPER_PEAK["+DTD +CAC"] * base.peak_flops)
        machines.append(
            {
                "cluster": cluster.name,
                "micro_batch": micro,
                "variants": {
                    name: {
                        "step_seconds": time.total,
                        "by_part": time.parts(),
                        "of_peak": flops / (time.total * time.peak_flops),
                        "time_saved": 1 - time.total / base.total,
                        "speedup": base.total / time.total,
                    }
                    for name, time in times.items()
                },
                "communication_seconds_saved": saved,
                "paper_best_seconds": theirs,
                "time_saved_at_the_papers_speed": saved / (theirs + saved),
            }
        )
    return {"flops": flops, "paper_gain": PAPER_GAIN, "paper_of_peak": PAPER_PEAK, "machines": machines}


def _waiting(time: StepTime) -> float:
    return sum(time.communication.values())
