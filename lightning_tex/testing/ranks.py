"""Run a function on forked ranks: a multi-process test in a second or two."""

from __future__ import annotations

import gc
import os
import pickle
import random
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_tex.resilience.orphans import end_with_parent


class RanksFailed(AssertionError):
    """Ranks failed or hung.

    Args:
        message: with the traceback of each rank that failed.
        outcomes: what the others returned, by rank.
        hung: ranks that were ended because they still ran.
    """

    def __init__(self, message: str, outcomes: Mapping[int, Any], hung: Sequence[int]) -> None:
        super().__init__(message)
        self.outcomes, self.hung = outcomes, hung


def run_ranks(
    world: int, function: Callable[..., Any], *args: Any, timeout: float = 120, detail: bool = False
) -> list[Any]:
    """Run a function on ranks that are forked from this process; what it returned on each, in their order.

    ``RANK`` and so on are set so that ``Trainer(devices=world)`` finds itself already launched; process groups are the
    function's business. On Linux: gloo is told to use the loopback interface by the name that it has there.

    Args:
        world: ranks.
        function: is called as ``function(*args)`` on every rank; what it returns is pickled.
        args: its arguments, which ranks have by the fork.
        timeout: seconds that all ranks together have; then those that still run are ended.
        detail: ``TORCH_DISTRIBUTED_DEBUG=DETAIL``: collectives that do not match are named, at twice their time. That
            variable, where it is set, does the same for every call.

    Raises:
        RanksFailed: an AssertionError, with the traceback of each rank that failed, and the ranks that hang.
    """
    context = mp.get_context("fork")
    with reserved_port() as port, tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(os.getpid(), rank, world, port, folder, detail, function, args))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        deadline = monotonic() + timeout
        try:
            for process in ranks:
                process.join(max(0.0, deadline - monotonic()))
        finally:
            hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
        ended = [_outcome(Path(folder, str(rank))) for rank in range(world)]
    failures = [f"--- rank {rank}\n{text}" for rank, (ok, text) in enumerate(ended) if not ok and rank not in hung]
    if hung:
        failures.append(f"--- ranks {hung} were still running after {timeout} s")
    if failures:
        returned = {rank: value for rank, (ok, value) in enumerate(ended) if ok}
        raise RanksFailed("\n".join(failures), returned, hung)
    return [value for _, value in ended]


@contextmanager
def reserved_port() -> Iterator[int]:
    """A TCP port for rank 0 to listen at, which no other call of this function on the machine gives meanwhile.

    It is below those that systems give out by themselves; the UDP port of its number is held in sign of that.
    """
    for port in random.SystemRandom().sample(range(20_000, 30_000), 100):
        with socket.socket(type=socket.SOCK_DGRAM) as sign, socket.socket() as trial:
            try:
                sign.bind(("127.0.0.1", port))
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
            trial.close()
            yield port
            return
    raise RuntimeError("no free port among 100 of 20000 to 29999")


def _outcome(path: Path) -> tuple[bool, Any]:
    if not path.exists():
        return False, "ended without a result"
    return pickle.loads(path.read_bytes())


def _rank(
    parent: int, rank: int, world: int, port: int, folder: str, detail: bool, function: Callable[..., Any], args: Any
) -> None:
    # A collection that walked what was there before the fork would copy all of its pages: half of a small fit's time.
    gc.freeze()
    _share_processors(rank, world)
    end_with_parent(signal.SIGKILL, parent)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        NODE_RANK="0",
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )
    # torch has read the variable when it was imported, before the fork.
    if detail:
        dist.set_debug_level(dist.DebugLevel.DETAIL)
    torch.set_num_threads(1)
    returned = False
    try:
        pickled = pickle.dumps((True, function(*args)))
        returned = True
    except BaseException:
        pickled = pickle.dumps((False, traceback.format_exc()))
    temporary = Path(folder, f"{rank}.tmp")
    temporary.write_bytes(pickled)
    temporary.rename(Path(folder, str(rank)))
    if dist.is_initialized() and returned:
        if rank == 0:
            _stay_for_the_others(Path(folder), world)
        dist.destroy_process_group()
    os._exit(0 if returned else 1)


def _share_processors(rank: int, world: int) -> None:
    """Keep a rank's threads together: gloo's spin while another of them holds a lock and waits for a processor."""
    if world > 1:
        processors = sorted(os.sched_getaffinity(0))
        count = len(processors)
        os.sched_setaffinity(0, processors[rank::world] or [processors[rank % count]])


def _stay_for_the_others(folder: Path, world: int) -> None:
    """Rank 0 has the store, without which a rank that is a moment behind could make no more groups."""
    until = monotonic() + 0.5  # they may wait for this one in vain, which has caught its error
    while monotonic() < until and not all((folder / str(rank)).exists() for rank in range(world)):
        sleep(0.002)
