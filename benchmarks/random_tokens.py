"""Token blocks without a corpus, for benchmarks."""

from __future__ import annotations

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class _Blocks(Dataset):
    def __init__(self, vocab_size: int, length: int, count: int) -> None:
        self.vocab_size, self.length, self.count = vocab_size, length, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(self.vocab_size, (self.length + 1,), generator=generator)
        return {"input_ids": ids[:-1], "labels": ids[1:]}


class RandomTokens(LightningDataModule):
    """Random token blocks, the same ones for every layout.

    Args:
        vocab_size: tokens are below it.
        sequence_length: tokens in a block.
        global_batch_size: blocks in a micro-step, over the whole data axis.
        blocks: blocks in an epoch.
    """

    def __init__(self, vocab_size: int, sequence_length: int, global_batch_size: int, blocks: int = 1 << 16) -> None:
        super().__init__()
        self.vocab_size, self.global_batch_size = vocab_size, global_batch_size
        self.dataset = _Blocks(vocab_size, sequence_length, blocks)

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        ranks = (
            self.trainer.distributed_sampler_kwargs["num_replicas"] if self.trainer.distributed_sampler_kwargs else 1
        )
        return DataLoader(self.dataset, batch_size=self.global_batch_size // ranks)
