"""Settings of every test of traces."""

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

# Loads what shapes without values need, once here and not in every forked rank.
with FakeTensorMode():
    torch.ones(2, 2).mm(torch.ones(2, 2)).softmax(-1)


@pytest.fixture(autouse=True, scope="module")
def _as_started_by_a_user():
    """No words of pytest's own command line, no notes about calls that Lightning makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning-tex"])
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        yield
