"""A decoder-only transformer with mixture-of-experts layers, built of TEX layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_tex.layers import (
    ParallelAttention,
    ParallelMLP,
    RMSNorm,
    Rotary,
    RotaryTables,
    TokenContext,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from lightning_tex.layers.mlp import Activation
from lightning_tex.moe import MoE
from lightning_tex.parallel.collectives import all_gather
from lightning_tex.parallel.errors import UserValueError

# B sequences, S positions, D model width, V vocabulary


@dataclass
class DecoderConfig:
    """Sizes of a :class:`Decoder`.

    Args:
        vocab_size: V; any size, padded inside where the tensor axis does not divide it.
        dim: model width D.
        num_layers: blocks.
        num_heads: attention heads.
        num_kv_heads: key/value heads; ``None``: num_heads.
        hidden_dim: hidden width of MLPs and of each expert; ``None``: 4 * dim.
        max_sequence_length: longest sequence the model is made for, in tokens.
        num_experts: experts of a MoE layer; 1: every layer is a plain MLP.
        top_k: experts per token.
        capacity_factor: see :class:`lightning_tex.moe.MoE`; ``None``: dropless.
        moe_every: every n-th block has experts, the last of each n (2: blocks 1, 3, 5, ..).
        activation: ``"gelu"`` or ``"swiglu"``.
        norm_topk_prob: rescale a token's weights to sum to 1.
        router: ``"softmax"``, or ``"forced_balance"`` for benches; see :class:`lightning_tex.moe.MoE`.
        round_factor: of dropless routing over an expert axis, see :class:`lightning_tex.moe.MoE`.
        load_balance_coefficient: weight of the load-balance loss.
        z_loss_coefficient: weight of the router's z-loss.
        rope_base: base of the rotary embedding.
        dropout: dropout of attention weights and of each residual branch.
        tie_embeddings: embedding and head share one matrix.

    Raises:
        ValueError: sizes that are not positive.
    """

    vocab_size: int = 32000
    dim: int = 512
    num_layers: int = 8
    num_heads: int = 8
    num_kv_heads: int | None = None
    hidden_dim: int | None = None
    max_sequence_length: int = 2048
    num_experts: int = 1
    top_k: int = 1
    capacity_factor: float | None = None
    moe_every: int = 2
    activation: Activation = "swiglu"
    norm_topk_prob: bool = False
    router: str = "softmax"
    round_factor: float | None = None
    load_balance_coefficient: float = 0.01
    z_loss_coefficient: float = 0.0
    rope_base: float = 10000.0
    dropout: float = 0.0
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "dim", "num_layers", "num_heads", "max_sequence_length", "num_experts", "moe_every")
        for name in (*sizes, "num_kv_heads", "hidden_dim"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise UserValueError(f"{name}={size} must be at least 1")

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def hidden(self) -> int:
        """Hidden width of MLPs and of each expert."""
        return self.hidden_dim or 4 * self.dim

    def has_experts(self, layer: int) -> bool:
        """Whether block ``layer`` (from 0) has experts."""
        return self.num_experts > 1 and layer % self.moe_every == self.moe_every - 1


class Block(nn.Module):
    """Attention and feed-forward, each normed before and added after: [B, S, D] -> [B, S, D]."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        c = config
        self.attention_norm = RMSNorm(c.dim, eps=1e-5)
        self.attention = ParallelAttention(c.dim, c.num_heads, c.num_kv_heads, rope_base=c.rope_base, dropout=c.dropout)
        self.mlp_norm = RMSNorm(c.dim, eps=1e-5)
        self.mlp: nn.Module
        if c.has_experts(layer):
            self.mlp = MoE(
                c.dim,
                c.hidden,
                c.num_experts,
                c.top_k,
                c.capacity_factor,
                c.activation,
                router=c.router,
                norm_topk_prob=c.norm_topk_prob,
                load_balance_coefficient=c.load_balance_coefficient,
                z_loss_coefficient=c.z_loss_coefficient,
                round_factor=c.round_factor,
            )
        else:
            self.mlp = ParallelMLP(c.dim, c.hidden, c.activation)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, context: TokenContext | None = None, rotary: RotaryTables | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), context=context, rotary=rotary))
        return x + self.dropout(self._feed_forward(self.mlp_norm(x), context))

    def _feed_forward(self, x: Tensor, context: TokenContext | None) -> Tensor:
        if context is not None and isinstance(self.mlp, MoE):
            return self.mlp(x, context.token_mask)
        return self.mlp(x)


class Decoder(nn.Module):
    """Token ids to next-token logits: [B, S] -> [B, S, V], the last dim sharded as VocabParallelHead leaves it.

    Args:
        config: the sizes.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.rotary = Rotary(config.dim // config.num_heads, config.rope_base)
        self.embedding = VocabParallelEmbedding(config.vocab_size, config.dim, std=config.dim**-0.5)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.dim, eps=1e-5)
        self.head = VocabParallelHead(config.dim, config.vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
        """Score next tokens; arguments and errors as of :meth:`hidden`."""
        return self.head(self.hidden(ids, token_mask=token_mask))

    def hidden(self, ids: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
        """What the head scores next tokens by: [B, S] -> [B, S, D], or a rank's part of it under sequence parallelism.

        Args:
            ids: [B, S] integer, S at most ``max_sequence_length``.
            token_mask: [B, S], True or 1 for a token, False or 0 for padding, which no token sees, no expert serves
                and no routing loss or position counts. ``None``: there is no padding.

        Raises:
            ValueError: a longer sequence, or a mask that is not one of tokens.
        """
        if ids.shape[-1] > self.config.max_sequence_length:
            raise UserValueError(
                f"sequence of {ids.shape[-1]} tokens is longer than "
                f"max_sequence_length={self.config.max_sequence_length}"
            )
        context = None if token_mask is None else TokenContext.causal(require_token_mask(token_mask, ids))
        x = self.embedding(ids)
        rotary = self.rotary.tables(ids.shape[-1], x)
        for block in self.blocks:
            x = block(x, context, rotary)
        return self.norm(x)

    def moe_layers(self) -> Iterator[tuple[int, MoE]]:
        """The MoE layers with their block's number."""
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            if isinstance(block.mlp, MoE):
                yield layer, block.mlp

    @torch.no_grad()
    def logits(self, ids: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
        """Whole logits on every rank of the tensor axis: [B, S] -> [B, S, V]. For generation; costs a gather."""
        logits = self(ids, token_mask=token_mask)
        return all_gather(logits, -1, self.head.tensor)[..., : self.config.vocab_size]


def require_token_mask(mask: Tensor, ids: Tensor) -> Tensor:
    """The mask, if it says of every id whether it is a token.

    Raises:
        ValueError: another shape, or numbers that are added to scores.
    """
    if mask.shape != ids.shape or mask.is_floating_point():
        raise UserValueError(
            f"attention_mask is {mask.dtype} of shape {list(mask.shape)} for input_ids of shape {list(ids.shape)}; "
            "legal: booleans or integers of their shape, 1 for a token and 0 for padding (causal attention is a "
            "decoder's own; masks over pairs of positions, or added to scores, are not supported)"
        )
    return mask
