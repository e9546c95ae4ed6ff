"""What the strategy communicates on GPUs: tensors on either device, objects, timeouts, priorities, the allocator."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from helpers.on_a_gpu import ACCELERATOR, DEVICE, IS_GPU, leave_the_world, one_rank
from helpers.topologies import timeouts
from torch import Tensor

from lightning_tex.layers import ColumnParallelLinear, RowParallelLinear
from lightning_tex.parallel.groups import reaches_cpu
from lightning_tex.parallel.layout import AXES

TIMEOUT = timedelta(seconds=1234)


class Communicates(L.LightningModule):
    """Does in its first step what a user might ask the strategy for; keeps what came of it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = ColumnParallelLinear(4, 8), RowParallelLinear(8, 4)
        self.found: dict[str, Any] = {}

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        strategy = self.trainer.strategy
        on_host, here = torch.arange(3.0), torch.arange(3.0, device=self.device)
        asked = {
            "mean of a tensor on the CPU": lambda: strategy.reduce(on_host.clone()),
            "mean of whole numbers on the CPU": lambda: strategy.reduce(torch.arange(3)),
            "sum of a tensor on the GPU": lambda: strategy.reduce(here.clone(), reduce_op="sum"),
            "gathered from the CPU": lambda: strategy.all_gather(on_host),
            "gathered from the GPU": lambda: self.all_gather(here),
            "broadcast from the CPU": lambda: strategy.broadcast(on_host),
            "broadcast from the GPU": lambda: strategy.broadcast({"inside": [here]})["inside"][0],
            "decision": lambda: strategy.reduce_boolean_decision(True),
        }
        for what, ask in asked.items():
            try:
                self.found[what] = ask()
            except Exception as error:
                self.found[what] = error
        self.log("from_cpu", torch.tensor(2.0), sync_dist=True, on_step=True, on_epoch=True)
        self.log("from_gpu", here.sum(), sync_dist=True, on_step=True, on_epoch=True)
        self.log("number", 5.0, sync_dist=True)
        return self.down(self.up(batch)).square().mean()

    def on_train_end(self) -> None:
        strategy = self.trainer.strategy
        strategy.barrier()
        groups = {name: getattr(strategy.topology, name).group for name in (*AXES, "world", "host")}
        self.timeouts = timeouts({name: group for name, group in groups.items() if group is not None})
        self.backends = {name: dist.get_backend(group) for name, group in groups.items()}
        self.host_reaches_cpu = reaches_cpu(groups["host"])
        if IS_GPU:
            torch.cuda.synchronize()
        self.device_waits = strategy._device_waits()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def module() -> Iterator[Communicates]:
    module = Communicates()
    trainer = one_rank(ACCELERATOR, {"timeout": TIMEOUT}, max_steps=1)
    trainer.fit(module, torch.utils.data.DataLoader(torch.ones(4, 4), batch_size=2))
    module.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    yield module
    leave_the_world()


@pytest.mark.parametrize(
    ("what", "expected", "device"),
    [
        ("mean of a tensor on the CPU", torch.arange(3.0), "cpu"),
        ("mean of whole numbers on the CPU", torch.arange(3.0), "cpu"),
        ("sum of a tensor on the GPU", torch.arange(3.0), DEVICE.type),
        ("gathered from the CPU", torch.arange(3.0)[None], "cpu"),
        ("gathered from the GPU", torch.arange(3.0)[None], DEVICE.type),
        ("broadcast from the CPU", torch.arange(3.0), "cpu"),
        ("broadcast from the GPU", torch.arange(3.0), DEVICE.type),
    ],
)
def test_tensors_are_communicated_from_where_they_are(
    module: Communicates, what: str, expected: Tensor, device: str
) -> None:
    found = module.found[what]
    assert isinstance(found, Tensor), f"{what}: {found!r}"
    assert found.device.type == device and torch.equal(found.cpu(), expected), f"{what}: {found}"


def test_decisions_and_logged_values_are_right(module: Communicates) -> None:
    assert module.found["decision"] is True, repr(module.found["decision"])
    for name, value in {"from_cpu_epoch": 2.0, "from_gpu_epoch": 3.0, "number": 5.0}.items():
        assert module.metrics[name] == value, module.metrics


def test_the_timeout_reaches_every_group(module: Communicates) -> None:
    late = {name: value for name, value in module.timeouts.items() if not TIMEOUT <= value <= TIMEOUT * 1.1}
    assert not late, f"timeouts that are not about {TIMEOUT}: {late}"
    assert module.host_reaches_cpu, f"backends: {module.backends}"
    if IS_GPU:
        assert module.backends["host"] == "gloo" and module.backends["data"] == "nccl", module.backends


def test_the_watchdog_can_ask_whether_the_device_works(module: Communicates) -> None:
    assert module.device_waits is False


def test_memory_grows_in_segments(module: Communicates) -> None:
    if IS_GPU:
        assert "expandable_segments" in os.environ.get("PYTORCH_ALLOC_CONF", "") + os.environ.get(
            "PYTORCH_CUDA_ALLOC_CONF", ""
        )


# Groups as `ProcessGroups.of` makes them; on one rank it shares the world's.
_TWO_GROUPS = """
from datetime import timedelta
import torch, torch.distributed as dist
from lightning_tex.parallel import groups as module

timeout, device = timedelta(seconds=1234), torch.device("cuda", 0)
store = dist.HashStore()
dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=device, timeout=timeout)
groups = module.ProcessGroups(1, timeout)
for high in (True, False):
    group = groups._make([(0,)], "expert", module._options(timeout, high_priority=high))
    options = group._get_backend(device).options
    assert options.is_high_priority_stream is high, f"asked for priority {high}, got {options}"
    assert options._timeout == timeout, f"timeout {options._timeout}"
    x = torch.ones(4, device=device)
    dist.all_reduce(x, group=group)
    assert x.tolist() == [1.0] * 4
assert module.reaches_cpu(groups.host()) and not module.reaches_cpu(dist.group.WORLD)
dist.destroy_process_group()
"""


@pytest.mark.skipif(not IS_GPU, reason="needs NCCL")
def test_a_group_of_its_own_has_high_priority_and_the_timeout() -> None:
    # In a process of its own: splitting a second NCCL world of one process has ended in a segmentation fault.
    ended = subprocess.run([sys.executable, "-c", _TWO_GROUPS], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
