"""What allocators are told, and what the user has set."""

from __future__ import annotations

import ctypes
import os
import resource

import pytest
import torch
from helpers.forked import forked

from lightning_tex.parallel import allocator
from lightning_tex.parallel.allocator import keep_freed_memory, use_growing_segments


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


def faults_of_steps() -> int:
    """Pages that are taken from the system although steps like these have been there before."""
    for step in range(12):
        if step == 4:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(mebibytes << 18) for mebibytes in (33, 5)]  # glibc keeps none of more than 32
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def faults_without_and_with() -> None:
    """In a process of its own, which may have been told to keep memory."""
    for threshold in (allocator._MMAP_THRESHOLD, allocator._TRIM_THRESHOLD):
        assert ctypes.CDLL(None).mallopt(threshold, 128 << 10)  # glibc's own
    without = faults_of_steps()
    assert keep_freed_memory({})
    os.write(1, f"{without} {faults_of_steps()}".encode())


def test_the_host_keeps_what_a_step_has_freed_for_the_next() -> None:
    with forked(faults_without_and_with) as (_, output):
        without, kept = map(int, output.read().split())
    assert kept < without / 3, (kept, without)


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_what_the_user_has_set_of_the_hosts_stays(name: str) -> None:
    assert not keep_freed_memory({name: "1"})
