"""A rank's side of the monitor: a thread that tells rank 0 how this rank fares, and ends it when another has failed.

There is one for each process group, whichever Trainer runs in it.
"""

from __future__ import annotations

import atexit
import json
import secrets
import select
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from time import monotonic, sleep

import torch.distributed as dist
from torch.distributed import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store

from lightning_tex.parallel.errors import UserRuntimeError
from lightning_tex.parallel.flight_record import EVERY_RANK, RECORDS, TRAINING
from lightning_tex.resilience.nccl import write_flights
from lightning_tex.resilience.processes import ProcessId, end_process, end_process_at_the_latest, on_end, say, stacks
from lightning_tex.resilience.server import ChildEnding, MonitorServer
from lightning_tex.resilience.verdict import Report, Verdict
from lightning_tex.resilience.where import Entry, Where
from lightning_tex.resilience.wire import Lines, Message, connected

# Seconds: for a rank that others have left to end by itself; for hooks after an error of its own; for rank 0 to answer
# one that stands still, and one that has raised.
FOLLOWER_S, HOOKS_S, ANSWER_S, JUDGEMENT_S = 2.0, 20.0, 1.2, 4.0
# Seconds that the end of what this process has started may take.
REAP_S = 2.0


class Monitor(threading.Thread):
    """This rank's connection to the monitor.

    Args:
        lines: the connection.
        rank: this rank.

    Attributes:
        timeout_s: after which a collective that has not returned is a stall.
        device_waits: whether the device has work that does not end.
        advice: what to do about a run that has ended by an error.
    """

    def __init__(self, lines: Lines, rank: int) -> None:
        super().__init__(name="lightning_tex monitor", daemon=True)
        self._lines, self._rank = lines, rank
        self._group = dist.group.WORLD
        self.timeout_s = timedelta(minutes=30).total_seconds()
        self.device_waits: Callable[[], bool] = lambda: False
        self.advice: Callable[[], str] = lambda: ""
        self._first_process = ProcessId("", 0, 0)
        self._run, self._depth, self._first_has_left = 0, 0, 0
        self._verdict: Verdict | None = None
        self._told, self._heard, self._all_done = threading.Event(), threading.Event(), threading.Event()
        self._stalled_at: float | None = None
        self._first_state = ""
        self._end_at: float | None = None

    # --- called by the thread that trains

    def serves(self, group: object) -> bool:
        """Whether it belongs to this process group, and its other end is there."""
        return self._group is group and self.is_alive()

    def enter(self) -> None:
        """A run begins on this rank."""
        self._depth += 1
        if self._depth == 1:
            self._run += 1
            self._verdict = None
            self._told.clear()
            self._heard.clear()
            self._all_done.clear()
            self._lines.send({"enter": self._run})

    def wait_for_all(self) -> None:
        """The run is done on this rank: wait until it is on all of them, as in a collective.

        Raises:
            RuntimeError: one has failed meanwhile.
        """
        if self._depth > 1:
            return
        self._lines.send({"done": self._run})
        with TRAINING.inside("the end of the run", EVERY_RANK):
            while self.is_alive() and not self._all_done.wait(0.1):
                if self._ends:
                    raise UserRuntimeError("another rank has gone")

    def leave(self) -> None:
        """The run has ended on this rank, and nobody has to wait for it any more."""
        self._depth -= 1
        if self._depth == 0:
            self._lines.send({"leave": self._run})

    @property
    def nested(self) -> bool:
        """Whether the run that ends is inside another one."""
        return self._depth > 1

    def report(self, report: Report) -> Verdict | None:
        """Tell what has ended this rank, and wait a moment for who is to blame; ``None``: rank 0 is not there."""
        self._lines.send({"report": asdict(report)})
        self._told.wait(JUDGEMENT_S)
        return self._verdict

    def printed(self) -> None:
        """What ended this rank has been printed: wait until the others have been told, lest rank 0 ends before."""
        self._lines.send({"told": True})
        self._heard.wait(JUDGEMENT_S)
        if self._rank == 0:
            sleep(0.2)  # a connection that closes with something unread loses what was sent

    # --- the thread

    def run(self) -> None:
        with suppress(EOFError):
            while True:
                readable, _, _ = select.select([self._lines.connection], [], [], self._until_next())
                if readable:
                    for message in self._lines.receive():
                        self._understand(message)
                self._watch(monotonic())
        self._lost()

    def _until_next(self) -> float:
        """Seconds until something may be due: a fifth of the timeout at most, so that a stall is seen in time."""
        tick = min(1.0, self.timeout_s / 5)
        return tick if self._end_at is None else max(0.0, min(tick, self._end_at - monotonic()))

    def _understand(self, message: Message) -> None:
        self._stalled_at = None
        if "welcome" in message:
            self._first_process = ProcessId(*message["welcome"])
        elif "ask" in message:
            self._lines.send({"where": Where.now(self.device_waits).to_message()})
        elif "all_done" in message:
            self._all_done.set()
        elif "heard" in message:
            self._heard.set()
        elif "left" in message:
            self._first_has_left = int(message["left"])
        elif "verdict" in message:
            self._heed(Verdict.from_message(message["verdict"]))

    def _watch(self, now: float) -> None:
        if self._end_at is not None:
            if now >= self._end_at:
                end_process()
        elif self._stalled_at is not None:
            if now > self._stalled_at + ANSWER_S:
                self._give_up_first()
        elif not self._ends and self._depth and self._waits_too_long(now):
            self._stalled_at, self._first_state = now, self._first_process.state()
            self._lines.send({"stalled": True})

    def _waits_too_long(self, now: float) -> bool:
        late = [record for record in RECORDS if record.number and now - record.since > self.timeout_s]
        return any(record.waits_in is not None or (record is TRAINING and self.device_waits()) for record in late)

    def _heed(self, verdict: Verdict) -> None:
        if self._ends or not self._depth:
            return
        self._verdict = verdict
        if not verdict.ends_others:
            self._told.set()
            return
        blamed = self._rank in verdict.ranks
        if verdict.kind == "stall":
            write_flights(self._rank)
        if verdict.kind == "stall" and blamed:
            say(f"[rank {self._rank}] is what the others wait for; its threads:\n{stacks()}")
        elif not blamed:
            say(f"[rank {self._rank}] ended: {verdict.text}")
        for process in verdict.doomed:
            process.kill()
        own_error = verdict.kind == "error" and blamed
        # Rank 0 tells the others, and may have started them.
        seconds = HOOKS_S if own_error else FOLLOWER_S + 0.5 * (self._rank == 0)
        self._end_at = monotonic() + seconds
        end_process_at_the_latest(seconds + REAP_S)
        if verdict.kind != "error" and self._rank == verdict.speaker and (advice := self.advice()):
            say(advice)
        self._told.set()

    @property
    def _ends(self) -> bool:
        return self._verdict is not None and self._verdict.ends_others

    def _give_up_first(self) -> None:
        """Rank 0 does not answer."""
        state = self._first_state
        text = (
            f"the run stands still: rank 0 ({self._first_process.host}) does not answer"
            + (f": its process is {state}" if state else "")
            + _waiting_here()
        )
        atexit.register(self._first_process.kill)  # an error of this rank's own may end it meanwhile
        on_end(self._first_process.kill)
        self._heed(Verdict("stall", (0,), text, 1))
        sleep(0.5)  # the other ranks, too, are to see that it is there
        self._first_process.kill()

    def _lost(self) -> None:
        """Rank 0's process is gone."""
        if not self._ends and self._depth and self._first_has_left < self._run:
            process = self._first_process
            how = process.ending() or "died"
            text = f"rank 0 ({process.host}, process {process.pid}, step {TRAINING.step}) {how}{_waiting_here()}"
            self._heed(Verdict("death", (0,), text, 1))
        while self._end_at is not None:
            sleep(max(0.0, self._end_at - monotonic()))
            self._watch(monotonic())


