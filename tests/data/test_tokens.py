"""Tokens on disk: read at any place, written by any number of processes, and gone on with after a kill."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_tex.data.tokens import Tokens
from lightning_tex.data.tokens.progress import progress_line
from lightning_tex.data.tokens.store import list_shards, open_shards, shard_path, token_dtype, write_shard
from lightning_tex.data.tokens.together import Job, build_together
from lightning_tex.data.tokens.writing import Encoded, write_tokens
from lightning_tex.errors import UserRuntimeError, UserValueError

documents = st.lists(st.lists(st.integers(0, 65_535), max_size=9), max_size=6)


def stored(folder: Path, shards: list[list[list[int]]]) -> Tokens:
    for number, texts in enumerate(shards):
        tokens = np.array([t for text in texts for t in text], token_dtype(65_536))
        mask = (tokens % 3 > 0).astype(np.uint8)
        write_shard(shard_path(folder, number), tokens, np.array([len(text) for text in texts], np.int64), mask, {})
    list_shards(folder, len(shards))
    return open_shards(folder, "")


@given(shards=st.lists(documents, max_size=4), data=st.data())
def test_a_stream_in_shards_against_a_list(tmp_path_factory: Any, shards: list[list[list[int]]], data: Any) -> None:
    stream = stored(tmp_path_factory.mktemp("shards"), shards)
    plain = [t for texts in shards for text in texts for t in text]
    assert len(stream) == len(plain)
    assert stream.documents == sum(map(len, shards))
    lengths = [len(text) for texts in shards for text in texts]
    assert stream.ends().tolist() == np.cumsum(lengths).tolist()
    start = data.draw(st.integers(0, len(plain)))
    stop = data.draw(st.integers(start, len(plain)))
    assert stream.read(start, stop).tolist() == plain[start:stop]
    assert stream.trained(start, stop).tolist() == [int(t % 3 > 0) for t in plain[start:stop]]


def test_a_part_of_one_file_is_no_copy_and_no_worker_gets_one(tmp_path: Path) -> None:
    stream = stored(tmp_path, [[[1, 2, 3], [4]], [[5]]])
    assert np.shares_memory(stream.read(1, 3), stream.files[0].data)
    assert b"memmap" not in pickle.dumps(stream)
    assert pickle.loads(pickle.dumps(stream)).read(2, 5).tolist() == [3, 4, 5]


def test_no_more_files_are_open_than_a_process_may_have(tmp_path: Path) -> None:
    stream = stored(tmp_path, [[[n % 50, n % 40]] for n in range(300)])
    before = len(os.listdir("/proc/self/fd"))
    assert [int(stream.read(2 * n, 2 * n + 1)[0]) for n in range(300)] == [n % 50 for n in range(300)]
    assert len(os.listdir("/proc/self/fd")) - before <= 128
    assert stream.read(0, 600).tolist() == [t for n in range(300) for t in (n % 50, n % 40)]


def test_vocabularies_of_more_than_two_bytes() -> None:
    assert [token_dtype(size).itemsize for size in (65_536, 65_537)] == [2, 4]


# --- processes


def jobs_that(work: Callable[[int], None], count: int = 12) -> list[Job]:
    """Each leaves a file that says how often it was done."""

    def do(number: int, mark: Path, told: Any) -> None:
        work(number)
        with mark.with_suffix(".times").open("a") as file:
            file.write("x")
        mark.write_text("")
        told(1, 1)

    return [
        Job(Path("part", f"{n}.json"), lambda mark, told, n=n: do(n, mark, told), 1)  # type: ignore[misc]
        for n in range(count)
    ]


def times(folder: Path) -> list[str]:
    return [file.read_text() for file in sorted((folder / "part").glob("*.times"))]


def finished(folder: Path) -> None:
    (folder / "whole").write_text("")


@pytest.mark.parametrize("processes", [1, 3])
def test_jobs_are_done_once_and_the_folder_is_whole(tmp_path: Path, processes: int) -> None:
    heard: list[int] = []
    jobs = jobs_that(lambda _: None)
    folder = build_together(tmp_path / "made", jobs, finished, processes, lambda tokens, _: heard.append(tokens))
    assert times(folder) == ["x"] * 12 and (folder / "whole").exists()
    assert len(heard) == 12
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert not list(folder.rglob("*.lock"))


def forked(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def test_runs_that_begin_at_once_share_the_work(tmp_path: Path) -> None:
    def run() -> None:
        build_together(tmp_path / "made", jobs_that(lambda _: time.sleep(0.02)), finished, 2)

    others = [forked(run) for _ in range(2)]
    run()
    for pid in others:
        os.waitpid(pid, 0)
    assert times(tmp_path / "made") == ["x"] * 12
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_run_that_was_killed_is_gone_on_with(tmp_path: Path) -> None:
    """Nothing that was done is done again, and what the dead had begun is."""

    def stuck(number: int) -> None:
        if number == 7:
            (tmp_path / "stuck").write_text(str(os.getpid()))
            time.sleep(60)

    pid = forked(lambda: build_together(tmp_path / "made", jobs_that(stuck), finished, 2) and None)
    draft = tmp_path / ".made"
    while not (tmp_path / "stuck").exists() or len(list(draft.rglob("*.times"))) < 11:
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.kill(int((tmp_path / "stuck").read_text()), signal.SIGKILL)
    build_together(tmp_path / "made", jobs_that(lambda _: None), finished, 1)
    assert times(tmp_path / "made") == ["x"] * 12


def test_what_a_process_refuses_ends_all(tmp_path: Path) -> None:
    def refuse(number: int) -> None:
        if number == 3:
            raise UserValueError("row 3 is bad")
        time.sleep(0.05)

    with pytest.raises(UserValueError, match="row 3 is bad"):
        build_together(tmp_path / "made", jobs_that(refuse), finished, 2)
    assert not (tmp_path / "made").exists()


def test_a_process_that_dies_is_told_of(tmp_path: Path) -> None:
    def die(number: int) -> None:
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(UserRuntimeError, match=r"has ended by SIGKILL.*num_proc.*it goes on"):
        build_together(tmp_path / "made", jobs_that(die), finished, 2)


def test_processes_end_with_the_one_that_forked_them(tmp_path: Path) -> None:
    def slow(number: int) -> None:
        (tmp_path / f"pid-{os.getpid()}").write_text("")
        time.sleep(0.1)

    pid = forked(lambda: build_together(tmp_path / "made", jobs_that(slow, 100), finished, 2) and None)
    while len(list(tmp_path.glob("pid-*"))) < 2:
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    workers = [int(file.name.removeprefix("pid-")) for file in tmp_path.glob("pid-*")]
    until = time.monotonic() + 20
    while any(Path("/proc", str(worker)).exists() for worker in workers) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(Path("/proc", str(worker)).exists() for worker in workers)


class Numbers:
    """A row n is a document of n % 5 tokens n."""

    size = 100_000_000  # as if they were so many bytes, for 25 jobs

    def __len__(self) -> int:
        return 1000

    def read(self, start: int, stop: int) -> list[int]:
        return list(range(start, stop))


class Repeated:
    dtype = token_dtype(1000)

    def encode(self, rows: list[int], first: int) -> Encoded:
        assert rows[0] == first
        return Encoded([np.full(n % 5, n, self.dtype) for n in rows])


def test_tokens_do_not_depend_on_who_writes_them(tmp_path: Path) -> None:
    alone = write_tokens(tmp_path / "one", {"train": Numbers()}, Repeated(), 1)
    many = write_tokens(tmp_path / "three", {"train": Numbers()}, Repeated(), 3)
    files = [{file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.*")} for folder in (alone, many)]
    assert files[0] == files[1] and len(files[0]) == 3 * 25 + 1
    stream = open_shards(alone / "train", "")
    assert stream.read(0, len(stream)).tolist() == [n for n in range(1000) for _ in range(n % 5)]


def test_a_line_of_progress() -> None:
    line = progress_line(250, 1000, 3_000_000, 10.0)
    assert line == "Preparing data: 250 of 1,000 rows (25 %), 3.0 M tokens, 300,000 tokens/s, 0:30 min left"
    assert "2:30 h left" in progress_line(1, 1000, 1, 9.01)
