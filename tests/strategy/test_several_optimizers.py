"""Several optimizers in manual optimization, over their own or shared parameters: as in one process, saved, resumed."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.checkpoint_runs import Data, largest_difference, trainer
from helpers.ranks import on_ranks, together
from helpers.trainers import gathered
from torch import Tensor, nn

import lightning_tex as tex
from lightning_tex.layers import ColumnParallelLinear, RowParallelLinear
from lightning_tex.moe import MoE
from lightning_tex.saving.consolidate import consolidated

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_parallel_size": 2},
    "expert": {"expert_parallel_size": 2, "zero_stage": 2},
    "plain": {"tensor_parallel_size": 2, "zero_stage": 0, "save_distributed_checkpoint": False},
}
STEPS = 4


class Rivals(L.LightningModule):
    """One network makes rows, the other one judges them; the judge has two steps to the maker's one."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(2)
        self.maker = nn.Sequential(nn.Linear(6, 4), MoE(4, 8, 4, load_balance_coefficient=0.0))
        self.judge = nn.Sequential(ColumnParallelLinear(4, 8), nn.Tanh(), RowParallelLinear(8, 4))
        self.taken: list[int] = []

    def training_step(self, batch: list[Tensor], index: int) -> None:
        maker, judge = self.optimizers()
        rows = batch[0].float() / 61
        self.toggle_optimizer(judge)
        made = self.maker(rows)
        loss = (self.judge(made) - 1).square().mean()

        def closure() -> Tensor:
            judge.zero_grad()
            self.manual_backward(loss)
            return loss

        judge.step(closure=closure)
        self.untoggle_optimizer(judge)
        if index % 2 == 0:
            self.toggle_optimizer(maker)
            maker.zero_grad()
            self.manual_backward(self.judge(self.maker(rows)).square().mean())
            self.clip_gradients(maker, gradient_clip_val=0.1)
            maker.step()
            self.untoggle_optimizer(maker)
        for scheduler in self.lr_schedulers():
            scheduler.step()
        self.taken.append(self.trainer.global_step)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        """Never asked for: the data module has a loader for it."""

    def configure_optimizers(self) -> Any:
        maker = torch.optim.AdamW(self.maker.parameters(), lr=1e-2)
        judge = torch.optim.SGD(self.judge.parameters(), lr=1e-1, momentum=0.9)
        decays = [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9) for optimizer in (maker, judge)]
        return [maker, judge], decays


