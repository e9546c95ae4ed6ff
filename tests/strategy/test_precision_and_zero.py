"""Precisions, ZeRO stages and state formats through the Trainer: the same training, loss scales, skipped steps."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from helpers.behaviour_modules import FOLDED, TED, PublicNames, batches, new_trainer, on_data_axis, on_ranks, together
from helpers.cases import in_full, selected
from helpers.layout_errors import distance
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

import lightning_tex as tex
from lightning_tex.callbacks import RunSummary
from lightning_tex.layers import VocabParallelCrossEntropy
from lightning_tex.models import Decoder, DecoderConfig
from lightning_tex.moe import Router
from lightning_tex.parallel.sharding import parameter_shardings

SPLIT = {**TED, "sequence_parallel": True}
LAYOUTS = {"ted": TED, "folded": FOLDED, "sequence": SPLIT}


class Learns(PublicNames):
    """Learns a few batches by heart. ``spoil``: (rank, step) -> what the gradient of ``where`` is multiplied by."""

    def __init__(self, spoil: dict[tuple[int, int], float] | None = None, where: str = "norm.weight") -> None:
        super().__init__()
        self.spoil, self.where = spoil or {}, where
        self.backwards = 0

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)

    def on_before_backward(self, loss: Tensor) -> None:
        factor = self.spoil.get((self.trainer.global_rank, self.backwards))
        self.backwards += 1
        if factor is not None:
            handle = self.get_parameter(self.where).register_hook(lambda grad: (handle.remove(), grad * factor)[1])


def fitted(module: L.LightningModule, layout: Any, steps: int = 8, **flags: Any) -> L.Trainer:
    trainer = new_trainer(layout, **flags)
    # Of a length that a tensor axis of 2 divides.
    given = [[part.repeat(1, 2)[:, :6] for part in batch] for batch in batches(2, samples=8)]
    trainer.fit(module, on_data_axis(trainer, given * (steps // 2)))
    return trainer


def whole_parameters(module: nn.Module, trainer: L.Trainer) -> dict[str, Tensor]:
    placed = parameter_shardings(module, trainer.strategy.topology)
    return {name: placed[name].gather(p.detach()).clone() for name, p in module.named_parameters()}


# --- ZeRO


def stage_run(layout: Any, stage: int, flags: dict[str, Any]) -> Any:
    module = PublicNames()
    trainer = fitted(module, {**layout, "zero_stage": stage}, precision="64-true", **flags)
    return module.mean_losses(trainer), whole_parameters(module, trainer)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_zero_stage_trains_alike(name: str) -> None:
    flags = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    found = together(4, {stage: (stage_run, LAYOUTS[name], stage, flags) for stage in (0, 1, 2)})
    expected_losses, expected = found[1][0]
    assert expected_losses[-1] < expected_losses[0]
    for stage in (0, 2):
        for losses, parameters in found[stage]:
            torch.testing.assert_close(losses, expected_losses, rtol=1e-10, atol=0)
            assert all(distance(parameters[key], value) <= 1e-10 for key, value in expected.items())


class ManualTwice(PublicNames):
    """Manual optimization, two backwards a step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for half in zip(*(part.chunk(2) for part in batch), strict=True):
            self.manual_backward(self.loss(list(half)))
        optimizer.step()


def manual_run(stage: int) -> dict[str, Tensor]:
    module = ManualTwice()
    trainer = fitted(module, {"expert_parallel_size": 2, "zero_stage": stage}, precision="64-true", max_steps=4)
    return whole_parameters(module, trainer)


def test_manual_optimization_under_zero_2() -> None:
    (expected, *_), stage_2 = (on_ranks(2, manual_run, stage) for stage in (1, 2))
    for parameters in stage_2:
        assert all(distance(parameters[key], value) <= 1e-10 for key, value in expected.items())


