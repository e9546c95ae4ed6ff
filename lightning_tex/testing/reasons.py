"""What is likely to be wrong with a module that trains otherwise on a layout than in one process."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

from torch import Tensor, nn

from lightning_tex.layers import ParallelAttention
from lightning_tex.parallel.layout import Layout
from lightning_tex.testing.recording import Record
from lightning_tex.testing.runs import Outcome
from lightning_tex.testing.sliced_capacity import has_capacity

# Routing losses, which are not scaled with the rest, change a common factor by less than this share.
_CLOSE = 0.05


def reason_for_error(module: nn.Module, expected: Record, outcome: Outcome) -> str | None:
    """As :func:`likely_reason`, where a rank raised: ``None`` unless it was seen that a layer holds a part."""
    return _plain_layer_in_sharded_region(module, expected, outcome)


def sampler_reason(layout: Layout) -> str:
    """Where the module's data gives ranks other samples than one process has."""
    return (
        f"a sampler that does not share samples over the {layout.data} data ranks, or shuffles by rank; legal: "
        "DistributedSampler(.., shuffle=False, **trainer.distributed_sampler_kwargs); the one that Lightning adds "
        "shuffles"
    )


def likely_reason(module: nn.Module, layout: Layout, expected: Record, outcome: Outcome) -> str:
    """In a sentence with the remedy; the first that applies.

    Args:
        module: as it was built.
        layout: on which it trained.
        expected: of one process.
        outcome: of a rank of the layout.
    """
    for reason in (
        _not_finite(expected),
        _plain_layer_in_sharded_region(module, expected, outcome),
        _drifting_copies(outcome.record),
        _scaled(layout, expected, outcome.record),
        _dropout(module),
        _batch_statistics(module, layout),
        _capacity(module, layout),
        _axis(layout),
    ):
        if reason:
            return reason
    return "not known; compare the first tensor that differs with the same layout in which one axis is 1"


def _not_finite(expected: Record) -> str | None:
    for number, step in enumerate(expected.steps, 1):
        if not (isfinite(step.loss) and isfinite(step.gradient_norm)):
            return f"step {number} is not finite in one process either; legal: a module whose loss and gradients are"
    return None


def _plain_layer_in_sharded_region(module: nn.Module, expected: Record, outcome: Outcome) -> str | None:
    named = dict(module.named_modules())
    for name, width in outcome.record.widths.items():
        full = expected.widths.get(name, width)
        if full != width:
            kind = type(named[name]).__name__ if name in named else "a plain module"
            return (
                f"a plain layer in a sharded region: {name} ({kind}) is given {width} of {full} features, this rank's "
                "part, and has weights of its own; legal: ColumnParallelLinear(.., gather_output=True) before it, or a "
                "TEX layer in its place"
            )
    return None


def _drifting_copies(record: Record) -> str | None:
    if not record.replicas:
        return None
    name, axis = next(iter(record.replicas.items()))
    return (
        f"copies of {name} differ between ranks of the {axis} axis, which must stay alike: a layer with weights of its "
        "own in a sharded region, or random numbers that differ there"
    )


def _scaled(layout: Layout, expected: Record, record: Record) -> str | None:
    """Gradients that are all the same multiple of what they should be."""
    if not (record.steps and expected.steps):
        return None
    factor = common_factor(expected.steps[0].gradients, record.steps[0].gradients)
    sizes = {layout.world, layout.data, layout.tensor, layout.expert, layout.expert_data} - {1}
    for size in sorted(sizes):
        for scale, text in ((size, f"{size} times"), (1 / size, f"1/{size} of")):
            if factor is not None and abs(factor - scale) <= _CLOSE * scale:
                return (
                    f"every gradient is {text} that of one process: a loss that is summed over ranks or over a rank's "
                    "samples where it should be the mean over the rank's own samples (the strategy averages over ranks)"
                )
    return None


def common_factor(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float | None:
    """The number by which all tensors together differ, to a few percent; ``None`` if there is none."""
    pairs = [(tensor.double(), found[name].double()) for name, tensor in expected.items() if name in found]
    pairs = [(one, other) for one, other in pairs if one.shape == other.shape]
    squares = sum(float(one.square().sum()) for one, _ in pairs)
    if squares == 0:
        return None
    factor = sum(float((one * other).sum()) for one, other in pairs) / squares
    rest = sum(float((other - factor * one).square().sum()) for one, other in pairs)
    return factor if rest <= _CLOSE**2 * sum(float(other.square().sum()) for _, other in pairs) else None


def _dropout(module: nn.Module) -> str | None:
    for name, child in module.named_modules():
        plain = isinstance(child, nn.modules.dropout._DropoutNd) and child.p > 0
        if plain or (isinstance(child, ParallelAttention) and child.dropout > 0):
            return f"dropout: {name} draws other numbers on each layout; legal: a probability of 0 for the comparison"
    return None


def _batch_statistics(module: nn.Module, layout: Layout) -> str | None:
    for name, child in module.named_modules():
        if layout.data > 1 and isinstance(child, nn.modules.batchnorm._BatchNorm):
            return f"batch statistics: {name} ({type(child).__name__}) takes them of a rank's own samples"
    return None


def _capacity(module: nn.Module, layout: Layout) -> str | None:
    if layout.data > 1 and has_capacity(module):
        return (
            "overflow of a capacity: each data rank decides it for its own tokens, which the one process takes to be "
            "consecutive; legal: tokens whose first dim is that of the samples, or capacity_factor=None for the "
            "comparison"
        )
    return None


def _axis(layout: Layout) -> str | None:
    if layout.data > 1 and layout.tensor == 1 and layout.expert == 1:
        return (
            "only the data axis is used: a sum or mean over a rank's own samples that is not the mean over all, a "
            "statistic of the batch, or a sampler"
        )
    if layout.tensor > 1 and layout.data == 1:
        return (
            "only the tensor axis is used: an operation between a column and a row layer that needs all features, or a "
            "random number that tensor ranks do not share"
        )
    return None
