"""Decisions recorded in one forward and given in another: other weights, precision, layout, recomputation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cases import case
from helpers.topologies import join
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_tex.moe import MoE, Route, Router, RouterDecisions, RouterReplay, Tokens
from lightning_tex.parallel.activation_checkpointing import recompute_blocks
from lightning_tex.parallel.errors import UserRuntimeError, UserValueError
from lightning_tex.parallel.sharding import shard_module
from lightning_tex.testing.ranks import run_ranks

DIM, EXPERTS, SEQUENCES, LENGTH = 6, 4, 4, 8
NAME = "blocks.0.mlp.router"
ROUTERS = {"softmax": 2, "gshard": 2, "sinkhorn": 1, "expert_choice": 2, "hash": 1}


class Block(nn.Module):
    def __init__(self, router: str, seed: int, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(seed)
        given = {"load_balance_coefficient": 0.0, **options}
        self.mlp = MoE(DIM, 8, EXPERTS, ROUTERS[router], router=router, **given).double()
        self.routes: list[Route] = []
        self.mlp.router.register_forward_hook(lambda _, __, route: self.routes.append(route))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return x + self.mlp(x, token_ids=ids)


def model(router: str = "softmax", seed: int = 0, **options: Any) -> nn.Module:
    made = nn.Module()
    made.blocks = nn.ModuleList([Block(router, seed, **options)])
    return made


def batch(seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SEQUENCES, LENGTH, DIM, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 50, (SEQUENCES, LENGTH), generator=generator)


@pytest.mark.parametrize("router", ROUTERS)
def test_other_weights_choose_what_was_recorded_with_scores_of_their_own(router: str) -> None:
    rollout, trained = model(router, 0), model(router, 1)
    given = [batch(1), batch(2)]
    with RouterReplay(rollout).record() as decisions:
        for x, ids in given:
            rollout.blocks[0](x, ids)
    assert decisions.nbytes <= 2 * SEQUENCES * LENGTH * (EXPERTS if router == "expert_choice" else ROUTERS[router] + 2)
    with RouterReplay(trained).give(decisions):
        for x, ids in given:
            trained.blocks[0](x, ids)
    for was, now in zip(rollout.blocks[0].routes, trained.blocks[0].routes, strict=True):
        assert torch.equal(was.indices, now.indices)
        if router != "hash":
            assert not torch.equal(was.weights, now.weights) and now.weights.requires_grad
    trained.blocks[0](*given[0])  # and outside it decides by itself
    if router != "hash":
        assert not torch.equal(trained.blocks[0].routes[-1].indices, rollout.blocks[0].routes[0].indices)


def of_one_process(router: str) -> RouterDecisions:
    rollout, (x, ids) = model(router, 0), batch()
    with RouterReplay(rollout).record() as decisions:
        rollout.blocks[0](x, ids)
    return decisions


def on_a_layout(path: Path, topology: Any, router: str, mode: Any, factor: float | None) -> None:
    """What one process recorded is recorded on ranks as well, and is chosen there with other weights."""
    data, tensor = topology.data, topology.tensor
    sequence = topology.communication.sequence_parallel
    decisions = RouterDecisions(**torch.load(path / router))
    x, ids = batch()

    def own(of_tokens: Tensor) -> Tensor:
        mine = of_tokens.chunk(data.size)[data.rank]
        return mine.chunk(tensor.size, 1)[tensor.rank] if sequence and of_tokens.dim() == 3 else mine

    rollout = model(router, 0)
    shard_module(rollout, topology)
    replay = RouterReplay(rollout)
    with replay.record() as found:
        rollout.blocks[0](own(x), own(ids))
    whole = replay.whole(found)
    assert whole.whole and not found.whole
    for what, decision in decisions.forwards[NAME][0].items():
        assert torch.equal(whole.forwards[NAME][0][what], decision), what

    reference, trained = (model(router, 1, capacity_factor=factor) for _ in range(2))
    shard_module(trained, topology)
    recompute_blocks(trained, mode)
    given, expected = own(x).clone().requires_grad_(), x.clone().requires_grad_()
    with RouterReplay(trained).give(whole):
        y = trained.blocks[0](given, own(ids))
    y.square().sum().backward()
    assert mode is None or torch.equal(*(route.indices for route in trained.blocks[0].routes))
    decisions.whole = True  # one process has all
    with RouterReplay(reference).give(decisions):
        plain = reference.blocks[0](expected, ids)
    plain.square().sum().backward()
    chosen = reference.blocks[0].routes[0].indices.view(SEQUENCES, LENGTH, -1)
    assert torch.equal(trained.blocks[0].routes[0].indices, own(chosen).flatten(0, 1))
    if factor is None:  # a capacity is of a data rank's tokens
        torch.testing.assert_close(y, own(plain), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(given.grad, own(expected.grad), rtol=1e-10, atol=1e-12)


def on_layouts(path: Path, layouts: list[tuple[tuple[int, ...], bool, Any, Any]]) -> None:
    for layout, sequence, mode, factor in layouts:
        for router in ROUTERS:
            if factor is None or router != "expert_choice":
                with case(layout, router, sequence=sequence, mode=mode, factor=factor):
                    on_a_layout(path, join(*layout, sequence_parallel=sequence), router, mode, factor)


FEW = [((2, 2, 2), True, "full", None), ((1, 4, 1), False, "communication_aware", 1.0)]
MORE = [((2, 4, 1), False, "full", 1.0), ((4, 1, 4), True, "communication_aware", None), ((2, 2, 2), False, None, None)]


@pytest.mark.parametrize("layouts", [FEW, pytest.param(MORE, marks=pytest.mark.full)], ids=["few", "more"])
def test_any_layout_records_and_takes_the_same(layouts: list[Any], tmp_path: Path) -> None:
    for router in ROUTERS:
        torch.save(vars(of_one_process(router)), tmp_path / router)
    run_ranks(4, on_layouts, tmp_path, layouts)


# --- what is refused


class Silent(Router):
    def forward(self, x: Tensor, tokens: Tokens | None = None) -> Route:
        scores = x.new_full((len(x), self.num_experts), 1 / self.num_experts)
        return Route(scores[:, : self.top_k].long(), scores[:, : self.top_k], scores, scores)


def test_what_cannot_be_is_refused() -> None:
    made, (x, ids) = model(), batch()
    replay = RouterReplay(made)
    with replay.record() as decisions:
        made.blocks[0](x, ids)
    twice = r"is run for the 2\. time, and decisions are of 1 forwards"
    with replay.give(decisions):
        made.blocks[0](x, ids)
        with pytest.raises(UserRuntimeError, match=twice):
            made.blocks[0](x, ids)
    tokens = r"decides for 16 tokens, and those recorded are of \[4, 8\]"
    with pytest.raises(UserValueError, match=tokens), replay.give(decisions):
        made.blocks[0](x[:2], ids[:2])
    with (
        pytest.raises(UserRuntimeError, match="already; legal: one at a time"),
        replay.record(),
        replay.give(decisions),
    ):
        pass
    other = RouterReplay(nn.ModuleList([MoE(DIM, 8, 6)]))
    with pytest.raises(UserValueError, match="decisions of routers with so many experts"), other.give(decisions):
        pass
    silent = MoE(DIM, 8, 4, router=Silent)
    with pytest.raises(UserRuntimeError, match="router router decides by itself"), RouterReplay(silent).record():
        silent(x.float())
    made.blocks[0](x, ids)  # whatever has failed, it decides by itself again
    with replay.give(decisions):
        y = checkpoint(made.blocks[0], x.requires_grad_(), ids, use_reentrant=False)
        with pytest.raises(UserRuntimeError, match="decides again in a recomputation; legal with RouterReplay"):
            y.sum().backward()
