"""How rows lie at the experts: one group after the other."""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

# N rows, e experts held here


class Groups:
    """N rows in e groups, an expert's each, as a device sees them and as the host does.

    Args:
        rows: N.
        ends: [e] int32 on the rows' device, the place behind each group's last row; the last entry is N.
        sizes: rows of each group; ``None`` where the host does not know them.
    """

    def __init__(self, rows: int, ends: Tensor, sizes: list[int] | None = None) -> None:
        assert sizes is None or sum(sizes) == rows, (sizes, rows)
        self.rows, self.ends = rows, ends
        if sizes is not None:
            self.sizes = sizes

    @classmethod
    def of(cls, sizes: list[int], device: torch.device | str = "cpu") -> Groups:
        """Groups of known sizes."""
        ends = torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cls(sum(sizes), ends.to(device, non_blocking=True), sizes)

    @classmethod
    def equal(cls, groups: int, size: int, device: torch.device) -> Groups:
        """Groups of one size."""
        ends = torch.arange(1, groups + 1, dtype=torch.int32, device=device) * size
        return cls(groups * size, ends, [size] * groups)

    @cached_property
    def sizes(self) -> list[int]:
        """Rows of each group. Where the host does not know them it waits for the device, once."""
        ends = [0, *self.ends.tolist()]
        return [end - start for start, end in pairwise(ends)]
