"""A module with every kind of sharding, and boxes of ranks without processes."""

from __future__ import annotations

import torch
from torch import nn

from lightning_tex.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, VocabParallelHead
from lightning_tex.models import Decoder, DecoderConfig
from lightning_tex.parallel.box import Box
from lightning_tex.parallel.topology import Axis

LAYOUTS = [(1, 4), (2, 2), (2, 2, 1), (4, 1), (4, 4, 1), (1, 1)]  # tensor, expert, expert_tensor on 4 ranks


def box_of(shape, at):
    """The box of a rank at coordinates ``[(dim, size, rank), ..]``."""
    return Box.of(torch.Size(shape), [(Axis(f"axis{dim}", size, rank), dim) for dim, size, rank in at])


def coordinates(shard_sizes):
    return torch.cartesian_prod(*(torch.arange(size) for _, size in shard_sizes)).view(-1, len(shard_sizes)).tolist()


class Everything(nn.Module):
    """Every kind of sharding: columns, rows, padded rows, experts; a tie; a plain module."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Linear(3, 5)
        self.column = ColumnParallelLinear(6, 8)
        self.row = RowParallelLinear(8, 6)
        self.embedding = VocabParallelEmbedding(61, 6)
        self.tiny = VocabParallelEmbedding(5, 6)
        self.head = VocabParallelHead(6, 61)
        self.head.weight = self.embedding.weight
        self.decoder = Decoder(
            DecoderConfig(vocab_size=13, dim=16, num_layers=2, num_heads=4, hidden_dim=8, num_experts=4)
        )
