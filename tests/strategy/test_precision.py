"""Precisions and state formats through the Trainer: what is kept in which, loss scales, and that all learn as fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.behaviour_modules import LAYOUTS as PLAIN_LAYOUTS
from helpers.behaviour_modules import TED, SmallDecoder, batches, new_trainer, on_data_axis
from helpers.cases import in_full, selected
from helpers.layout_errors import distance
from helpers.learning import LAYOUTS, Learns, fitted
from helpers.ranks import on_ranks, together
from helpers.surface import Small, Use
from helpers.trainers import gathered
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_tex.moe import Router

# --- 16-mixed


class ClipsByHand(Learns):
    """What the Trainer does with gradient_clip_val, in manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        optimizer.step()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.norms = [*getattr(self, "norms", []), float(self.trainer.strategy.optimizers[0].gradient_norm())]


def clipped_by_hand() -> tuple[list[float], Tensor]:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
    module = ClipsByHand()
    trainer = fitted(module, TED, 6, precision=None, plugins=[plugin])
    return module.norms, module.mean_losses(trainer)


def test_clipping_by_hand_bounds_the_gradient_and_not_its_scale() -> None:
    for norms, losses in on_ranks(4, clipped_by_hand):
        assert norms == pytest.approx([0.1] * 6, rel=1e-4) and losses[-1] < losses[0] - 0.1


