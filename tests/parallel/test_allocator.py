"""The default of CUDA's allocator, and what the user has set."""

from __future__ import annotations

import pytest

from lightning_tex.parallel import allocator
from lightning_tex.parallel.allocator import use_growing_segments


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