def run(
    layout: dict[str, Any] | None,
    folder: str,
    steps: int = STEPS,
    resume: str | None = None,
    kind: type[Rivals] = Rivals,
) -> dict[str, Any]:
    module = kind()
    strategy = "auto" if layout is None else tex.TexMoEStrategy(**layout)
    fit = trainer(strategy, 1 if layout is None else 2, epochs=2, max_steps=-1, limit_train_batches=steps)
    fit.fit_loop.max_epochs = 1 if resume is None else 2
    fit.fit(module, Data(STEPS), ckpt_path=resume)
    fit.save_checkpoint(f"{folder}.ckpt")
    rates = [group["lr"] for optimizer in fit.optimizers for group in optimizer.param_groups]
    return {"weights": gathered(module, fit), "rates": rates, "steps": module.taken}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One process and ranks, an epoch; and the second one from what another layout has saved."""
    folder = tmp_path_factory.mktemp("rivals")
    first = run(None, f"{folder}/alone")
    second = run(None, f"{folder}/alone second", resume=f"{folder}/alone.ckpt")
    cases: dict[Any, tuple[Any, ...]] = {name: (run, layout, f"{folder}/{name}") for name, layout in LAYOUTS.items()}
    for name, source in {"tensor": "expert", "expert": "plain", "plain": "alone"}.items():
        cases[name, source] = (run, LAYOUTS[name], f"{folder}/second {name}", STEPS, f"{folder}/{source}.ckpt")
    return folder, {"first": first, "second": second, **together(2, cases)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_they_step_as_in_one_process(runs: tuple[Path, dict[str, Any]], name: str) -> None:
    _, by_case = runs
    for rank in by_case[name]:
        assert largest_difference(rank["weights"], by_case["first"]["weights"]) < 1e-5
        assert rank["rates"] == pytest.approx(by_case["first"]["rates"])
        assert rank["steps"] == by_case["first"]["steps"]


@pytest.mark.parametrize(("name", "source"), [("tensor", "expert"), ("expert", "plain"), ("plain", "alone")])
def test_they_go_on_from_another_layout_and_form(runs: tuple[Path, dict[str, Any]], name: str, source: str) -> None:
    _, by_case = runs
    for rank in by_case[name, source]:
        assert largest_difference(rank["weights"], by_case["second"]["weights"]) < 1e-5
        assert rank["rates"] == pytest.approx(by_case["second"]["rates"])


def test_a_directory_consolidates_to_the_states_of_each(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = runs
    alone = torch.load(folder / "alone.ckpt", weights_only=True)
    together_again = consolidated(folder / "tensor.ckpt")
    for found, expected in zip(together_again["optimizer_states"], alone["optimizer_states"], strict=True):
        assert found["state"].keys() == expected["state"].keys()
        for number, state in expected["state"].items():
            for key, value in state.items():
                torch.testing.assert_close(torch.as_tensor(found["state"][number][key]), torch.as_tensor(value))


class Sharing(Rivals):
    """Both step the judge: one of them with what the other one's clipping left, where no backward comes between."""

    def training_step(self, batch: list[Tensor], index: int) -> None:
        both, judge = self.optimizers()
        rows = batch[0].float() / 61
        both.zero_grad()
        self.manual_backward(self.judge(self.maker(rows)).square().mean())
        self.clip_gradients(both, gradient_clip_val=0.1)
        both.step()
        if index % 2 == 0:
            judge.step()
        judge.zero_grad()
        self.manual_backward((self.judge(self.maker(rows)) - 1).square().mean())
        judge.step()
        self.taken.append(self.trainer.global_step)

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.AdamW(self.parameters(), lr=1e-2),
            torch.optim.SGD(self.judge.parameters(), lr=1e-1, momentum=0.9),
        ]


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """As ``runs``, of optimizers that share parameters; one layout goes on from each form."""
    folder = tmp_path_factory.mktemp("sharing")
    first = run(None, f"{folder}/alone", kind=Sharing)
    second = run(None, f"{folder}/alone second", resume=f"{folder}/alone.ckpt", kind=Sharing)
    cases: dict[Any, tuple[Any, ...]] = {
        name: (run, layout, f"{folder}/{name}", STEPS, None, Sharing) for name, layout in LAYOUTS.items()
    }
    for source in ("expert", "plain"):
        resumed = (run, LAYOUTS["tensor"], f"{folder}/second {source}", STEPS, f"{folder}/{source}.ckpt", Sharing)
        cases["tensor", source] = resumed
    return folder, {"first": first, "second": second, **together(2, cases)}


@pytest.mark.parametrize("name", [*LAYOUTS, ("tensor", "expert"), ("tensor", "plain")])
def test_optimizers_that_share_parameters_step_and_go_on_as_in_one_process(
    sharing: tuple[Path, dict[str, Any]], name: Any
) -> None:
    _, by_case = sharing
    expected = by_case["first" if isinstance(name, str) else "second"]
    for rank in by_case[name]:
        assert largest_difference(rank["weights"], expected["weights"]) < 1e-5
        assert rank["steps"] == expected["steps"]


def test_a_directory_of_theirs_consolidates_to_the_states_of_each(sharing: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = sharing
    alone = torch.load(folder / "alone.ckpt", weights_only=True)["optimizer_states"]
    for found, expected in zip(consolidated(folder / "expert.ckpt")["optimizer_states"], alone, strict=True):
        for number, state in expected["state"].items():
            for key, value in state.items():
                torch.testing.assert_close(torch.as_tensor(found["state"][number][key]), torch.as_tensor(value))


def fit_sharing(precision: str) -> str:
    with pytest.raises(ValueError, match="is in optimizer") as caught:
        trainer(tex.TexMoEStrategy(), 1, precision=precision).fit(Sharing(), Data())
    return str(caught.value)


def test_a_parameter_of_two_optimizers_with_masters_is_refused_by_name() -> None:
    (said,) = on_ranks(1, fit_sharing, "bf16-mixed")
    assert "is in optimizer 0 (AdamW) and in optimizer 1 (SGD)" in said and "'bf16-true'" in said


class Forgetful(Sharing):
    def training_step(self, batch: list[Tensor], index: int) -> None:
        for optimizer in self.optimizers():
            self.manual_backward(self.judge(self.maker(batch[0].float() / 61)).square().mean())
            optimizer.step()


def no_zero_grad_between(world: int) -> str:
    fit = trainer(tex.TexMoEStrategy(), world, max_steps=2)
    with pytest.raises(RuntimeError, match="have been combined") if world > 1 else nullcontext() as caught:
        fit.fit(Forgetful(), Data())
    return str(caught.value) if caught else ""


def test_a_backward_onto_gradients_that_ranks_have_combined_is_refused() -> None:
    assert on_ranks(1, no_zero_grad_between, 1) == [""]
    for said in on_ranks(2, no_zero_grad_between, 2):
        assert "zero_grad() before the next backward" in said