class DescendsClipped(Learns):
    """Clipped by the Trainer, or ``by_hand``; by SGD, whose steps are as long as gradients are."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.automatic_optimization = not by_hand

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        ClipsByHand.training_step(self, batch, batch_idx)  # type: ignore[arg-type]
        return None


def descended(by_hand: bool) -> dict[str, Tensor]:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
    module = DescendsClipped(by_hand)
    clip = {} if by_hand else {"gradient_clip_val": 0.1}
    return gathered(module, fitted(module, TED, 6, precision=None, plugins=[plugin], **clip))


def test_clipping_by_hand_takes_the_loss_scale_out_once() -> None:
    found = together(4, {by_hand: (descended, by_hand) for by_hand in (True, False)})
    by_hand, by_trainer = found[True][0], found[False][0]
    # To rounding: manual_backward runs under autocast. ``norm.bias`` begins at 0 and shows the step's own length.
    errors = {name: distance(by_hand[name], value) for name, value in by_trainer.items()}
    assert max(errors.values()) <= 1e-3 and by_trainer["norm.bias"].any(), errors


class Scaled(Learns):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.before = [p.detach().clone() for p in self.parameters()]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.unchanged = [
            *getattr(self, "unchanged", []),
            all(torch.equal(p, q) for p, q in zip(self.parameters(), self.before, strict=True)),
        ]
        self.scales = [*getattr(self, "scales", []), self.trainer.precision_plugin.scaler.get_scale()]


def fp16_run(layout: Any, spoil: dict[tuple[int, int], float], where: str) -> dict[str, Any]:
    module = Scaled(spoil, where)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000))
    trainer = fitted(module, layout, 6, precision=None, plugins=[plugin], gradient_clip_val=1.0)
    routers = {p.dtype for m in module.modules() if isinstance(m, Router) for p in m.parameters()}
    return {
        "dtypes": {p.dtype for name, p in module.named_parameters() if "router" not in name and "norm" not in name},
        "routers": routers,
        "unchanged": module.unchanged,
        "scales": module.scales,
        "losses": module.mean_losses(trainer).float(),
        "skipped": trainer.strategy.optimizers[0].skipped.total,
    }


@pytest.mark.parametrize("name", in_full(LAYOUTS, {"ted"}))
def test_an_infinity_on_one_rank_lowers_the_scale_on_all_and_changes_nothing(name: str) -> None:
    spoil = {(3, 2): float("inf")}
    by_place = together(4, {at: (fp16_run, LAYOUTS[name], spoil, at) for at in ("norm.weight", "moe.experts.up")})
    for found in [*by_place["norm.weight"], *by_place["moe.experts.up"]]:
        assert found["dtypes"] == {torch.float16} and found["routers"] == {torch.float32}
        assert found["unchanged"] == [step == 2 for step in range(6)]
        assert found["scales"] == [2.0**10] * 2 + [2.0**9] * 4
        assert found["skipped"] == 1
        assert torch.isfinite(found["losses"]).all() and found["losses"][-1] < found["losses"][0] - 0.1


def losses_in(layout: Any, precision: str | None, options: dict[str, Any], plugins: Any = None) -> Tensor:
    module = Learns()
    trainer = fitted(module, {**layout, **options}, 12, precision=precision, plugins=plugins)
    return module.mean_losses(trainer).float()


FORMATS = ("fp32", "split", "int8", "stochastic")
BF16 = [(precision, name) for precision in ("bf16-mixed", "bf16-true") for name in FORMATS]
DEFAULT = [("bf16-mixed", "int8"), ("bf16-true", "stochastic")]


@pytest.fixture(scope="module")
def learnt(request: pytest.FixtureRequest) -> dict[Any, list[Tensor]]:
    runs: dict[Any, tuple[Any, ...]] = {"exact": (losses_in, TED, "32-true", {})}
    runs["fp16"] = losses_in, TED, None, {}, [MixedPrecision("16-mixed", "cpu")]
    for precision, name in sorted(selected(request, "run")):
        runs[precision, name] = losses_in, TED, precision, {"optimizer_state_format": name}
    return together(4, runs)


def test_fp16_learns_as_fp32_does(learnt: dict[Any, list[Tensor]]) -> None:
    exact = learnt["exact"][0]
    for losses in learnt["fp16"]:
        taken = losses[torch.isfinite(losses)]
        assert taken[-1] < exact[0] - 0.5 and abs(float(taken[-1] - exact[-1])) < 0.3


# --- bf16


@pytest.mark.parametrize("run", in_full(BF16, DEFAULT), ids="-".join)
def test_every_format_learns_in_bf16(learnt: dict[Any, list[Tensor]], run: tuple[str, str]) -> None:
    exact = learnt["exact"][0]
    for losses in learnt[run]:
        assert losses[-1] < exact[0] - 0.5
        assert abs(float(losses[-1] - exact[-1])) < 0.15 * float(exact[-1])


def bf16_true_run() -> Any:
    module = Learns()
    trainer = fitted(module, TED, 4, precision="bf16-true")
    states = [shard.states for shard in trainer.strategy.optimizers[0].shards]
    kept = {value.dtype for s in states for w in s.windows for value in w.state.values() if value.dim()}
    return {p.dtype for p in module.parameters()}, {s.has_master for s in states}, kept


def test_bf16_true_has_bf16_states_and_no_master() -> None:
    for dtypes, masters, states in on_ranks(4, bf16_true_run):
        assert dtypes == states == {torch.bfloat16} and masters == {False}


class OfTorch(Small):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2, eps=1e-3, fused=True)


def in_16_true(world: int, ours: bool, folder: Path) -> dict[str, Any]:
    return Use(world, ours, folder).fit(OfTorch(), precision="16-true", max_epochs=3)


def test_16_true_is_torchs(tmp_path: Path) -> None:
    alone = together(1, {ours: (in_16_true, 1, ours, tmp_path) for ours in (False, True)})
    (expected,), (found,) = alone[False], alone[True]
    parameters = {name: value for name, value in expected.items() if isinstance(value, Tensor) and value.dim()}
    assert {value.dtype for value in parameters.values()} == {torch.float16}
    assert all(torch.equal(found[name], value) for name, value in parameters.items())
    for of_rank in on_ranks(2, in_16_true, 2, True, tmp_path):
        for name, value in parameters.items():
            assert distance(of_rank[name].float(), value.float()) < 0.02


class Copies(SmallDecoder):
    """Learns to copy one batch."""

    def __init__(self) -> None:
        super().__init__(dim=32, hidden_dim=32)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit_in(layout: Any, precision: str) -> dict[str, Any]:
    module = Copies()
    trainer = new_trainer(layout, precision=precision)
    trainer.fit(module, on_data_axis(trainer, batches(1) * 12))
    kept = (Router, nn.RMSNorm)
    full = {p.dtype for part in module.modules() if isinstance(part, kept) for p in part.parameters(recurse=False)}
    low = {p.dtype for part in module.modules() if not isinstance(part, kept) for p in part.parameters(recurse=False)}
    masters = {shard.states.values.dtype for shard in trainer.strategy.optimizers[0].shards}
    losses = trainer.strategy.reduce(torch.stack(module.losses), reduce_op="mean")
    return {"full": full, "low": low, "masters": masters, "losses": losses}


@pytest.fixture(scope="module")
def exact() -> Tensor:
    """Losses in fp32, which no layout changes."""
    return on_ranks(1, fit_in, {}, "32-true")[0]["losses"]


@pytest.fixture(scope="module")
def mixed() -> dict[str, list[dict[str, Any]]]:
    return together(4, {name: (fit_in, layout, "bf16-mixed") for name, layout in PLAIN_LAYOUTS.items()})


@pytest.mark.parametrize("name", PLAIN_LAYOUTS)
def test_bf16_mixed_keeps_masters_and_learns_as_fp32_does(
    mixed: dict[str, list[dict[str, Any]]], exact: Tensor, name: str
) -> None:
    for found in mixed[name]:
        assert (found["full"], found["low"]) == ({torch.float32}, {torch.bfloat16})
        assert found["masters"] == {torch.float32}
        assert found["losses"][-1] < 0.6 * found["losses"][0]
        assert distance(found["losses"], exact) < 0.02, (found["losses"], exact)
