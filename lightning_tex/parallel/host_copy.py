"""Numbers that the host wants to know of a device, and need not know now."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """A few values on their way to the host: what is queued on the device before them is not waited for.

    Args:
        values: any shape; what is written to them later is not seen.
    """

    def __init__(self, values: Tensor) -> None:
        values = values.detach()
        self._event: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(values.device))
        else:
            self._values = values.clone()

    @property
    def arrived(self) -> bool:
        """Whether :meth:`numbers` would not wait."""
        return self._event is None or self._event.query()

    def numbers(self) -> list[float]:
        """The values; waits for the device to have come so far."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._values.reshape(-1).tolist()
