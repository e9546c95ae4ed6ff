"""The counter of bytes under ``lightning-tex bench optimizer``, on calls whose temporaries are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_tex.bench.memory import live_bytes, peak_bytes

CPU = torch.device("cpu")
ELEMENTS = 1 << 18


def stepping(**options: Any) -> Any:
    parameter = nn.Parameter(torch.randn(ELEMENTS))
    parameter.grad = torch.randn(ELEMENTS)
    optimizer = torch.optim.AdamW([parameter], **options)
    optimizer.step()
    return optimizer.step


@pytest.mark.parametrize(
    ("options", "tensors"),
    [({"fused": True}, 0), ({"foreach": True}, 1), ({"fused": False, "foreach": False}, 2)],
    ids=["fused", "foreach", "loop"],
)
def test_temporaries_inside_torchs_optimizers_are_counted(options: dict[str, Any], tensors: int) -> None:
    assert peak_bytes(stepping(**options), CPU) / (4 * ELEMENTS) == pytest.approx(tensors, abs=1e-3)


def test_the_peak_is_what_is_held_at_once() -> None:
    x = torch.randn(ELEMENTS)

    def chain() -> Tensor:
        y = x.exp()
        z = y.sin()
        del y
        return z.cos()

    assert peak_bytes(chain, CPU) == 2 * x.nbytes


def test_garbage_from_before_hides_nothing() -> None:
    ring: list[object] = [torch.randn(ELEMENTS)]
    ring.append(ring)
    del ring
    assert peak_bytes(lambda: torch.empty(ELEMENTS), CPU) == 4 * ELEMENTS


def test_live_tensors_count_once_with_their_gradients() -> None:
    before = live_bytes(CPU)
    parameter = nn.Parameter(torch.randn(2, ELEMENTS))
    views = [parameter.detach()[0], parameter.detach().flatten()[5:]]
    assert live_bytes(CPU) - before == 8 * ELEMENTS
    parameter.square().sum().backward()
    assert live_bytes(CPU) - before == 16 * ELEMENTS
    del parameter
    assert live_bytes(CPU) - before == 8 * ELEMENTS, "the views hold it"
    del views
    assert live_bytes(CPU) == before
