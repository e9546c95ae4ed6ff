"""What ExpertMonitor logs, keeps, draws and warns of."""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.behaviour_modules import FOLDED, TED, DictLogger, SmallDecoder, batches, loader, new_trainer, on_data_axis
from helpers.ranks import together
from helpers.trainers import quiet
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_tex import LanguageModel
from lightning_tex.callbacks import ExpertMonitor
from lightning_tex.callbacks.expert_history import ExpertHistory
from lightning_tex.callbacks.expert_pictures import load_figure
from lightning_tex.models import DecoderConfig
from lightning_tex.moe.routers import SoftmaxRouter
from lightning_tex.parallel.expert_load import ExpertLoad, LoadTotals

EXPERTS, STEPS = 4, 6


class Chosen(SmallDecoder):
    """Its one MoE layer chooses as it is told, by token and step."""

    def __init__(self, choose: Callable[[int, int], Tensor]) -> None:
        super().__init__(num_experts=EXPERTS, load_balance_coefficient=0.0)
        self.steps = 0
        router = next(layer for _, layer in self.decoder.moe_layers()).router
        router.choose = lambda scores, tokens: choose(len(scores), self.steps)

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps += 1


def fit(module: L.LightningModule, monitor: ExpertMonitor, **flags: Any) -> dict[str, list[float]]:
    logger = DictLogger()
    options = {"logger": logger, "log_every_n_steps": 1, "max_epochs": 1, "callbacks": [monitor], **flags}
    quiet(**options).fit(module, loader(batches(STEPS)))
    logged: dict[str, list[float]] = {}
    for name, value in logger.logged:
        logged.setdefault(name, []).append(float(value))
    return logged


def evenly(tokens: int, step: int) -> Tensor:
    return torch.arange(2 * tokens).view(tokens, 2) % EXPERTS


def two_of_them(tokens: int, step: int) -> Tensor:
    return torch.tensor([0, 1] if step % 2 else [2, 1]).expand(tokens, 2)


def test_an_even_load() -> None:
    logged = fit(Chosen(evenly), ExpertMonitor())
    expected = {"load": 1, "load_min": 1, "load_cv": 0, "load_shift": 0, "overflow": 0}
    for name, value in expected.items():
        assert set(logged[f"expert_{name}/1"]) == {value}, name
    assert set(logged["dead_experts/1"]) == {0}
    assert "expert_load/worst" not in logged and "expert_rank_load/1" not in logged


def test_a_load_on_two_experts_that_changes() -> None:
    logged = fit(Chosen(two_of_them), ExpertMonitor(warn_after=None))
    assert set(logged["expert_load/1"]) == {EXPERTS / 2} and set(logged["expert_load_min/1"]) == {0}
    assert set(logged["dead_experts/1"]) == {2} and logged["expert_load_cv/1"] == pytest.approx(STEPS * [1.0])
    assert logged["expert_load_shift/1"] == pytest.approx((STEPS - 1) * [0.5])


def test_what_is_logged_is_of_all_steps_since_the_last_log() -> None:
    logged = fit(Chosen(two_of_them), ExpertMonitor(warn_after=None), log_every_n_steps=2)
    assert logged["dead_experts/1"] == [1, 1, 1] and logged["expert_load_shift/1"] == [0, 0]


