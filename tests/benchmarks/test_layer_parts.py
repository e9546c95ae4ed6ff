"""The pieces of a MoE layer that are timed on a GPU are those that the layer is made of."""

from __future__ import annotations

import torch
from layer_parts import parts

from lightning_tex.bench.layer_shapes import Shape


def test_the_parts_run_and_both_kinds_of_products_are_equal() -> None:
    torch.manual_seed(0)
    results = {part.name: part.run() for part in parts(Shape("own", dim=32, hidden=16, experts=8, top_k=2), 64, "cpu")}
    assert torch.equal(results["rows picked"], results["rows picked, some empty"])
    compared = [name.removeprefix("grouped: ") for name in results if name.startswith("grouped: ")]
    assert len(compared) == 4
    for name in compared:
        torch.testing.assert_close(results[f"grouped: {name}"], results[f"looped: {name}"])
    assert results["sum over choices"].shape == (64, 32)