def _waiting_here() -> str:
    call = TRAINING.waiting_for
    return f"; this rank waits in {Entry.of(call)}" if call else ""


_monitor: Monitor | None = None
_joined = 0  # process groups so far


def current_monitor() -> Monitor | None:
    """The monitor of this process, if it is one of several that have found each other."""
    return _monitor if _monitor is not None and _monitor.serves(dist.group.WORLD) else None


def join_monitor(address: str, one_host: bool, child_ending: ChildEnding) -> Monitor | None:
    """Connect this rank, once for each process group.

    Called by all ranks; the server's place and token travel through the process group's store. ``None`` in a world of
    one process, or of pretended ones, and where rank 0's host cannot be reached: training goes on without.

    Args:
        address: of rank 0's host.
        one_host: whether all ranks are there.
        child_ending: on rank 0, how a process that it has started has ended.
    """
    global _monitor, _joined
    world, rank = dist.get_world_size(), dist.get_rank()
    if world == 1 or dist.get_backend() == "fake":
        return None
    if (monitor := current_monitor()) is not None:
        return monitor
    _joined += 1
    store = PrefixStore(f"lightning_tex/monitor/{_joined}", _get_default_store())
    if rank == 0:
        token = secrets.token_hex(16)
        server = MonitorServer(world, address, one_host, token, child_ending)
        server.start()
        store.set("address", json.dumps({"port": server.address[1], "token": token}))
    place = json.loads(store.get("address"))
    try:
        lines = connected(address, place["port"])
    except OSError as error:
        say(f"[rank {rank}] cannot reach {address}:{place['port']}, so failures of this rank will not be told: {error}")
        return None
    lines.send({"token": place["token"], "rank": rank, "process": ProcessId.current()})
    _monitor = Monitor(lines, rank)
    _monitor.start()
    return _monitor
