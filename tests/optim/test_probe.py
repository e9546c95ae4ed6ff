"""What is tried before training: whether an optimizer is elementwise, and the temporaries that its step takes."""

from functools import partial
from unittest.mock import patch

import pytest
import torch
from helpers.optimizer_alone import COMPACT, KINDS, adamw, network, set_gradients, tiled
from torch import nn
from torch.optim import Optimizer

from lightning_tex.bench.memory import peak_bytes
from lightning_tex.optim.flat_sizes import BUDGET_BYTES, most_elements
from lightning_tex.optim.formats import PlainStates
from lightning_tex.optim.matrices.shard import MatrixShard
from lightning_tex.optim.probe import Allocations, NotElementwiseError, probe, try_steps


def probe_all(optimizer):
    for group in optimizer.param_groups:
        probe(optimizer, group)


class TrustRatio(Optimizer):
    """LARS: each tensor's step is scaled by its own norm."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad * p.norm() / p.grad.norm() * group["lr"])


@pytest.mark.parametrize("kind", KINDS)
def test_elementwise_optimizers_pass_the_probe(kind):
    probe_all(KINDS[kind]([nn.Parameter(torch.zeros(4))]))


class GlobalNorm(Optimizer):
    """Clips by the norm of all gradients, inside the step."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            norm = torch.stack([p.grad.norm() for p in group["params"]]).norm()
            for p in group["params"]:
                p.sub_(p.grad / norm * group["lr"])


class OfCubes(Optimizer):
    """Refuses everything that is stepped here."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        raise ValueError("three dims, please")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (torch.optim.LBFGS, "optimizer LBFGS calls its closure 2 times in one step"),
        (
            GlobalNorm,
            "GlobalNorm is not elementwise: .*, and its update of a matrix depends on others; legal: an",
        ),
        (OfCubes, r"OfCubes cannot be driven window by window \(.*\), nor matrix by matrix \(ValueError: three dims"),
    ],
)
def test_others_are_refused(kind, message):
    model = network(torch.float32)
    with pytest.raises(ValueError, match=message):
        tiled(model, kind(model.parameters()))


def test_a_class_whose_step_is_not_its_kernels_is_refused():
    with (
        patch.object(torch.optim.SGD, "step"),
        pytest.raises(ValueError, match=r"optimizer SGD: .* its step\(\) leaves it as it is"),
    ):
        probe_all(torch.optim.SGD([nn.Parameter(torch.zeros(4))], lr=0.1))


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, TrustRatio, torch.optim.Muon])
def test_those_that_need_whole_matrices_get_them(kind):
    whole = nn.Linear(8, 8, bias=False)
    assert all(isinstance(shard, MatrixShard) for shard in tiled(whole, kind(whole.parameters())).shards)


def test_the_probe_looks_at_every_groups_options():
    class Sometimes(TrustRatio):
        def step(self, closure=None):
            if self.param_groups[0].get("trust"):
                super().step()

    first, second = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    probe_all(Sometimes([first, second]))
    with pytest.raises(NotElementwiseError, match="Sometimes is not elementwise"):
        probe_all(Sometimes([{"params": [first]}, {"params": [second], "trust": True}]))


@pytest.mark.parametrize("lr", [0.0, 1e-9, torch.tensor(0.0)])
def test_a_warm_up_from_nothing_does_not_hide_from_the_probe(lr):
    with pytest.raises(NotElementwiseError, match="TrustRatio is not elementwise"):
        probe_all(TrustRatio([nn.Parameter(torch.zeros(4))], lr=lr))
    probe_all(torch.optim.AdamW([nn.Parameter(torch.zeros(4))], lr=0.0))


# --- temporaries


def test_allocations_are_counted_as_long_as_they_live():
    x = torch.randn(1000)

    def peak(run):
        allocations = Allocations()
        with allocations:
            run()
        assert allocations.bytes == 0
        return allocations.peak_bytes / 4000

    assert peak(lambda: x.exp()) == 1
    assert peak(lambda: x.exp().mul(2)) == 2
    assert peak(lambda: (x + 1) * (x + 2)) == 3
    assert peak(lambda: x.mul_(1)) == 0
    assert peak(lambda: [x + i for i in range(5)]) == 5
    assert peak(lambda: [float((x + i).sum()) for i in range(5)]) < 1.01


TEMPORARIES = {
    "fused AdamW": (lambda p: torch.optim.AdamW(p), 0),
    "AdamW in a loop": (lambda p: torch.optim.AdamW(p, fused=False, foreach=False), 2),
    "foreach AdamW": (lambda p: torch.optim.AdamW(p, foreach=True), 1),
    "SGD": (lambda p: torch.optim.SGD(p, momentum=0.9), 0),
    "Adadelta": (lambda p: torch.optim.Adadelta(p), 2),
}


@pytest.mark.parametrize(("dtype", "ours"), [(torch.float32, 0), (torch.bfloat16, 4)])
@pytest.mark.parametrize("name", TEMPORARIES)
def test_a_tile_is_the_budget_over_the_measured_temporaries(name, dtype, ours):
    make, tensors = TEMPORARIES[name]
    model = network(dtype)
    users = make(model.parameters())
    optimizer = tiled(model, users, None)
    states = optimizer.shards[0].states
    plain = partial(PlainStates, master=dtype != torch.float32)
    needed = try_steps(users, users.param_groups[0], torch.empty(0, dtype=dtype), plain).temporary_bytes
    assert needed == 4 * tensors + ours
    assert states.tile_size == most_elements(needed, "cpu")
    assert states.tile_size * needed <= BUDGET_BYTES["cpu"]


@pytest.mark.parametrize("optimizer_state_format", ["fp32", *COMPACT])
def test_a_step_takes_no_more_however_many_elements(optimizer_state_format):
    peaks = []
    for width in (64, 256, 1024):
        model = nn.Linear(width, 256, bias=False).bfloat16()
        optimizer = tiled(model, adamw(model), 1 << 13, optimizer_state_format=optimizer_state_format)
        set_gradients(model, 0)
        optimizer.step()
        allocations = Allocations()
        with allocations:
            optimizer.step()
        peaks.append(allocations.peak_bytes)
    assert peaks[0] > 0 and max(peaks) < 1.01 * peaks[0] + 4096


@pytest.mark.parametrize("optimizer_state_format", ["fp32", *COMPACT])
def test_a_step_keeps_to_the_budget_torchs_own_temporaries_included(optimizer_state_format):
    model = nn.Linear(1 << 10, 3000, bias=False).bfloat16()
    optimizer = tiled(model, adamw(model), None, optimizer_state_format=optimizer_state_format)
    optimizer.step()
    assert len(optimizer.shards[0].states.spans) > 1
    assert 0.9 * BUDGET_BYTES["cpu"] < peak_bytes(optimizer.step, torch.device("cpu")) <= BUDGET_BYTES["cpu"]
