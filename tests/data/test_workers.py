"""Workers of data loaders and signals: those for the whole run leave a worker be, the end of its rank ends it."""

from __future__ import annotations

import atexit
import os
import pickle
import signal
import time
from typing import Any

from torch.utils.data import DataLoader, Dataset

from lightning_tex.data.workers import SparedWorker

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Signalled(Dataset):
    """Reading a sample sends the worker a signal, or takes a minute."""

    begun: Any = None

    def __init__(self, slow: bool = False) -> None:
        self.slow = slow

    def __len__(self) -> int:
        return len(SIGNALS)

    def __getitem__(self, index: int) -> Any:
        if self.slow:
            time.sleep(60)
        os.kill(os.getpid(), SIGNALS[index])
        return index, Signalled.begun


def begin(worker_id: int) -> None:
    Signalled.begun = worker_id


def read(dataset: Signalled) -> Any:
    return iter(DataLoader(dataset, batch_size=None, num_workers=1, worker_init_fn=SparedWorker(SIGNALS, begin)))


def test_a_worker_outlives_what_asks_the_run_to_stop() -> None:
    assert list(read(Signalled())) == [[index, 0] for index in range(len(SIGNALS))]


def test_another_process_that_ends_is_not_the_rank() -> None:
    reader = read(Signalled())
    other = os.fork()
    if other == 0:
        atexit._run_exitfuncs()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 0
    assert [index for index, _ in reader] == list(range(len(SIGNALS)))


def test_a_rank_that_ends_does_not_wait_for_what_its_worker_reads() -> None:
    rank = os.fork()
    if rank == 0:
        reader = read(Signalled(slow=True))
        time.sleep(1)
        atexit._run_exitfuncs()
        os._exit(7 if reader._workers[0].exitcode == 0 else 8)
    until = time.monotonic() + 30
    while (ended := os.waitpid(rank, os.WNOHANG))[0] == 0 and time.monotonic() < until:
        time.sleep(0.05)
    if ended[0] == 0:
        os.kill(rank, signal.SIGKILL)
        os.waitpid(rank, 0)
    assert ended[0] == rank, "it waits for its worker"
    assert os.waitstatus_to_exitcode(ended[1]) == 7


def test_in_a_process_of_its_own_it_is_what_the_user_gave() -> None:
    assert pickle.loads(pickle.dumps(SparedWorker(SIGNALS, begin))) is begin
