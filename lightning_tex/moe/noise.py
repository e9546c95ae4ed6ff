"""Random numbers of tokens: those of a token are the same on every layout, and in a recomputation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_tex.parallel.hashing import scrambled, uniform
from lightning_tex.parallel.initialization import has_values
from lightning_tex.parallel.replay import decided

# T tokens

# Numbers made at once, which bounds the temporaries of 64 bits.
_AT_ONCE = 1 << 22


class TokenNoise(nn.Module):
    """A hash of (key, forward, token, number): nothing is drawn, and no rank's random state moves on.

    The key is drawn with the parameters, and alike on all ranks; the forwards of training are counted. Both are saved
    with the model, so that a resumed run goes on with the numbers that it would have had.
    """

    key: Tensor
    forwards: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("key", torch.empty((), dtype=torch.int64))
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the key, and count from 0."""
        if has_values(self.key):
            self.key.fill_(int(torch.randint(2**62, ())))
            self.forwards.zero_()

    def of_forward(self) -> Tensor:
        """The key of one training forward: the next one's, or in a recomputation the same again. A scalar, int64."""
        return decided("the noise's key", self._next)

    @torch.no_grad()
    def _next(self) -> Tensor:
        key = scrambled(self.forwards + self.key, 0)
        self.forwards += 1
        return key


def token_uniform(key: Tensor, places: Tensor, numbers: int) -> Tensor:
    """Uniform on [0, 1), so many for each token, as fp32: [T], its tokens' places -> [T, numbers].

    Args:
        key: of :meth:`TokenNoise.of_forward`.
    """
    out = torch.empty(len(places), numbers, device=places.device)
    column = torch.arange(numbers, device=places.device)
    rows = max(1, _AT_ONCE // max(numbers, 1))
    for part, into in zip(places.split(rows), out.split(rows), strict=True):
        # Cut to 24 bits, so that fp32 has the numbers as they are and none of them is 1.
        into.copy_(uniform(part[:, None] * numbers + column + key, 0).mul_(2**24).floor_().mul_(2**-24))
    return out
