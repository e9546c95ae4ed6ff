"""Settings of every test of the planner."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

# Loads what shapes without values need, once here and not in every forked rank.
with FakeTensorMode():
    torch.ones(2, 2).mm(torch.ones(2, 2)).softmax(-1)
