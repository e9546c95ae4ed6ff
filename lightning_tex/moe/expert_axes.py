"""The axes that tokens pass on their way to the experts and back: one table for all cases of dispatch.

Duplicate-token dropping (paper section 5.1) is the ``split`` column: tokens that the ranks of the tensor axis hold
alike are split over it, so that each travels once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from lightning_tex.parallel.collectives import all_reduce_, own_slice, reduce_scatter
from lightning_tex.parallel.layout import Communication, Layout
from lightning_tex.parallel.topology import Axis, Topology


class DispatchCase(NamedTuple):
    """Names of the axes of one case of dispatch; ``None``: nothing is done.

    Args:
        split: over which equal tokens are divided before they travel.
        gather: over which arrived tokens are put together again.
    """

    split: str | None
    gather: str | None

    @classmethod
    def of(cls, communication: Communication) -> DispatchCase:
        """The case that a way of communicating stands for."""
        return _CASES[communication.sequence_parallel, communication.duplicate_token_dropping]

    def sizes(self, layout: Layout) -> tuple[int, int]:
        """Ranks of ``split`` and of ``gather``; 1 where nothing is done."""
        split, gather = (1 if name is None else int(getattr(layout, name)) for name in self)
        return split, gather


# (sequence_parallel, duplicate_token_dropping): what is done. An expert's matrices are sharded over expert_tensor in
# every case. Folding is the first row with an expert_tensor axis of size 1. Under sequence parallelism tensor ranks
# hold different tokens, so there are no duplicates to drop.
_CASES = {
    (False, True): DispatchCase(split="tensor", gather="expert_tensor"),  # TED with duplicate-token dropping
    (False, False): DispatchCase(split=None, gather=None),  # TED without
    (True, True): DispatchCase(split=None, gather="expert_tensor"),
    (True, False): DispatchCase(split=None, gather="expert_tensor"),
}


@dataclass(frozen=True)
class ExpertAxes:
    """The axes of one MoE layer's exchange.

    Args:
        expert: the axis the experts are spread over; tokens travel over it by all-to-all.
        split: the axis equal tokens are split over before they travel (duplicate-token dropping); size 1 elsewhere.
        gather: the axis arrived tokens are put together over; size 1 where they are whole.
        shard: the axis an expert's matrices are sharded over: what experts give are partial sums over it.
        fused: sum and split in one reduce-scatter, not an all-reduce and a split as in the paper.
        expert_host: ``expert`` over the hosts' network, for numbers that hosts know.
        chunks: of a batch that travel over ``expert`` one beside the products of another.
    """

    expert: Axis
    split: Axis
    gather: Axis
    shard: Axis
    expert_host: Axis = field(default_factory=lambda: Axis("expert"))
    fused: bool = True
    chunks: int = 1

    @classmethod
    def of(cls, topology: Topology) -> ExpertAxes:
        """Those of a topology, by the table of cases."""
        case = DispatchCase.of(topology.communication)
        split = Axis("tensor") if case.split is None else topology.axis(case.split)
        gather = Axis("expert_tensor") if case.gather is None else topology.axis(case.gather)
        communication = topology.communication
        chunks = communication.expert_chunks if topology.expert.size > 1 else 1
        shard, host = topology.expert_tensor, topology.expert_host
        return cls(topology.expert, split, gather, shard, host, communication.fused, chunks)

    def sum_own(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """Of partial sums over ``shard``, the sum; of that, the part along dim 0 that ``gather`` put in here.

        They may be overwritten.
        """
        if self.gather.size == 1:
            return all_reduce_(x, self.shard)
        if self.fused:
            return reduce_scatter(x, 0, self.gather, sizes)
        return own_slice(all_reduce_(x, self.gather), 0, self.gather, sizes)
