"""A decoder's micro-step from that of a few of its blocks: what blocks that repeat do alike is traced once.

Three repetitions are traced. The second stands between its like, as all others but the first and the last do: what it
allocates and lets go of, in the forward and in the backward, is put in once for each repetition that was left out. Of
four it is the third where parameters are frozen: if nothing before the blocks is trained, the first block keeps less.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import numpy as np
from lightning import LightningModule
from torch import nn

from lightning_tex.models import Decoder, LanguageModel
from lightning_tex.planner.micro_step_trace import NOT_YET, MicroStepTrace


@dataclass(frozen=True, eq=False)
class FewBlocks:
    """A language model of a few of its blocks, and how the whole one differs.

    Args:
        module: of the few; it shares them with the whole one.
        first: blocks before the first repetition.
        period: blocks of a repetition.
        traced: repetitions that are in it.
        left_out: repetitions that are not in it.
    """

    module: LightningModule
    first: int
    period: int
    traced: int
    left_out: int

    @classmethod
    def of(cls, module: LightningModule) -> FewBlocks | None:
        """``None``: it is no language model as it stands, or its blocks do not repeat more often than is traced."""
        if type(module) is not LanguageModel or module.decoder is None:
            return None
        blocks = module.decoder.blocks
        kinds = [*zip(module.config.block_kinds(), map(_parameters, blocks), strict=True)]
        count, traced = len(kinds), 3 if all(p.requires_grad for p in module.parameters()) else 4
        # The fewest blocks that show all.
        for first, period in sorted(
            ((first, period) for first in range(count) for period in range(1, count)),
            key=lambda pair: pair[0] + traced * pair[1],
        ):
            times, rest = divmod(count - first, period)
            if times > traced and kinds[first : count - period] == kinds[first + period :]:
                kept = [*range(first + traced * period), *range(count - rest, count)]
                few = _with_blocks(module, [blocks[layer] for layer in kept])
                return cls(few, first, period, traced, times - traced)
        return None

    @property
    def marks(self) -> list[str]:
        """Names of the blocks that repetitions begin with."""
        return [f"decoder.blocks.{self.first + number * self.period}" for number in range(self.traced)]

    def extended(self, trace: MicroStepTrace) -> MicroStepTrace | None:
        """The whole model's trace, of that of the few blocks.

        Args:
            trace: with the marks of this.

        Returns:
            ``None``: by their gradients it cannot be seen where the backward passes from one repetition to another.
        """
        *_, before, after = trace.marks  # of the last repetition but one
        places = self._first_trained()
        arrived = [np.flatnonzero(trace.reached == place) for place in places]
        if not all(map(len, arrived)):
            return None
        # From when the first parameter of the last repetition has its gradient to when that of the one before has it.
        last, middle = int(arrived[-1][0]), int(arrived[-2][0])
        forward, backward = slice(before + 1, after + 1), slice(last + 1, middle + 1)
        # Operations, and of how many repetitions that were left out the gradients come after theirs.
        pieces = [
            (slice(after + 1), self.left_out),
            *[(forward, self.left_out)] * self.left_out,
            (slice(after + 1, middle + 1), self.left_out),
            *((backward, ahead) for ahead in reversed(range(self.left_out))),
            (slice(middle + 1, None), 0),
        ]
        changes = np.diff(trace.live, axis=1, prepend=0)
        shift = places[1] - places[0]
        reached = [trace.reached[piece] + ahead * shift for piece, ahead in pieces]
        return replace(
            trace,
            live=np.concatenate([changes[:, piece] for piece, _ in pieces], 1).cumsum(1),
            reached=np.minimum(np.concatenate(reached), NOT_YET),
            forward=trace.forward + self.left_out * (after - before),
        )

    def _first_trained(self) -> list[int]:
        """Of each repetition the place of the first parameter that has a gradient, -1 where none has."""
        places = {parameter: place for place, parameter in enumerate(self.module.parameters())}
        first = []
        for name in self.marks:
            trained = [places[p] for p in self.module.get_submodule(name).parameters() if p.requires_grad]
            first.append(min(trained, default=-1))
        return first


def _parameters(block: nn.Module) -> tuple[object, ...]:
    return tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters())


def _with_blocks(module: LanguageModel, blocks: list[nn.Module]) -> LanguageModel:
    """A model of the same parts but for these blocks."""
    assert isinstance(module.decoder, Decoder)
    few, decoder = copy.copy(module), copy.copy(module.decoder)
    few._modules, decoder._modules = dict(module._modules), dict(module.decoder._modules)
    few.decoder, decoder.blocks = decoder, nn.ModuleList(blocks)
    return few
