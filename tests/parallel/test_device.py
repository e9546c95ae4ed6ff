"""Which device's code path is taken."""

from __future__ import annotations

import pytest
import torch

from lightning_tex.parallel.device import device_type, pretend_device


def fails_under_another(tensor: torch.Tensor) -> None:
    with pretend_device("cuda"):
        assert device_type(tensor) == "cuda"
        with pretend_device("cpu"):
            assert device_type(tensor) == "cpu"
        assert device_type(tensor) == "cuda"
        raise RuntimeError("ends here")


def test_a_device_is_pretended_inside_and_nowhere_else() -> None:
    tensor = torch.zeros(1)
    with pytest.raises(RuntimeError, match="ends here"):
        fails_under_another(tensor)
    assert device_type(tensor) == "cpu"
