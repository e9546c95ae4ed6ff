"""Every router trains alike on 1, 2, 4 and 8 ranks: choices and overflow to the number, losses, parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from helpers.behaviour_modules import FOLDED, TED, SmallDecoder, batches, new_trainer, on_data_axis
from helpers.cases import case
from helpers.ranks import together
from helpers.trainers import gathered
from torch import Tensor

STEPS, SAMPLES, LENGTH = 3, 8, 4

# And choices of each token.
ROUTERS: dict[str, tuple[Any, int]] = {
    "softmax": ("softmax", 2),
    "sigmoid": ({"name": "sigmoid", "init_args": {"bias_update_rate": 0.05}}, 2),
    "groups": ({"name": "softmax", "init_args": {"n_group": 2, "topk_group": 1}}, 2),
    "switch": ({"name": "switch", "init_args": {"jitter_eps": 0.3}}, 1),
    "gshard": ("gshard", 2),
    "sparsemixer": ("sparsemixer", 2),
    "sinkhorn": ("sinkhorn", 1),
    "hash": ("hash", 2),
    "expert_choice": ("expert_choice", 2),
    "expert_choice of the batch": ({"name": "expert_choice", "init_args": {"within": "batch"}}, 1),
}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "expert": {"expert_parallel_size": 2},
        "tensor, recomputed": {"tensor_parallel_size": 2, "activation_checkpointing": "full"},
        "folded": {"tensor_parallel_size": 2, "expert_parallel_size": 2, "expert_tensor_parallel_size": 1},
    },
    4: {"ted": TED, "sequence": {**TED, "sequence_parallel": True, "activation_checkpointing": "full"}},
    8: {
        "data": {"expert_parallel_size": 1},
        "ted, replayed": {**TED, "activation_checkpointing": "communication_aware"},
        "folded, sequence": {**FOLDED, "sequence_parallel": True},
    },
}


def trained(
    layout: dict[str, Any], name: str, precision: str, options: dict[str, Any]
) -> tuple[dict[str, Tensor], ...]:
    """Of all ranks' tokens the choices of each expert and those that overflowed, losses, and whole parameters."""
    router, top_k = ROUTERS[name]
    coefficients = {"z_loss_coefficient": 0.01, "sequence_balance_coefficient": 0.02}
    module = SmallDecoder(num_layers=4, router=router, top_k=top_k, **coefficients, **options)
    trainer = new_trainer(layout, precision=precision)
    even = [[part[:, :LENGTH] for part in batch] for batch in batches(STEPS, SAMPLES)]
    trainer.fit(module, on_data_axis(trainer, even))
    counts = {}
    for number, layer in module.decoder.moe_layers():
        own = layer.activation_layout.total(layer.load.take())
        counts[f"layer {number}"] = trainer.strategy.reduce(own, reduce_op="sum")
    losses = {"loss": trainer.strategy.reduce(torch.stack(module.losses), reduce_op="mean")}
    return counts, losses, gathered(module, trainer)


def compare(
    world: int, names: Iterable[str], precision: str, tolerances: tuple[float, float], options: dict[str, Any]
) -> list[Tensor]:
    """Choices and overflow in one process; a capacity is of a data rank's tokens, and compared with as many of them."""
    seen, names = [], list(names)
    for where, layout in LAYOUTS[world].items():
        data = world // layout.get("tensor_parallel_size", 1) if options else 1
        plain = {"expert_parallel_size": 1}
        reference = together(data, {name: (trained, plain, name, precision, options) for name in names})
        found = together(world, {name: (trained, layout, name, precision, options) for name in names})
        for name, ranks in found.items():
            counts, losses, parameters = reference[name][0]
            seen += counts.values()
            for rank, (own_counts, own_losses, own_parameters) in enumerate(ranks):
                with case(where, name, f"rank {rank}"):
                    torch.testing.assert_close(own_counts, counts, rtol=0, atol=0)
                    torch.testing.assert_close(own_losses, losses, rtol=tolerances[0], atol=0)
                    torch.testing.assert_close(own_parameters, parameters, rtol=tolerances[1], atol=tolerances[1])
    return seen


@pytest.mark.full
@pytest.mark.parametrize("world", LAYOUTS)
def test_every_router_trains_alike(world: int) -> None:
    seen = compare(world, ROUTERS, "64-true", (1e-12, 1e-10), {})
    assert not any(counts[-1] for counts in seen)


@pytest.mark.full
@pytest.mark.parametrize("world", LAYOUTS)
def test_every_router_trains_alike_where_choices_overflow(world: int) -> None:
    seen = compare(
        world,
        [name for name in ROUTERS if not name.startswith("expert_choice")],
        "64-true",
        (1e-12, 1e-10),
        {"capacity_factor": 0.8},
    )
    assert all(counts[-1] for counts in seen)


@pytest.mark.full
def test_every_router_trains_alike_in_fp32() -> None:
    compare(4, ROUTERS, "32-true", (1e-5, 1e-5), {})
