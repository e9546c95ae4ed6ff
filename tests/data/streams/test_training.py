"""A Trainer on a stream in parts: stopped and gone on with, also in another world, it trains on the same samples."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from helpers.cases import case
from helpers.ranks import on_ranks
from helpers.trainers import quiet

from lightning_tex import TexMoEStrategy
from lightning_tex.errors import UserValueError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*use of fork.. may lead to deadlocks:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]


def numbers_of(batch: Any) -> list[int]:
    """One for each row, which depends on all of its tokens."""
    return [hash(tuple(row)) for row in batch["input_ids"].tolist()]


def fit(ranks: Any, module: Any, steps: int, path: Path, ckpt_path: Any = None, **flags: Any) -> list[list[int]]:
    """Trains on, saves, and gives the numbers of the rows of each step."""
    data = ranks.module(num_workers=flags.pop("num_workers", 0))
    del data._share
    seen: list[list[int]] = []
    trained = module.training_step

    def training_step(batch: Any, batch_idx: int) -> Any:
        seen.append(numbers_of(batch))
        return trained(batch, batch_idx)

    module.training_step = training_step
    usual = {"limit_val_batches": 0, "num_sanity_val_steps": 0, "default_root_dir": path.parent, "devices": 1}
    trainer = quiet(max_steps=steps, **{**usual, **flags})
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    trainer.save_checkpoint(path)
    return seen


@pytest.mark.parametrize("flags", [{}, {"num_workers": 2}, {"limit_train_batches": 3}], ids=str)
def test_a_run_resumes_at_the_next_sample(ranks: Any, recorder: Any, tmp_path: Path, flags: Any) -> None:
    """Also where a limit makes Lightning's epochs short, none of which begins the stream anew."""
    whole = fit(ranks, recorder(), 10, tmp_path / "whole.ckpt", max_epochs=9, **flags)
    assert whole == [numbers_of(batch) for batch in ranks.read(10)[0]]
    for done in (2, 7):
        with case(done=done):
            first = fit(ranks, recorder(), done, tmp_path / "stopped.ckpt", max_epochs=9, **flags)
            rest = fit(ranks, recorder(), 10, tmp_path / "rest.ckpt", tmp_path / "stopped.ckpt", max_epochs=9, **flags)
            assert first + rest == whole


def test_a_second_trainer_begins_anew_and_the_same_one_goes_on(ranks: Any, recorder: Any, trainer: Any) -> None:
    data, flags = ranks.module(), {"limit_val_batches": 0}
    module = recorder()
    run = trainer(max_steps=3, **flags)
    run.fit(module, datamodule=data)
    run.fit_loop.epoch_loop.max_steps = 5
    run.fit(module, datamodule=data)
    trainer(max_steps=2, **flags).fit(module, datamodule=data)
    numbers = [step[0] // 8 for step in module.seen]
    assert numbers == [0, 1, 2, 3, 4, 0, 1]


def in_two(ranks: Any, module: Any, path: Path) -> list[list[int]]:
    return fit(ranks, module, 4, path, devices=2, strategy=TexMoEStrategy())


def test_two_ranks_go_on_as_one(ranks: Any, recorder: Any, tmp_path: Path) -> None:
    ranks.read(1)  # the tokenizer, once
    path = tmp_path / "two.ckpt"
    both = on_ranks(2, in_two, ranks, recorder(), path)
    whole = fit(ranks, recorder(), 9, tmp_path / "whole.ckpt")
    assert [list(chain(*parts)) for parts in zip(*both, strict=True)] == whole[:4]
    assert fit(ranks, recorder(), 9, tmp_path / "rest.ckpt", path, strategy=TexMoEStrategy()) == whole[4:]


def test_overfitting_on_parts_is_refused(ranks: Any, recorder: Any, trainer: Any) -> None:
    with pytest.raises(UserValueError, match="overfit_batches with stream_parts=8; legal: stream_parts=None"):
        trainer(overfit_batches=2, max_steps=2).fit(recorder(), datamodule=ranks.module())
