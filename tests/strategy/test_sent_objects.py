"""Objects that ranks send each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_tex.strategy.sent_objects import from_bytes, to_bytes


@dataclass(frozen=True)
class Held:
    values: Tensor
    name: str


def test_what_is_on_the_cpu_stays_there() -> None:
    sent = [Held(torch.arange(3), "a"), {"b": (torch.ones(2), None)}]
    got = from_bytes(to_bytes(sent), torch.device("meta"))
    assert got[0].name == "a" and torch.equal(got[0].values, torch.arange(3))
    assert torch.equal(got[1]["b"][0], torch.ones(2)) and got[1]["b"][1] is None


class OnDevice(Tensor):
    """One that says that it lies on a GPU."""

    device = torch.device("cuda", 3)

    def cpu(self) -> Tensor:
        return self.as_subclass(Tensor)


def test_what_is_on_a_gpu_comes_to_the_receivers_device_however_deep_it_is() -> None:
    sent = [Held(torch.arange(3).as_subclass(OnDevice), "a"), {"b": torch.ones(2)}]
    got = from_bytes(to_bytes(sent), torch.device("meta"))  # a device that is neither the CPU nor the sender's
    assert got[0].values.device.type == "meta" and got[0].values.shape == (3,)
    assert got[1]["b"].device.type == "cpu"
