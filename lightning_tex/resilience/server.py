"""The monitor's side of rank 0: hears every rank, finds out who failed first or whom the others wait for, tells all."""

from __future__ import annotations

import hmac
import selectors
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from time import monotonic, sleep

from lightning_tex.parallel.flight_record import TRAINING
from lightning_tex.resilience.processes import ProcessId, say
from lightning_tex.resilience.stall import different_collectives, stalled_ranks, table
from lightning_tex.resilience.verdict import Deliberation, Report, Verdict
from lightning_tex.resilience.where import Where
from lightning_tex.resilience.wire import Lines, Message, keep_from_children, listener

# Seconds that a rank has to say where it is, and one to print its error before the others hear of it.
_ANSWER_S, _PRINT_S = 1.0, 1.0

_MISMATCH = (
    "A process that gloo ends itself has received another size than it expects: look for ranks that call "
    "collectives of different shapes. Where the others are:"
)

ChildEnding = Callable[[int], str]  # how the process of that number ended, "" where that is not known


class _Peer:
    """A rank that has connected."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines
        self.rank = -1
        self.process = ProcessId("", 0, 0)
        self.run, self.in_run, self.done = 0, False, False
        self.gone = False
        self.ending = ""


class _Case:
    """A run that ends, or may."""

    def __init__(self, world: int) -> None:
        self.deliberation = Deliberation(world)
        self.asked_until: float | None = None
        self.answers: dict[int, Where | None] = {}
        self.verdict: Verdict | None = None
        self.untold_until: float | None = None


class MonitorServer(threading.Thread):
    """One thread for all ranks. Not started: it listens and hears nothing.

    Args:
        world: ranks.
        address: to listen at; any free port.
        one_host: whether all ranks are on this host.
        token: what ranks prove themselves by.
        child_ending: of processes that this one has started.
    """

    def __init__(self, world: int, address: str, one_host: bool, token: str, child_ending: ChildEnding) -> None:
        super().__init__(name="lightning_tex monitor of all ranks", daemon=True)
        self._world, self._token, self._child_ending = world, token, child_ending
        self._listener = listener(address, one_host)
        keep_from_children(self._listener)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._peers: dict[int, _Peer] = {}
        self._strangers: set[_Peer] = set()
        self._cases: dict[int, _Case] = {}

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, port = self._listener.getsockname()[:2]
        return host, port

    def run(self) -> None:
        while True:
            for key, _ in self._selector.select(self._until_next()):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._hear(key.data)
            now = monotonic()
            for run, case in list(self._cases.items()):
                self._proceed(run, case, now)

    def _until_next(self) -> float | None:
        dues = [due for case in self._cases.values() if (due := _due(case)) < float("inf")]
        return max(0.0, min(dues) - monotonic()) if dues else None

    # --- what ranks say

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # no file descriptors are left
            sleep(0.1)
            return
        connection.settimeout(1.0)  # a rank that does not read must not keep the others waiting
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer = _Peer(Lines(connection))
        self._strangers.add(peer)
        self._selector.register(connection, selectors.EVENT_READ, peer)

    def _hear(self, peer: _Peer) -> None:
        try:
            for message in peer.lines.receive():
                if peer.rank < 0:
                    self._admit(peer, message)
                else:
                    self._understand(peer, message)
        except (EOFError, KeyError, TypeError, ValueError):
            self._lose(peer)

    def _admit(self, peer: _Peer, message: Message) -> None:
        if not hmac.compare_digest(str(message.get("token")), self._token):
            raise EOFError
        peer.rank, peer.process = int(message["rank"]), ProcessId(*message["process"])
        self._strangers.discard(peer)
        self._peers[peer.rank] = peer
        peer.lines.send({"welcome": ProcessId.current()})

    def _understand(self, peer: _Peer, message: Message) -> None:
        kind, content = next(iter(message.items()))
        now = monotonic()
        if kind == "enter":
            peer.run, peer.in_run, peer.done = int(content), True, False
            for other in self._peers.values():
                self._require_present(other, now)
        elif kind == "done":
            peer.done = True
            if all(other.done and other.run == peer.run for other in self._peers.values()):
                self._tell(peer.run, {"all_done": True}, besides=(0,))
                self._peers[0].lines.send({"all_done": True})  # last: with its process this thread ends
        elif kind == "leave":
            peer.in_run = False
            if peer.rank == 0:
                self._tell_all({"left": peer.run})
        elif kind == "report":
            case = self._case(peer.run)
            if case.verdict is not None:
                peer.lines.send({"verdict": case.verdict.to_message()})
            case.deliberation.add(Report(**content), now)
        elif kind == "stalled":
            case = self._case(peer.run)
            if case.verdict is None and case.asked_until is None:
                self._ask(peer.run, case, now)
        elif kind == "where":
            case = self._case(peer.run)
            case.answers[peer.rank] = Where.from_message(content)
        elif kind == "told":
            self._case(peer.run).untold_until = now

    def _lose(self, peer: _Peer) -> None:
        with suppress(KeyError, ValueError):
            self._selector.unregister(peer.lines.connection)
        peer.lines.close()
        self._strangers.discard(peer)
        peer.gone = True
        if peer.rank >= 0:
            if peer.in_run:
                peer.ending = peer.process.ending()
            self._require_present(peer, monotonic())

    def _require_present(self, peer: _Peer, now: float) -> None:
        """A rank that is gone while it, or another one, is in a run that it has not left, has died."""
        if not peer.gone:
            return
        begun = max((other.run for other in self._peers.values() if other.in_run and not other.gone), default=0)
        if peer.in_run or begun > peer.run:
            run = max(begun, peer.run)
            self._case(run).deliberation.add(Report(peer.rank, "death", ""), now)

    def _case(self, run: int) -> _Case:
        return self._cases.setdefault(run, _Case(self._world))

    # --- what is made of it

    def _ask(self, run: int, case: _Case, now: float) -> None:
        """Ask all ranks of a run where they are."""
        case.asked_until = now + _ANSWER_S
        case.answers = dict.fromkeys(
            rank for rank, peer in self._peers.items() if peer.run == run and peer.in_run and not peer.gone
        )
        self._tell(run, {"ask": True})

    def _proceed(self, run: int, case: _Case, now: float) -> None:
        if case.verdict is not None:
            if case.untold_until is not None and now >= case.untold_until:
                case.untold_until = None
                self._tell(run, {"verdict": case.verdict.to_message()}, besides=case.verdict.ranks)
                for rank in case.verdict.ranks:
                    self._peers[rank].lines.send({"heard": True})
        elif case.asked_until is not None:
            if now >= case.asked_until or None not in case.answers.values():
                self._judge_answers(run, case)
        elif now >= case.deliberation.due:
            of_all, cause = case.deliberation.of_all(), case.deliberation.cause
            if of_all is not None:
                self._pronounce(run, case, of_all)
            elif cause is not None and cause.kind == "error":
                self._judge_error(run, case, cause)
            else:
                self._ask(run, case, now)

    def _judge_error(self, run: int, case: _Case, report: Report) -> None:
        text = f"{self._named(report.rank, report.step)} failed first: {report.text}"
        self._pronounce(run, case, Verdict("error", (report.rank,), text, self._speaker(report.rank)))

    def _judge_death(self, run: int, case: _Case, rank: int) -> None:
        process = self._peers[rank].process
        how = self._child_ending(process.pid) or self._peers[rank].ending
        text = f"rank {rank} ({process.host}, process {process.pid}, step {TRAINING.step}) {how or 'died'}"
        different = different_collectives(case.answers)
        if "SIGABRT" in how or different:
            say(f"[rank 0] {text}\n{_MISMATCH}\n{table(case.answers, self._hosts(), different)}")
            text += "".join(f"; {self._named(rank)} {reason}" for rank, reason in different)
        self._pronounce(run, case, Verdict("death", (rank,), text, self._speaker(rank)))

    def _judge_answers(self, run: int, case: _Case) -> None:
        """All have said where they are, or had time to."""
        cause, first = case.deliberation.cause, case.deliberation.first
        if cause is not None:
            if cause.kind == "death":
                self._judge_death(run, case, cause.rank)
            else:
                self._judge_error(run, case, cause)
            return
        silent = [self._peers[rank] for rank, where in case.answers.items() if where is None]
        stalled = stalled_ranks(
            case.answers, {peer.rank: peer.process.state() for peer in silent}, case.deliberation.reported
        )
        if not stalled and first is not None:  # all are alive and together, so its error is what there is to say
            self._judge_error(run, case, first)
            return
        named = "; ".join(f"{self._named(rank)} {reason}" for rank, reason in stalled[:8])
        text = f"the run stands still: {named or 'all ranks wait, in the same collectives'}"
        say(f"[rank 0] {text}\n{table(case.answers, self._hosts(), stalled)}")
        ranks = tuple(rank for rank, _ in stalled)
        doomed = tuple(peer.process for peer in silent)
        self._pronounce(run, case, Verdict("stall", ranks, text, self._speaker(*ranks), doomed))

    def _speaker(self, *besides: int) -> int:
        return min((rank for rank, peer in self._peers.items() if not peer.gone and rank not in besides), default=0)

    def _named(self, rank: int, step: int | None = None) -> str:
        return f"rank {rank} ({self._peers[rank].process.host}{'' if step is None else f', step {step}'})"

    def _hosts(self) -> dict[int, str]:
        return {rank: peer.process.host for rank, peer in self._peers.items()}

    def _pronounce(self, run: int, case: _Case, verdict: Verdict) -> None:
        """Tell the run's ranks; one whose error it is first, so that it is the first to print."""
        case.verdict = verdict
        if not verdict.ends_others:  # what they do about it, together, may fail on one of them
            self._cases[run] = _Case(self._world)
        if verdict.kind != "error":
            self._tell(run, {"verdict": verdict.to_message()})
            return
        case.untold_until = monotonic() + _PRINT_S
        for rank in verdict.ranks:
            self._peers[rank].lines.send({"verdict": verdict.to_message()})

    def _tell(self, run: int, message: Message, besides: tuple[int, ...] = ()) -> None:
        for rank, peer in self._peers.items():
            if peer.run == run and peer.in_run and not peer.gone and rank not in besides:
                peer.lines.send(message)

    def _tell_all(self, message: Message) -> None:
        for peer in self._peers.values():
            if not peer.gone:
                peer.lines.send(message)


def _due(case: _Case) -> float:
    if case.verdict is not None:
        return case.untold_until if case.untold_until is not None else float("inf")
    return case.asked_until if case.asked_until is not None else case.deliberation.due
