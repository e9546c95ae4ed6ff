"""What a step asks of a GPU: counted on tensors of 10^9 elements that have no memory."""

from types import SimpleNamespace

import pytest
import torch
from helpers.launches import Launches
from torch import nn

from lightning_tex.optim import OptimizerStateConfig, TiledOptimizer
from lightning_tex.optim.flat import FlatBuffer
from lightning_tex.optim.walk import Walk
from lightning_tex.parallel.device import pretend_device
from lightning_tex.parallel.layout import Communication, Layout
from lightning_tex.parallel.sharding import parameter_shardings
from lightning_tex.parallel.topology import Axis
from lightning_tex.planner.pretended_world import pretended_topology


@pytest.fixture(autouse=True)
def _nobody_gathers(monkeypatch):
    monkeypatch.setattr(FlatBuffer, "gather", lambda self: SimpleNamespace(wait=lambda: None))


def optimizer_of(elements, replicas, dtype, form="fp32"):
    """Over a model of which this rank owns so many elements."""
    layers = 100
    model = nn.ParameterList(
        nn.Parameter(torch.empty(replicas * elements // layers, dtype=dtype, device="meta")) for _ in range(layers)
    )
    with pretended_topology(Layout.resolve(replicas, 1, 1), Communication()) as topology:
        named = dict(model.named_parameters())
        at = {named[name]: sharding for name, sharding in parameter_shardings(model, topology).items()}
        config = OptimizerStateConfig(optimizer_state_format=form)
        optimizer = TiledOptimizer(torch.optim.AdamW(model.parameters()), at, Axis("world"), config)
    for states in [shard.states for shard in optimizer.shards]:  # as a first step leaves them
        for window in range(len(states.spans)):
            states.set_number(window, "step", torch.empty((), device="meta"))
            for key in ("exp_avg", "exp_avg_sq"):
                states.filled(window, key, states.memory_for(window, key, torch.float32, ()))
    return optimizer


@pytest.mark.parametrize("replicas", [1, 8, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_a_billion_elements(replicas, dtype):
    scalar = torch.empty((), dtype=torch.float64, device="meta")
    with pretend_device("cuda"), torch.no_grad():
        optimizer = optimizer_of(10**9, replicas, dtype)
        owned = sum(len(shard.states.own) for shard in optimizer.shards)
        assert 0.99e9 < owned < 1.01e9
        for scale, skip in ((1.0, None), (scalar, scalar.float())):
            with Launches() as launches:
                optimizer._walk(Walk(scale, skip))
            assert 0 < launches.count <= 100, launches.names


@pytest.mark.parametrize(("form", "most"), [("int8", 1500), ("stochastic", 2500)])
def test_a_step_of_a_billion_elements_of_100_parameters_in_less_memory(form, most):
    with pretend_device("cuda"), torch.no_grad():
        optimizer = optimizer_of(10**9, 1, torch.bfloat16, form)
        with Launches() as launches:
            optimizer._walk(Walk())
        assert 0 < launches.count <= most, launches.names
