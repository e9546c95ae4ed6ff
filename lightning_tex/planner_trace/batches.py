"""Batches without a corpus, in the shape of a text data module's."""

from __future__ import annotations

from collections.abc import Iterator

from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_tex.data import TokenDataModule
from lightning_tex.data.order import Share
from lightning_tex.planner.batches import token_blocks


class MadeUpBlocks(LightningDataModule):
    """Blocks of made-up tokens, as many and as long as :class:`TokenDataModule` gives.

    Args:
        vocab_size: tokens are below it.
        sequence_length: tokens in a block.
        global_batch_size: blocks in a micro-step, over the whole data axis.
    """

    def __init__(self, vocab_size: int, sequence_length: int, global_batch_size: int) -> None:
        super().__init__()
        self.vocab_size, self.sequence_length, self.global_batch_size = vocab_size, sequence_length, global_batch_size

    @classmethod
    def like(cls, data: TokenDataModule) -> MadeUpBlocks:
        """Those of a data module, whose data need not be there."""
        return cls(data.vocab_size, data.sequence_length, data.global_batch_size)

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        share = Share(self.global_batch_size, **(self.trainer.distributed_sampler_kwargs or {}))
        return DataLoader(_Endless(self.vocab_size, share.rows, self.sequence_length), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        """The same, for what asks whether there is one."""
        return self.train_dataloader()


class _Endless(IterableDataset):
    def __init__(self, vocab_size: int, rows: int, length: int) -> None:
        self.vocab_size, self.rows, self.length = vocab_size, rows, length

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield token_blocks(self.vocab_size, self.rows, self.length)
