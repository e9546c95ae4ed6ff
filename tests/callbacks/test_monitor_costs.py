"""What ExpertMonitor costs a step: no wait for a device, and of other ranks one reduction in logged steps."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest.mock import PropertyMock, patch

import lightning as L
from helpers.behaviour_modules import DictLogger, SmallDecoder, batches, new_trainer, on_data_axis
from helpers.host_reads import host_reads
from helpers.ranks import together

from lightning_tex.callbacks import ExpertMonitor
from lightning_tex.parallel.flight_record import TRAINING
from lightning_tex.parallel.host_copy import HostCopy

STEPS, EVERY = 9, 3


class Counts(L.Callback):
    """Reads of the host and collectives in each step, what callbacks before it do at its end among them."""

    def __init__(self, reads: list[Any]) -> None:
        self.all_reads = reads
        self.reads: list[int] = []
        self.collectives: list[int] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.before = len(self.all_reads), TRAINING.number

    def on_train_batch_end(self, *_: Any) -> None:
        self.reads.append(len(self.all_reads) - self.before[0])
        self.collectives.append(TRAINING.number - self.before[1])


def counted(monitored: bool) -> tuple[list[int], list[int]]:
    with ExitStack() as stack:
        # A CPU's copy is there at once; a GPU's is not read before it has come.
        stack.enter_context(patch.object(HostCopy, "arrived", PropertyMock(return_value=False)))
        counts = Counts(stack.enter_context(host_reads()))
        callbacks = [*([ExpertMonitor(warn_after=None)] if monitored else []), counts]
        options = {"callbacks": callbacks, "log_every_n_steps": EVERY, "logger": DictLogger(), "max_epochs": 1}
        trainer = new_trainer({"expert_parallel_size": 2}, **options)
        trainer.fit(SmallDecoder(num_layers=4), on_data_axis(trainer, batches(STEPS)))
    return counts.reads, counts.collectives


def test_no_step_reads_from_a_device_and_logged_ones_have_one_reduction_more() -> None:
    runs = together(2, {monitored: (counted, monitored) for monitored in (False, True)})
    for (reads, collectives), (plain_reads, plain) in zip(runs[True], runs[False], strict=True):
        assert len(reads) == STEPS and reads == plain_reads
        more = [own - without for own, without in zip(collectives, plain, strict=True)]
        assert more == [int(step % EVERY == 0) for step in range(1, STEPS + 1)]
