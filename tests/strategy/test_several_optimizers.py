"""Several optimizers in manual optimization, each over its own parameters: as in one process, saved, resumed from."""

from __future__ import annotations

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


def run(layout: dict[str, Any] | None, folder: str, steps: int = STEPS, resume: str | None = None) -> dict[str, Any]:
    module = Rivals()
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


class Shared(Rivals):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.Adam(self.judge.parameters())]


def fit_shared() -> str:
    with pytest.raises(ValueError, match="is in optimizer") as caught:
        trainer(tex.TexMoEStrategy(), 1).fit(Shared(), Data())
    return str(caught.value)


def test_a_parameter_of_two_optimizers_is_refused_by_name() -> None:
    (said,) = on_ranks(1, fit_shared)
    assert said.startswith("judge.0.weight is in optimizer 0 (SGD) and in optimizer 1 (Adam)")
    assert said.endswith("legal: each parameter in one optimizer")
