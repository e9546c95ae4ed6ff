"""What allocators are told, and what the user has set."""

from __future__ import annotations

import resource

import pytest
import torch

from lightning_tex.parallel import allocator
from lightning_tex.parallel.allocator import keep_freed_memory, use_growing_segments
from lightning_tex.testing.ranks import run_ranks


def test_segments_grow_unless_the_user_has_set_something() -> None:
    environment: dict[str, str] = {}
    assert use_growing_segments(environment) and environment == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert not use_growing_segments(environment)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_user_has_set_stays(name: str) -> None:
    environment = {name: "max_split_size_mb:128"}
    assert not use_growing_segments(environment) and environment == {name: "max_split_size_mb:128"}


def test_torch_still_takes_the_setting() -> None:
    allocator._SET("expandable_segments:True")
    with pytest.raises(RuntimeError):
        allocator._SET("no such setting")


def faults_of_later_steps(keep: bool) -> int:
    """Pages that five steps take from the system although nine like them have been there before."""
    if keep:
        assert keep_freed_memory({})

    def step() -> None:
        tensors = [torch.ones(mebibytes << 18) for mebibytes in (40, 10, 36, 5)]  # glibc keeps none of more than 32
        del tensors

    for _ in range(9):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_the_host_keeps_what_a_step_has_freed_for_the_next() -> None:
    (without,), (kept,) = (run_ranks(1, faults_of_later_steps, keep) for keep in (False, True))
    assert kept < without / 10, (kept, without)


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_what_the_user_has_set_of_the_hosts_stays(name: str) -> None:
    assert not keep_freed_memory({name: "1"})
