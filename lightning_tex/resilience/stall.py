"""Whom the others wait for: a rank that does not answer, is in no collective, or is in another one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import NamedTuple

from lightning_tex.parallel.flight_record import TRAINING
from lightning_tex.resilience.where import Entry, Track, Where


class Stalled(NamedTuple):
    """A rank that others wait for, and what it does instead."""

    rank: int
    reason: str


def stalled_ranks(
    answers: Mapping[int, Where | None], states: Mapping[int, str], timed_out: Collection[int] = ()
) -> list[Stalled]:
    """The ranks that a stall comes from; none where that cannot be told.

    Args:
        answers: where each rank is; ``None``: it has not said.
        states: of the processes that have not said, where this host sees them.
        timed_out: ranks that have waited in vain, perhaps in a collective of the user's own.
    """
    silent = [rank for rank, where in answers.items() if where is None]
    if silent:
        return [Stalled(rank, _silence(states.get(rank, ""))) for rank in silent]
    known = {rank: where for rank, where in answers.items() if where is not None}
    names = {track.name for where in known.values() for track in where.waiting}
    names |= {TRAINING.name} if timed_out else set()
    for name in sorted(names, reverse=True):  # training before saving
        tracks = {rank: track for rank, where in known.items() if (track := where.track(name)) is not None}
        absent = set(known) - set(tracks)
        stalled = (
            _in_other_collectives(tracks, known)
            or [Stalled(rank, f"has not begun any collective of {name}") for rank in sorted(absent)]
            or _in_none({rank: track for rank, track in tracks.items() if rank not in timed_out})
            or _behind(tracks)
        )
        if stalled:
            return stalled
    return []


def different_collectives(answers: Mapping[int, Where | None]) -> list[Stalled]:
    """Of the ranks that have answered, those whose collectives are not the others'."""
    known = {rank: where for rank, where in answers.items() if where is not None}
    tracks = {rank: track for rank, where in known.items() for track in where.tracks[:1]}
    return _in_other_collectives(tracks, known)


def _silence(state: str) -> str:
    return "does not answer" + (f": its process is {state}" if state else "")


def _in_none(tracks: Mapping[int, Track]) -> list[Stalled]:
    """Ranks that compute, or wait for something else, while others wait for them."""
    outside = {rank: track for rank, track in tracks.items() if track.waits_for is None}
    return [
        Stalled(rank, f"is in no collective for {track.seconds:.1f} s; its last was {track.calls[-1]}")
        for rank, track in outside.items()
        if track.calls
    ]


def _in_other_collectives(tracks: Mapping[int, Track], known: Mapping[int, Where]) -> list[Stalled]:
    """Ranks whose collective of some number is not the one that their group, or most ranks, had under it."""
    calls = {rank: {entry.number: entry for entry in track.calls} for rank, track in tracks.items()}
    common = set.intersection(*(set(numbers) for numbers in calls.values())) if calls else set()
    for number in sorted(common):
        entries = {rank: numbers[number] for rank, numbers in calls.items()}
        kinds = Counter((entry.operation, entry.axis) for entry in entries.values())
        if len(kinds) > 1:
            usual, count = kinds.most_common(1)[0]
            odd = [rank for rank, entry in entries.items() if (entry.operation, entry.axis) != usual]
            if 2 * count == len(entries):  # nobody can tell which half is right
                odd = list(entries)
            return [Stalled(rank, _instead(rank, number, calls, odd)) for rank in odd]
        for group in _groups(entries, known):
            members = {rank: entries[rank] for rank in group if rank in entries}
            signatures = Counter(entry.signature for entry in members.values())
            if len(signatures) > 1:
                usual_signature, count = signatures.most_common(1)[0]
                odd = [rank for rank, entry in members.items() if entry.signature != usual_signature]
                if 2 * count == len(members):
                    odd = list(members)
                others = {str(entry) for rank, entry in members.items() if rank not in odd}
                beside = f" where others are in {others.pop()}" if others else ""
                return [Stalled(rank, f"is in {members[rank]}{beside}") for rank in odd]
    return []


def _groups(entries: Mapping[int, Entry], known: Mapping[int, Where]) -> set[tuple[int, ...]]:
    return {tuple(known[rank].groups.get(entry.axis) or known) for rank, entry in entries.items()}


def _instead(rank: int, number: int, calls: Mapping[int, Mapping[int, Entry]], odd: list[int]) -> str:
    """What a rank does under a number, and whether it has left one out."""
    entry = calls[rank][number]
    others = [calls[other] for other in calls if other not in odd] or [calls[o] for o in calls if o != rank]
    usual = others[0][number]
    following = others[0].get(number + 1)
    if following is not None and (following.operation, following.axis) == (entry.operation, entry.axis):
        return f"has left out {usual} and is in {entry}"
    return f"is in {entry} where others are in {usual}"


def _behind(tracks: Mapping[int, Track]) -> list[Stalled]:
    """Where all wait: the ranks that have begun fewest collectives, unless all have begun the same number."""
    begun = {rank: track.calls[-1].number for rank, track in tracks.items() if track.calls}
    least = min(begun.values(), default=0)
    if all(number == least for number in begun.values()):
        return []
    return [
        Stalled(rank, f"has begun {number} collectives, others {max(begun.values())}")
        for rank, number in begun.items()
        if number == least
    ]


def table(answers: Mapping[int, Where | None], hosts: Mapping[int, str], stalled: list[Stalled]) -> str:
    """Every rank's step and last collective; above 64 ranks, of those stalled and their like."""
    marked = {rank for rank, _ in stalled}
    rows = [("", "rank", "host", "step", "last collective", "since", "")]
    shown = sorted(answers, key=lambda rank: (rank not in marked, rank))[:64]
    for rank in sorted(shown):
        where = answers[rank]
        mark = "->" if rank in marked else ""
        track = where.waiting[0] if where and where.waiting else (where.tracks[0] if where and where.tracks else None)
        if where is None or track is None:
            rows.append((mark, str(rank), hosts.get(rank, ""), str(where.step) if where else "?", "?", "", ""))
            continue
        entry = track.waits_for or (track.calls[-1] if track.calls else None)
        doing = "waits" if track.waits_for else "has returned"
        row = (mark, str(rank), hosts.get(rank, ""), str(where.step), str(entry), f"{track.seconds:.1f} s", doing)
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if len(answers) > len(shown):
        lines.append(f"and {len(answers) - len(shown)} more ranks")
    return "\n".join(lines)
