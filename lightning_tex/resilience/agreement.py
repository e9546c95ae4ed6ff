"""Ranks compare what they must have alike, and all of them hear which rank has what else.

Through torch's store and not by a collective: where ranks differ, their process groups may, too, or not exist yet.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lightning_tex.parallel.errors import UserRuntimeError
from lightning_tex.parallel.hashing import stable_hash
from lightning_tex.resilience.facts import Facts

_MOST_DIFFERENCES = 8
# Ranks whose values are read where their digests differ; those of further ones are not looked at.
_MOST_READ = 64
_LONGEST_VALUE = 80
# Seconds between two looks for a key, growing. A blocking wait would serve no signal, and keep other threads from the
# store; cut into slices, torch warns of each.
_FIRST_LOOK, _LAST_LOOK = 0.0005, 0.2
# Seconds that the others wait longer than the first rank, which tells them who has not come.
_GRACE = 5.0
_SAME_SCRIPT = "Every rank must run the same script, call the same methods of its Trainer and log the same names"


@dataclass(frozen=True)
class Comparison:
    """What is compared on one occasion.

    Args:
        occasion: when; ranks that are elsewhere at the same time are named by it.
        required: what ranks must have alike, by name.
        complaint: how the error begins where they do not.
        remedy: how it ends.
        advised: what they had better have alike; a difference is told and no error.
    """

    occasion: str
    required: Facts
    complaint: str
    remedy: str
    advised: Facts


@dataclass
class _Verdict:
    """What the first rank lets all know.

    Args:
        readers: ranks that will read it.
        groups: ranks by their digests, where those differ: the first rank of each tells its values.
        error: what all raise.
        advice: what all return.
    """

    readers: int
    groups: list[list[int]] = field(default_factory=list)
    error: str | None = None
    advice: str | None = None

    def to_json(self) -> str:
        return json.dumps(vars(self))

    def judge(self, comparison: Comparison, told: list[tuple[list[int], dict[str, Any]]]) -> None:
        """Find the error, or the advice, in what one rank of each group has told."""
        places = [(ranks, values["occasion"]) for ranks, values in told]
        required = _differences([(ranks, values["required"]) for ranks, values in told])
        if len({place for _, place in places}) > 1:
            self.error = f"ranks are not in the same place: {_difference('it', places)}. {_SAME_SCRIPT}"
        elif required:
            self.error = f"{comparison.complaint}: {required}. {comparison.remedy}"
        else:
            self.advice = _differences([(ranks, values["advised"]) for ranks, values in told])


class Agreement:
    """Comparisons over some ranks, each of which calls :meth:`require` equally often and in the same order.

    A comparison costs every rank a handful of calls of the store, and the first rank one that reads all digests.
    Values travel only where digests differ, and only from one rank of each digest.

    Args:
        store: torch's, which all ranks reach.
        rank: this process's global rank.
        ranks: the global ranks that take part; the first one reads and judges.
        timeout: how long ranks that have not come are waited for.
        name: of the reason to compare; ranks that meet for another reason have another name.
    """

    def __init__(self, store: dist.Store, rank: int, ranks: Sequence[int], timeout: timedelta, name: str) -> None:
        # Arrivals are counted by the number of ranks: runs of one process may have other groups with the same first.
        self._store = dist.PrefixStore(f"lightning_tex/agreement/{name}/{stable_hash(*ranks)}", store)
        self._rank, self._ranks, self._timeout = rank, tuple(ranks), timeout.total_seconds()

    def require(self, comparison: Comparison) -> str | None:
        """Compare; returns what is told of differences in what is only advised, the same on every rank.

        Raises:
            RuntimeError: on every rank: what differs, with the ranks and values; or which ranks have not come.
        """
        if len(self._ranks) == 1:
            return None
        # Everyone has left a comparison before anyone begins the next: arrivals count them, whatever was before.
        turn = (self._store.add("arrivals", 1) - 1) // len(self._ranks)
        deadline = time.monotonic() + self._timeout
        self._store.set(f"{turn}/digest/{self._rank}", _digest(comparison))
        first = self._rank == self._ranks[0]
        if first:
            self._read_digests(turn, comparison, deadline)
        else:
            deadline += _GRACE
        verdict = self._verdict(f"{turn}/verdict", deadline, turn, comparison)
        if verdict.groups:
            if self._rank in [ranks[0] for ranks in verdict.groups]:
                self._store.set(f"{turn}/values/{self._rank}", json.dumps(_values(comparison)))
            if first:
                self._read_values(turn, verdict, comparison, deadline)
            verdict = self._verdict(f"{turn}/differences", deadline, turn, comparison)
        self._leave_together(turn, verdict.readers)
        if verdict.error is not None:
            raise UserRuntimeError(verdict.error)
        return verdict.advice

    # --- what the first rank does

    def _read_digests(self, turn: int, comparison: Comparison, deadline: float) -> None:
        keys = [f"{turn}/digest/{rank}" for rank in self._ranks]
        verdict = _Verdict(readers=len(self._ranks))
        if self._come(keys, deadline):
            groups: dict[bytes, list[int]] = {}
            for rank, digest in zip(self._ranks, self._store.multi_get(keys), strict=True):
                groups.setdefault(digest, []).append(rank)
            if len(groups) > 1:
                verdict.groups = list(groups.values())[:_MOST_READ]
        else:
            self._judge_absent(verdict, turn, comparison)
        self._store.set(f"{turn}/verdict", verdict.to_json())

    def _read_values(self, turn: int, verdict: _Verdict, comparison: Comparison, deadline: float) -> None:
        keys = [f"{turn}/values/{ranks[0]}" for ranks in verdict.groups]
        final = _Verdict(readers=len(self._ranks))
        if self._come(keys, deadline):
            told = [json.loads(text) for text in self._store.multi_get(keys)]
            final.judge(comparison, list(zip(verdict.groups, told, strict=True)))
        else:
            self._judge_absent(final, turn, comparison)
        self._store.set(f"{turn}/differences", final.to_json())

    def _judge_absent(self, verdict: _Verdict, turn: int, comparison: Comparison) -> None:
        absent = self._absent(turn)
        verdict.error, verdict.readers = self._not_come(absent, comparison), len(self._ranks) - len(absent)

    # --- waiting

    def _come(self, keys: list[str], deadline: float) -> bool:
        """Whether all keys are there before the deadline."""
        pause = _FIRST_LOOK
        while not self._store.check(keys):
            if time.monotonic() >= deadline:
                return False
            time.sleep(pause)
            pause = min(2 * pause, _LAST_LOOK)
        return True

    def _verdict(self, key: str, deadline: float, turn: int, comparison: Comparison) -> _Verdict:
        if not self._come([key], deadline):
            raise UserRuntimeError(self._not_come(self._absent(turn), comparison))
        return _Verdict(**json.loads(self._store.get(key)))

    def _absent(self, turn: int) -> list[int]:
        return [rank for rank in self._ranks if not self._store.check([f"{turn}/digest/{rank}"])]

    def _not_come(self, absent: list[int], comparison: Comparison) -> str:
        who = (
            f"{rank_list(absent)} {'has' if len(absent) == 1 else 'have'}"
            if absent
            else f"{rank_list(self._ranks[:1])} has"
        )
        return f"{who} not come to {comparison.occasion} within {self._timeout:g} s, where the other ranks wait"

    def _leave_together(self, turn: int, readers: int) -> None:
        """Let the first rank, whose process may hold the store and end soon, be the last to leave."""
        if self._store.add(f"{turn}/left", 1) == readers:
            self._store.set(f"{turn}/all_left", "")
        if self._rank == self._ranks[0]:
            self._come([f"{turn}/all_left"], time.monotonic() + _GRACE)


def rank_list(ranks: Iterable[int]) -> str:
    """Ranks in words, neighbours as ranges: ``rank 3``, ``ranks 0-2, 4-7``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if sum(map(len, runs)) > 1 else ''} {text}"


