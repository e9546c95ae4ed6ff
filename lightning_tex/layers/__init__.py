"""Layers that the strategy shards over the tensor axis. Alone, in one process, each is the plain dense layer."""

from lightning_tex.layers.attention import ParallelAttention
from lightning_tex.layers.document_context import DocumentContext
from lightning_tex.layers.kv_cache import CachedContext, KVCache
from lightning_tex.layers.latent_attention import ParallelLatentAttention
from lightning_tex.layers.linear import ColumnParallelLinear, RowParallelLinear
from lightning_tex.layers.linear_cross_entropy import VocabParallelLinearCrossEntropy
from lightning_tex.layers.mlp import ParallelMLP
from lightning_tex.layers.norm import LayerNorm, RMSNorm
from lightning_tex.layers.rotary import Rotary, RotaryTables
from lightning_tex.layers.token_context import Context, TokenContext
from lightning_tex.layers.vocab import VocabParallelCrossEntropy, VocabParallelEmbedding, VocabParallelHead

__all__ = [
    "CachedContext",
    "ColumnParallelLinear",
    "Context",
    "DocumentContext",
    "KVCache",
    "LayerNorm",
    "ParallelAttention",
    "ParallelLatentAttention",
    "ParallelMLP",
    "RMSNorm",
    "Rotary",
    "RotaryTables",
    "RowParallelLinear",
    "TokenContext",
    "VocabParallelCrossEntropy",
    "VocabParallelEmbedding",
    "VocabParallelHead",
    "VocabParallelLinearCrossEntropy",
]
