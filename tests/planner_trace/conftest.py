"""Settings of every test of traces."""

import torch
from helpers.started import as_started_by_a_user  # noqa: F401
from torch._subclasses.fake_tensor import FakeTensorMode

# Loads what shapes without values need, once here and not in every forked rank.
with FakeTensorMode():
    torch.ones(2, 2).mm(torch.ones(2, 2)).softmax(-1)
