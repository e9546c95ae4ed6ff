"""A training loop of one's own with Lightning Fabric: python recipes/fabric_loop.py, on one process or several.

python recipes/fabric_loop.py --devices 4 --tensor_parallel_size 2 --steps 40
python recipes/fabric_loop.py --devices 2 --resume runs/fabric/last.ckpt --steps 40      # on another layout
"""

from __future__ import annotations

import argparse

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_tex.fabric import TexMoEStrategy
from lightning_tex.layers import VocabParallelCrossEntropy
from lightning_tex.models import Decoder, DecoderConfig
from lightning_tex.moe import auxiliary_loss
from lightning_tex.optim import MuonAdamW

VOCABULARY, LENGTH = 64, 32


class Counting(Dataset):
    """Sequences that count up by a step of their own, modulo the vocabulary: there is something to learn."""

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> Tensor:
        return (index + (1 + index % 5) * torch.arange(LENGTH + 1)) % VOCABULARY


class Net(nn.Module):
    """A small decoder whose every second block has experts, and its loss: [B, S + 1] -> []."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decoder(DecoderConfig(vocab_size=VOCABULARY, dim=64, num_layers=2, num_heads=4, num_experts=4))
        self.loss = VocabParallelCrossEntropy()

    def forward(self, ids: Tensor) -> Tensor:
        return self.loss(self.decoder(ids[:, :-1]), ids[:, 1:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--tensor_parallel_size", type=int, default=1)
    parser.add_argument("--zero_stage", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--save", default="runs/fabric/last.ckpt")
    parser.add_argument("--resume", default=None)
    given = parser.parse_args()

    strategy = TexMoEStrategy(tensor_parallel_size=given.tensor_parallel_size, zero_stage=given.zero_stage)
    fabric = Fabric(accelerator=given.accelerator, devices=given.devices, strategy=strategy, precision=given.precision)
    fabric.launch()
    fabric.seed_everything(1)
    net = Net()
    model, optimizer = fabric.setup(net, MuonAdamW(net, lr=3e-3))
    own_batch = 16 // strategy.distributed_sampler_kwargs["num_replicas"]
    loader = fabric.setup_dataloaders(DataLoader(Counting(), own_batch, shuffle=True, drop_last=True))
    state = {"model": model, "optimizer": optimizer, "step": 0}
    if given.resume:
        fabric.load(given.resume, state)

    batches = iter(loader)
    for step in range(state["step"], state["step"] + given.steps):
        optimizer.zero_grad()
        for part in range(given.accumulate):
            with fabric.no_backward_sync(model, enabled=part < given.accumulate - 1):
                loss = model(next(batches)) + auxiliary_loss(model)
                fabric.backward(loss / given.accumulate)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        if step % 10 == 9:
            fabric.print(f"step {step + 1}: loss {float(fabric.all_reduce(loss.detach())):.4f}")
        state["step"] = step + 1
    fabric.save(given.save, state)


if __name__ == "__main__":
    main()
