"""A schedule of capacity and coefficients: what holds in which step, on resume, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from helpers.behaviour_modules import SmallDecoder, batches, loader
from helpers.ranks import on_ranks
from helpers.trainers import quiet
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_tex.callbacks import RoutingSchedule
from lightning_tex.callbacks.routing_schedule import value_at
from lightning_tex.parallel.errors import UserValueError

ROUTER = {"name": "sigmoid", "init_args": {"bias_update_rate": 0.5}}
SCHEDULE = {
    "capacity_factor": [[0, 2.0], [2, 1.0]],
    "load_balance_coefficient": [[1, 0.1], [3, 0.3]],
    "bias_update_rate": [[3, 0.5], [4, 0.0]],
}


class Seen(SmallDecoder):
    """Notes what holds in every micro-step."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__(capacity_factor=1.5, router=ROUTER, **sizes)
        self.seen: list[tuple[int, float, float, float]] = []

    def training_step(self, batch: Any, index: int) -> Any:
        _, moe = next(self.decoder.moe_layers())
        rate = moe.router.bias_update_rate
        values = moe.capacity_factor, moe.load_balance_coefficient, rate
        self.seen.append((self.trainer.global_step, *(round(value, 6) for value in values)))
        return super().training_step(batch, index)


EXPECTED = [(0, 2.0, 0.1, 0.5), (1, 1.5, 0.1, 0.5), (2, 1.0, 0.2, 0.5), (3, 1.0, 0.3, 0.5), (4, 1.0, 0.3, 0.0)]


def fit(folder: Path, steps: int, ckpt: str | None = None) -> list[tuple[int, float, float, float]]:
    module = Seen()
    saves = ModelCheckpoint(folder, save_last=True)
    callbacks: list[L.Callback] = [RoutingSchedule(**SCHEDULE), saves]
    flags = {"max_steps": steps, "max_epochs": -1, "accumulate_grad_batches": 2, "devices": 1, "strategy": "tex_moe"}
    trainer = quiet(callbacks=callbacks, default_root_dir=folder, **flags)
    trainer.fit(module, loader(batches(4)), ckpt_path=ckpt, weights_only=False)
    return module.seen


def test_each_step_has_its_values_through_a_resume(tmp_path: Path) -> None:
    both = [value for value in EXPECTED for _ in range(2)]  # micro-steps of a step
    (first,) = on_ranks(1, fit, tmp_path, 4)
    (resumed,) = on_ranks(1, fit, tmp_path, 5, str(tmp_path / "last.ckpt"))
    assert first == both[:8] and set(resumed) == {EXPECTED[4]}


def test_between_points_lies_a_line_and_beyond_them_what_stands_there() -> None:
    points = [[10, 1.0], [20, 3.0]]
    assert [value_at(points, step) for step in (0, 10, 15, 19, 20, 99)] == [1, 1, 2, 2.8, 3, 3]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({}, "RoutingSchedule of nothing; legal: one or more of capacity_factor, "),
        ({"capacity_factor": [[5, 1.0], [3, 2.0]]}, "legal: pairs of step and value, steps rising from 0"),
        ({"capacity_factor": [[0, 1.0, 2.0]]}, "legal: pairs of step and value"),
        ({"capacity_factor": [[0, 1.0], [9, 0.0]]}, "falls to 0.0; legal: above 0"),
        ({"z_loss_coefficient": [[0, -1.0]]}, "falls to -1.0"),
    ],
)
def test_what_cannot_be_is_refused(schedule: dict[str, Any], message: str) -> None:
    with pytest.raises(UserValueError, match=message):
        RoutingSchedule(**schedule)


@pytest.mark.parametrize("name", ["capacity_factor", "bias_update_rate"])
def test_nothing_to_change_is_refused(name: str) -> None:
    schedule = RoutingSchedule(**{name: [[0, 1.0]]})
    with pytest.raises(UserValueError, match=f"{name}=.*without anything that has it"):
        schedule.on_fit_start(None, SmallDecoder())
