"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), its heads sharded over the tensor axis."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_tex.layers.attention import Attention
from lightning_tex.layers.attention_scores import AttentionScores
from lightning_tex.layers.linear import ColumnParallelLinear, RowParallelLinear
from lightning_tex.layers.norm import RMSNorm
from lightning_tex.layers.rotary import Rotary, RotaryTables

# B sequences, S positions (s of them held between layers), D model width, H heads (h here), n and r widths of a head's
# parts that stay and that turn, c width of a value, q and l ranks of the latents of queries, and of keys and values


class ParallelLatentAttention(Attention):
    """Self-attention whose keys and values are made of one narrow latent of each token: [B, S, D] -> [B, S, D].

    The latents, their norms and the part of the key that turns, which all heads share, are computed between layers,
    alike on all tensor ranks; what is narrow enters the sharded region. Matrices that make heads of it are column
    parallel, the output is row parallel.

    Args:
        dim: model width D.
        num_heads: H; divisible by the tensor axis.
        kv_lora_rank: l.
        qk_nope_head_dim: n.
        qk_rope_head_dim: r, even.
        v_head_dim: c.
        q_lora_rank: q; ``None``: queries are made of x.
        bias: biases of the latents and of the output.
        rotary: how queries and keys turn, of width r; ``None``: by base 10000, pairs side by side. Its scaling
            multiplies the scores by its ``score_factor``.
        norm_eps: of the latents' norms.
        dropout: probability with which attention weights are zeroed in training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        q_lora_rank: int | None = None,
        bias: bool = False,
        rotary: Rotary | None = None,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
    ) -> None:
        rotary = Rotary(qk_rope_head_dim, interleaved=True) if rotary is None else rotary
        width = qk_nope_head_dim + qk_rope_head_dim
        factor = 1.0 if rotary.scaling is None else rotary.scaling.score_factor
        super().__init__(num_heads, rotary, AttentionScores(width**-0.5 * factor), True, dropout, False)
        self.dim, self.q_lora_rank, self.kv_lora_rank = dim, q_lora_rank, kv_lora_rank
        self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim = qk_nope_head_dim, qk_rope_head_dim, v_head_dim
        self.query_latent = self.query_latent_norm = None
        if q_lora_rank is not None:
            self.query_latent = nn.Linear(dim, q_lora_rank, bias)
            self.query_latent_norm = RMSNorm(q_lora_rank, eps=norm_eps)
        self.query = ColumnParallelLinear(q_lora_rank or dim, num_heads * width, bias=False)
        self.key_value_latent = nn.Linear(dim, kv_lora_rank + qk_rope_head_dim, bias)
        self.key_value_latent_norm = RMSNorm(kv_lora_rank, eps=norm_eps)
        self.key_value = ColumnParallelLinear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim), bias=False)
        self.out = RowParallelLinear(num_heads * v_head_dim, dim, bias)

    def entering(self, x: Tensor) -> Tensor:  # [B, s, D] -> [B, s, (q or D) + l + r]
        of_query = x
        if self.query_latent is not None and self.query_latent_norm is not None:
            of_query = self.query_latent_norm(self.query_latent(x))
        latent, turning = self.key_value_latent(x).split([self.kv_lora_rank, self.qk_rope_head_dim], -1)
        return torch.cat([of_query.to(latent.dtype), self.key_value_latent_norm(latent), turning], -1)

    def turned_heads(self, x: Tensor, rotary: RotaryTables) -> tuple[Tensor, Tensor, Tensor]:
        stays, turns = self.qk_nope_head_dim, self.qk_rope_head_dim
        of_query, latent, turning = x.split([self.q_lora_rank or self.dim, self.kv_lora_rank, turns], -1)
        query = self.query.columns(of_query).unflatten(-1, (-1, stays + turns))
        key_value = self.key_value.columns(latent).unflatten(-1, (-1, stays + self.v_head_dim))
        key, value = key_value.split([stays, self.v_head_dim], -1)
        turned_query, turned_key = rotary.turn(query[..., stays:], turning.unsqueeze(-2))
        query = torch.cat([query[..., :stays], turned_query], -1)
        return query, torch.cat([key, turned_key.expand(*key.shape[:-1], turns)], -1), value