def _digest(comparison: Comparison) -> str:
    return str(stable_hash(json.dumps(_values(comparison), sort_keys=True)))


def _values(comparison: Comparison) -> dict[str, Any]:
    return {
        "occasion": comparison.occasion,
        "required": dict(comparison.required),
        "advised": dict(comparison.advised),
    }


def _differences(told: list[tuple[list[int], Mapping[str, str]]]) -> str:
    """What differs, in words: names in the order of the first ranks, a few of them."""
    names = list(dict.fromkeys(name for _, facts in told for name in facts))
    different = [name for name in names if len({facts.get(name) for _, facts in told}) > 1]
    texts = [
        _difference(name, [(ranks, facts.get(name)) for ranks, facts in told]) for name in different[:_MOST_DIFFERENCES]
    ]
    if len(different) > len(texts):
        texts.append(f"and {len(different) - len(texts)} more")
    return "; ".join(texts)


def _difference(name: str, values: list[tuple[list[int], str | None]]) -> str:
    """``tile_size is 7 on rank 3 and None on ranks 0-2``, what the fewest ranks have first."""
    holders: dict[str | None, list[int]] = {}
    for ranks, value in values:
        holders.setdefault(value, []).extend(ranks)
    by_size = sorted(holders.items(), key=lambda held: (len(held[1]), -min(held[1])))
    return f"{name} is " + " and ".join(f"{_shown(value)} on {rank_list(ranks)}" for value, ranks in by_size)


def _shown(value: str | None) -> str:
    if value is None:
        return "not there"
    return value if len(value) <= _LONGEST_VALUE else f"{value[: _LONGEST_VALUE - 2]}.."
