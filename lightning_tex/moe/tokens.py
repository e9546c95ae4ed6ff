"""What a router may know of its tokens besides their activations: which are real, which they are, where they stand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_tex.parallel.topology import Axis

# T tokens held here, B sequences, s positions of each held here


@dataclass(frozen=True)
class Tokens:
    """T tokens, as B sequences one after the other, of equally many positions each.

    Args:
        mask: [T] boolean, False for tokens that go to no expert (padding); ``None``: there are none.
        ids: [T], of the vocabulary, where the layer is given them.
        sequences: B.
    """

    mask: Tensor | None = None
    ids: Tensor | None = None
    sequences: int = 1

    def places(self, count: int, shard: Axis, data: Axis, device: torch.device) -> Tensor:
        """The number of each token in the micro-step, over all ranks and alike on every layout. [T] int64

        Data ranks hold consecutive equal shares of its sequences, as text data modules give them. Where shares are not
        equal, tokens of different ranks may have one number.

        Args:
            count: T.
            shard: the axis over which sequences are split, of size 1 where they are not.
            data: the data axis.
        """
        here = torch.arange(count, device=device)
        length = count // max(self.sequences, 1)
        if shard.size > 1:
            here = here + (here // max(length, 1) * (shard.size - 1) + shard.rank) * length
        return here + data.rank * count * shard.size