def test_how_sure_a_router_is() -> None:
    scores = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4], [9.0, 1.0, 0.0, 0.0]])
    load = ExpertLoad()
    load.look(scores, None)  # nobody asked
    load.looks_at_scores = True
    load.look(scores, torch.tensor([True, False, True]))
    load.add(torch.tensor([2, 2, 0, 0]), torch.tensor(1))
    taken = load.take_totals()
    assert taken is not None and load.take_totals() is None
    totals = LoadTotals.of(taken)
    entropy = math.log(2) - 0.9 * math.log(0.9) - 0.1 * math.log(0.1)  # scores of any sum count by their shares
    assert totals.counts.tolist() == [2, 2, 0, 0] and (totals.overflowed, totals.tokens) == (1, 2)
    assert float(totals.entropy) == pytest.approx(entropy) and float(totals.confidence) == pytest.approx(0.5 + 0.9)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_auxiliary_losses_are_what_enters_the_loss(accumulated: int) -> None:
    coefficients = {"load_balance_coefficient": 0.1, "sequence_balance_coefficient": 0.2, "z_loss_coefficient": 0.01}
    module = SmallDecoder(**coefficients)
    layer = next(layer for _, layer in module.decoder.moe_layers())
    recorded: list[list[float]] = []
    layer.register_forward_hook(lambda *_: recorded.append([float(loss) for loss in layer.ledger.losses]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nobody collects them
        logged = fit(module, ExpertMonitor(), accumulate_grad_batches=accumulated)
    assert all(len(losses) == 2 for losses in recorded)
    expected = [sum(losses) for losses in recorded[accumulated - 1 :: accumulated]]
    assert logged["auxiliary_loss/1"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_entropy_and_confidence_are_those_of_the_scores(accumulated: int) -> None:
    module = SmallDecoder(load_balance_coefficient=0.0)
    router = next(layer for _, layer in module.decoder.moe_layers()).router
    assert isinstance(router, SoftmaxRouter)
    seen: list[Tensor] = []
    router.register_forward_hook(lambda _, args, route: seen.append(route.scores.detach()))
    logged = fit(module, ExpertMonitor(), accumulate_grad_batches=accumulated)
    for value, confidence, scores in zip(
        logged["router_entropy/1"], logged["router_confidence/1"], seen[accumulated - 1 :: accumulated], strict=True
    ):
        assert value == pytest.approx(float(-(scores * scores.log()).sum(-1).mean()) / math.log(EXPERTS), rel=1e-5)
        assert confidence == pytest.approx(float(scores.amax(-1).mean()), rel=1e-5)


def on_layout(layout: dict[str, Any] | None, folder: Path) -> dict[str, float]:
    logger = DictLogger()
    trainer = new_trainer(layout, logger=logger, log_every_n_steps=2, callbacks=[ExpertMonitor(folder)])
    even = [[part[:, :4] for part in batch] for batch in batches(4)]  # sequence parallelism halves sequences
    trainer.fit(SmallDecoder(num_layers=4), on_data_axis(trainer, even))
    return dict(logger.logged)


def test_layouts_log_and_write_the_same(tmp_path: Path) -> None:
    reference = together(1, {0: (on_layout, {}, tmp_path / "one")})[0][0]
    layouts = {"ted": TED, "folded": FOLDED, "split": {**TED, "sequence_parallel": True}}
    runs = together(4, {name: (on_layout, layout, tmp_path / name) for name, layout in layouts.items()})
    told = ("expert_", "dead_experts/", "router_", "auxiliary_loss/")
    expected = {name: value for name, value in reference.items() if name.startswith(told)}
    of_all = {"expert_load/worst", "dead_experts/total", "router_entropy/mean", "auxiliary_loss/total"}
    assert of_all | {"expert_load/1", "expert_load/3", "auxiliary_loss/3"} < expected.keys()
    assert expected["auxiliary_loss/total"] == pytest.approx(
        expected["auxiliary_loss/1"] + expected["auxiliary_loss/3"]
    )
    for name, (logged, *_) in runs.items():
        for metric, value in expected.items():
            assert logged[metric] == pytest.approx(value, rel=1e-6), f"{metric} on {name}"
        assert 1 <= logged["expert_rank_load/1"] <= logged["expert_load/1"] + 1e-9
        assert (tmp_path / name / "expert_load.csv").read_text() == (tmp_path / "one" / "expert_load.csv").read_text()


def test_files_hold_every_choice(tmp_path: Path) -> None:
    module, monitor = SmallDecoder(num_layers=4, load_balance_coefficient=0.0), ExpertMonitor()
    fit(module, monitor, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=3)
    with (tmp_path / "expert_load.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["step", "layer", "0", "1", "2", "3"]
    assert [row[:2] for row in rows] == [["3", "1"], ["3", "3"], ["6", "1"], ["6", "3"]]
    tokens = 8 * 5
    for row in rows:
        assert sum(map(int, row[2:])) == 3 * tokens * 2, row
    pytest.importorskip("matplotlib")
    assert (tmp_path / "expert_load.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))


def test_a_run_does_not_end_for_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="ExpertMonitor could not write to .*file"):
        fit(Chosen(evenly), ExpertMonitor(tmp_path / "file"))


def test_a_layer_that_collapses_is_warned_of_once() -> None:
    with pytest.warns(UserWarning, match="MoE layer decoder.blocks.1.mlp collapses: 2 of its 4 experts") as found:
        fit(Chosen(lambda tokens, _: two_of_them(tokens, 0)), ExpertMonitor(warn_after=3))
    assert sum("collapses" in str(each.message) for each in found) == 1


@pytest.mark.parametrize(("choose", "after"), [(evenly, 1), (lambda tokens, _: two_of_them(tokens, 0), STEPS + 1)])
def test_no_warning_of_layers_that_do_not(choose: Callable[[int, int], Tensor], after: int) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit(Chosen(choose), ExpertMonitor(warn_after=after))
    assert not [each for each in found if "collapses" in str(each.message)]


def test_a_history_has_a_bounded_number_of_columns_and_loses_no_choice() -> None:
    history = ExpertHistory(columns=4)
    for step in range(1, 12):
        history.add(step, {"0": torch.tensor([float(step), 1.0])})
    assert len(history.steps) <= 4 and history.steps[-1] == 11
    assert history.choices("0").sum(0).tolist() == [sum(range(1, 12)), 11]
    widths = history.choices("0")[:-1, 1]
    assert len(set(widths.tolist())) == 1  # all but the last are of as many logged steps

    again = ExpertHistory(columns=4)
    again.load_state_dict(history.state_dict())
    for each in (history, again):
        each.add(12, {"0": torch.tensor([12.0, 1.0])})
    assert again.steps == history.steps and torch.equal(again.choices("0"), history.choices("0"))


@pytest.mark.parametrize(("steps", "span"), [([7], (0, 7)), ([10, 20, 30], (0, 30)), ([110, 120, 125], (100, 125))])
def test_a_picture_shows_the_steps_that_its_columns_are_of(steps: list[int], span: tuple[int, int]) -> None:
    pytest.importorskip("matplotlib")
    history = ExpertHistory()
    for step in steps:
        history.add(step, {"0": torch.tensor([3.0, 1.0])})
    shown = [axes.get_xlim() for axes in load_figure(history).get_axes() if axes.get_title() == "layer 0"]
    assert shown == [span]


@pytest.mark.filterwarnings("ignore")  # of a folder that is not empty, and of going on within an epoch
def test_a_history_goes_on_through_a_checkpoint(tmp_path: Path) -> None:
    whole, first, second = ExpertMonitor(), ExpertMonitor(), ExpertMonitor()
    module = partial(SmallDecoder, load_balance_coefficient=0.0)
    fit(module(), whole)
    options = {"logger": False, "log_every_n_steps": 1, "max_epochs": 1}
    saves = [ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4) for _ in range(2)]
    quiet(**options, max_steps=4, callbacks=[first, saves[0]]).fit(module(), loader(batches(STEPS)))
    path = saves[0].best_model_path
    quiet(**options, callbacks=[second, saves[1]]).fit(
        module(), loader(batches(STEPS)), ckpt_path=path, weights_only=True
    )
    assert second.history.steps == whole.history.steps == list(range(1, STEPS + 1))
    # Lightning does not take a plain loader to where it was: later batches are others.
    assert torch.equal(second.history.choices("1")[:4], whole.history.choices("1")[:4])
    assert second.history.choices("1").sum(-1).tolist() == whole.history.choices("1").sum(-1).tolist()


def test_the_users_monitor_takes_the_place_of_the_models(tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 61,
        "dim": 16,
        "num_layers": 2,
        "num_heads": 2,
        "hidden_dim": 16,
        "num_experts": 4,
        "load_balance_coefficient": 0,
    }
    given = [{"input_ids": ids, "labels": labels} for ids, labels in batches(2)]
    trainer = quiet(max_epochs=1, callbacks=[ExpertMonitor(tmp_path)], log_every_n_steps=1)
    trainer.fit(LanguageModel(DecoderConfig(**sizes, top_k=2)), loader(given), loader(given))
    assert sum(isinstance(callback, ExpertMonitor) for callback in trainer.callbacks) == 1
    assert (tmp_path / "expert_load.csv").exists()
