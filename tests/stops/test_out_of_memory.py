"""Out of memory on one rank, raised by whatever allocator, is a named error on all ranks within seconds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers.stopped_runs import fit
from helpers.stops import run_to_its_end

from lightning_tex.strategy.out_of_memory import DeviceOutOfMemory, OutOfMemory, is_out_of_memory


def test_one_rank_says_what_took_the_memory_and_the_others_follow(tmp_path: Path) -> None:
    incident = {"deed": "MemoryError", "rank": 3, "point": "backward"}
    ending = run_to_its_end(4, lambda: fit(incident), folder=tmp_path, launcher="own", within=40)
    assert ending.took_less_than(5) and 0 not in ending.codes.values(), ending
    assert ending.lines[0].startswith("[rank 3] failed ("), ending.text
    for words in (
        r"OutOfMemory: out of memory on rank 3 after step 2, in the backward: no room for \[4, 4\]",
        r"\n  planned: about \S+ \wiB on each rank of 4 ranks = tensor 2 x data 2.*parameters",
        r"\n  arrived: \d+ rows at this rank's experts of \S+, \d\.\d\d times the mean over ranks",
        r"\n  Legal: smaller micro-batches",
    ):
        assert re.search(words, ending.text), ending.text
    followers = [line for line in ending.lines if "] ended: rank 3 (" in line]
    assert len(followers) == 3
    assert all("failed first: OutOfMemory: out of memory on rank 3 after step 2" in line for line in followers)


def test_allocators_errors_stay_what_they_were() -> None:
    assert issubclass(OutOfMemory, (MemoryError, RuntimeError))
    assert issubclass(DeviceOutOfMemory, torch.OutOfMemoryError)
    assert str(DeviceOutOfMemory("text")) == "text"
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value) and not is_out_of_memory(RuntimeError("shapes"))
