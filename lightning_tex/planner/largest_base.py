"""The largest base model that a cluster holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf

from lightning_tex.models.config import DecoderConfig
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.planner.cluster import Cluster
from lightning_tex.planner.describe import decoder_parameters, describe_decoder
from lightning_tex.planner.layouts import Candidate, Choices, Job, candidates
from lightning_tex.planner.memory import memory
from lightning_tex.planner.search import Planned, plan, plan_all


def decoder_config(job: Job) -> DecoderConfig:
    """The sizes that a search varies.

    Raises:
        ValueError: the model is no decoder.
    """
    if job.model.config is None:
        raise UserValueError(
            "a search over sizes needs a model that is a decoder with a DecoderConfig; legal: a "
            "lightning_tex.LanguageModel, or the sizes as options, without --config"
        )
    return job.model.config


# Brown et al. 2020, table 2.1: layers and width of the GPT-3 family.
GPT3 = (
    (12, 768), (24, 1024), (24, 1536), (24, 2048), (32, 2560), (32, 4096), (40, 5120), (96, 12288),
)  # fmt: skip
_HEAD = 128


def family(like: DecoderConfig, largest: int = 49152) -> list[DecoderConfig]:
    """Models of growing size, otherwise like one: width and depth follow the GPT-3 family.

    Widths are multiples of 1024 with heads of 128, so that 8 tensor ranks divide heads and matrices (below: 256, 512,
    768). At each width the number of layers begins at what the family's table has, interpolated linearly in the width,
    and grows by ``moe_every`` until the next width's model is as large. The hidden width's and key/value heads' ratios
    stay.
    """
    shared = like.num_heads // like.kv_heads
    widths = [256, 512, 768, *range(1024, largest + 1, 1024)]
    found = []
    for width, following in zip(widths, [*widths[1:], widths[-1] + 1024], strict=True):
        heads = width // _HEAD
        kv_heads = heads // shared if heads % shared == 0 else heads
        layers = max(_layers(width) // like.moe_every, 1) * like.moe_every
        last = _layers(following) * (following / width) ** 2
        while layers < last:
            found.append(resized(like, width, layers, heads, kv_heads))
            layers += like.moe_every
    return found


def resized(like: DecoderConfig, width: int, layers: int, heads: int, kv_heads: int | None = None) -> DecoderConfig:
    """A decoder of another size whose hidden widths have the same ratio.

    Raises:
        ValueError: it names its blocks one by one, and other numbers of them are unknown.
    """
    if like.moe_layers is not None or like.layer_types is not None:
        raise UserValueError(
            "a search over sizes needs to know of any number of blocks what they are made of, and moe_layers and "
            f"layer_types list num_layers={like.num_layers} of them; legal: moe_every, and the same attention in all"
        )
    sizes = {"dim": width, "num_layers": layers, "num_heads": heads, "num_kv_heads": kv_heads}
    hidden, expert_hidden = (int(one / like.dim * width) for one in (like.hidden, like.expert_hidden))
    widths = {"head_dim": None, "hidden_dim": hidden, "expert_hidden_dim": expert_hidden}
    return replace(like, **sizes, **widths)  # type: ignore[arg-type]


def _layers(width: int) -> int:
    points = sorted({wide: deep for deep, wide in GPT3}.items())
    for (w0, l0), (w1, l1) in pairwise(points):
        if width <= w1:
            return round(l0 + (l1 - l0) * (max(width, w0) - w0) / (w1 - w0))
    (w0, l0), (w1, l1) = points[-2:]
    return round(l1 + (l1 - l0) * (width - w1) / (w1 - w0))


def base_parameters(config: DecoderConfig) -> int:
    """Parameters of the base model: the same without experts, every block dense."""
    return decoder_parameters(replace(config, num_experts=1, top_k=1))


@dataclass(frozen=True)
class LargestBase:
    """The largest base model that fits, and how.

    Args:
        config: the model with its experts.
        base: parameters of the base model.
        planned: how it is run.
    """

    config: DecoderConfig
    base: int
    planned: Planned


def largest_base(
    job: Job, cluster: Cluster, choices: Choices | None = None, models: Sequence[DecoderConfig] = ()
) -> LargestBase | None:
    """The largest base model of a family that some legal layout holds; ``None`` if the smallest does not fit.

    Need grows with the model, so the search halves. A size that no layout can be sharded for is passed over.

    Args:
        job: what is trained; its decoder's sizes give experts, vocabulary and activation.
        cluster, choices: as of :func:`plan_all`.
        models: growing sizes to search; empty: :func:`family`.
    """
    growing = list(models or family(decoder_config(job)))
    low, high, best = 0, len(growing) - 1, None
    while low <= high:
        middle = (low + high) // 2
        found = _smallest_need(replace(job, model=describe_decoder(growing[middle])), cluster, choices)
        if found is None:
            growing.pop(middle)
            high -= 1
        elif found[1] <= cluster.usable_bytes:
            low, best = middle + 1, (growing[middle], found[0])
        else:
            high = middle - 1
    if best is None:
        return None
    config, candidate = best
    job = replace(job, model=describe_decoder(config))
    fastest = plan_all(job, cluster, choices).recommended
    return LargestBase(config, base_parameters(config), fastest or plan(job, candidate, cluster))


def _smallest_need(job: Job, cluster: Cluster, choices: Choices | None) -> tuple[Candidate, float] | None:
    most, at = inf, None
    try:
        for candidate in candidates(job, choices):
            if candidate.micro_batch == (choices.micro_batch if choices and choices.micro_batch else 1):
                needed = memory(job, candidate, cluster.device).peak
                if needed < most:
                    most, at = needed, candidate
    except ValueError:
        return None
    return None if at is None else (at, most)