class LeavesOut(PublicNames):
    """Has no loss for one batch on one rank."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        return None if (self.trainer.global_rank, batch_idx) == (1, 1) else loss


def without_a_loss(stage: int) -> None:
    fitted(LeavesOut(), {"expert_parallel_size": 2, "zero_stage": stage}, accumulate_grad_batches=2)


@pytest.mark.parametrize("stage", [2, pytest.param(0, marks=pytest.mark.full), pytest.param(1, marks=pytest.mark.full)])
def test_a_rank_without_a_loss_is_an_error_and_leaves_nobody_waiting(stage: int) -> None:
    with pytest.raises(AssertionError, match=r"training_step returned None on rank 1: .*0 \* loss") as error:
        on_ranks(2, without_a_loss, stage)
    assert "still running" not in str(error.value)


def test_no_loss_in_a_run_of_one_process_is_lightnings_business() -> None:
    on_ranks(1, without_a_loss_alone)


class LeavesOutAlone(PublicNames):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        return super().training_step(batch, batch_idx) if batch_idx else None


def without_a_loss_alone() -> None:
    module = LeavesOutAlone()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*returned `None`")
        trainer = fitted(module, {}, 4)
    assert trainer.global_step == 4


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
    return whole_parameters(module, fitted(module, TED, 6, precision=None, plugins=[plugin], **clip))


def test_clipping_by_hand_takes_the_loss_scale_out_once() -> None:
    (by_hand, *_), (by_trainer, *_) = (on_ranks(4, descended, by_hand) for by_hand in (True, False))
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
    trainer = fitted(module, layout, 8, precision=None, plugins=[plugin], gradient_clip_val=1.0)
    routers = {p.dtype for m in module.modules() if isinstance(m, Router) for p in m.parameters()}
    return {
        "dtypes": {p.dtype for name, p in module.named_parameters() if "router" not in name and "norm" not in name},
        "routers": routers,
        "unchanged": module.unchanged,
        "scales": module.scales,
        "losses": module.mean_losses(trainer).float(),
        "skipped": trainer.strategy.optimizers[0].skipped.total,
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_infinity_on_one_rank_lowers_the_scale_on_all_and_changes_nothing(name: str) -> None:
    spoil = {(3, 2): float("inf")}
    by_place = together(4, {at: (fp16_run, LAYOUTS[name], spoil, at) for at in ("norm.weight", "moe.experts.up")})
    for found in [*by_place["norm.weight"], *by_place["moe.experts.up"]]:
        assert found["dtypes"] == {torch.float16} and found["routers"] == {torch.float32}
        assert found["unchanged"] == [step == 2 for step in range(8)]
        assert found["scales"] == [2.0**10] * 2 + [2.0**9] * 6
        assert found["skipped"] == 1
        assert torch.isfinite(found["losses"]).all() and found["losses"][-1] < found["losses"][0] - 0.1


def losses_in(layout: Any, precision: str | None, options: dict[str, Any], plugins: Any = None) -> Tensor:
    module = Learns()
    trainer = fitted(module, {**layout, **options}, 24, precision=precision, plugins=plugins)
    return module.mean_losses(trainer).float()


FORMATS = ("fp32", "split", "int8", "stochastic")
BF16 = [(precision, name) for precision in ("bf16-mixed", "bf16-true") for name in FORMATS]
DEFAULT = [("bf16-mixed", "split"), ("bf16-mixed", "int8"), ("bf16-true", "fp32"), ("bf16-true", "stochastic")]


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


# --- the guard


def guarded_run(precision: str, spoil: dict[tuple[int, int], float], most: int | None) -> Any:
    module = Learns(spoil)
    try:
        trainer = fitted(module, {**TED, "max_skipped_steps": most}, 6, precision=precision)
    except RuntimeError as error:
        return str(error)
    finite = all(bool(torch.isfinite(p).all()) for p in module.parameters())
    return finite, trainer.strategy.optimizers[0].skipped.total, trainer.global_step


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_steps_with_a_nan_are_skipped_and_counted(precision: str) -> None:
    spoil = {(1, 1): float("nan"), (2, 3): float("inf")}
    found = together(4, {most: (guarded_run, precision, spoil, most) for most in (2, None)})
    assert found[2] == [(True, 2, 6)] * 4
    for finite, skipped, _ in found[None]:
        assert not finite and skipped == 0


def summary_of_a_guarded_run() -> str:
    trainer = fitted(Learns({(0, 1): float("nan")}), {}, 4, callbacks=[RunSummary()])
    assert trainer.strategy.optimizers[0].skipped.total == 1
    return "done"


def test_skipped_steps_stand_in_the_summary(capfd: pytest.CaptureFixture[str]) -> None:
    on_ranks(1, summary_of_a_guarded_run)
    assert "1 optimizer steps with an infinite or NaN gradient" in capfd.readouterr().out


def test_training_stops_after_too_many_and_names_the_parameter() -> None:
    spoil = {(1, step): float("nan") for step in range(2, 6)}
    for said in on_ranks(4, guarded_run, "32-true", spoil, 3):
        assert "norm.weight (rank" in said and "last 3 steps" in said and "max_skipped_steps" in said


# --- against torch alone


@pytest.mark.full
def test_fifty_steps_on_one_process_are_torchs() -> None:
    for precision, tolerance in (("64-true", 1e-10), ("32-true", 1e-5)):
        (ours,), (theirs,) = (on_ranks(1, quickstart_run, layout, precision) for layout in ({}, None))
        torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=0)
        assert ours[0][-1] < ours[0][0]
        worst = {key: distance(ours[1][key], value) for key, value in theirs[1].items()}
        assert max(worst.values()) <= tolerance, max(worst, key=worst.get)


class Quickstart(L.LightningModule):
    """The quickstart's model, of a smaller vocabulary, on shorter sequences."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        recipe = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "quickstart.yaml").read_text())
        config = DecoderConfig(vocab_size=512, **recipe["model"]["init_args"]["config"])
        self.decoder, self.cross_entropy = Decoder(config), VocabParallelCrossEntropy()
        self.losses: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.cross_entropy(self.decoder(batch[0]), batch[1]) + tex.moe.auxiliary_loss(self)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)
        warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=60)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}


def quickstart_run(layout: Any, precision: str) -> tuple[Tensor, dict[str, Tensor]]:
    module = Quickstart()
    trainer = new_trainer(layout, precision=precision, gradient_clip_val=1.0)
    trainer.fit(module, on_data_axis(trainer, batches(50, samples=4)))
    return torch.stack(module.losses), {name: p.detach().clone() for name, p in module.named_parameters()}
