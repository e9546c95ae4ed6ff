"""A LightningModule of your own on 4 CPU processes: tensor 2 x data 2, two experts on each expert rank.

python recipes/own_module.py             4 processes, the "tex_moe" strategy
python recipes/own_module.py auto        the same module in one process; the losses are the same
"""

import sys

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lightning_tex as tex
from lightning_tex.layers import ColumnParallelLinear, RowParallelLinear
from lightning_tex.moe import MoE, auxiliary_loss


class Regression(L.LightningModule):
    """Sizes are those of the whole model; the strategy shards it. Nothing here knows a rank."""

    def __init__(self, features: int = 16, width: int = 64) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(features, width)  # [.., features] -> [.., width / tensor]
        self.down = RowParallelLinear(width, width)  # [.., width / tensor] -> [.., width]
        self.experts = MoE(width, 2 * width, num_experts=4, top_k=2)  # [.., width] -> [.., width]
        self.head = torch.nn.Linear(width, 1)  # a plain layer: replicated

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(F.gelu(self.up(x)))
        return self.head(x + self.experts(x)).squeeze(-1)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        inputs, targets = batch
        loss = F.mse_loss(self(inputs), targets)
        self.log("train_loss", loss, prog_bar=True, sync_dist=True)  # the mean over the data ranks
        return loss + auxiliary_loss(self)  # the routers' load-balance loss

    def train_dataloader(self) -> DataLoader:
        # Data ranks, not processes: tensor ranks share one batch. One process: the same 64 samples in every step.
        share = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        samples = piecewise()
        return DataLoader(samples, batch_size=64 // share["num_replicas"], sampler=DistributedSampler(samples, **share))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def piecewise(samples: int = 4096, features: int = 16) -> TensorDataset:
    """Four linear functions; the largest of the first four features says which one applies."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, features, generator=generator)
    weights = torch.randn(4, features, generator=generator)
    return TensorDataset(x, (x * weights[x[:, :4].argmax(1)]).sum(1))


def main(strategy: str = "tex_moe", max_steps: int = 128, folder: str = "runs/own_module") -> None:
    L.seed_everything(1)  # every process draws the same weights
    parallel = strategy == "tex_moe"
    trainer = L.Trainer(
        accelerator="cpu",
        devices=4 if parallel else 1,
        strategy=tex.TexMoEStrategy(tensor_parallel_size=2, expert_parallel_size=2) if parallel else strategy,
        max_steps=max_steps,
        max_epochs=2,
        log_every_n_steps=1,
        logger=CSVLogger(folder, name=strategy),
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Regression())
    if trainer.is_global_zero:
        print(f"train_loss {trainer.callback_metrics['train_loss']:.6f} after {trainer.global_step} steps")


if __name__ == "__main__":
    main(*sys.argv[1:2])
