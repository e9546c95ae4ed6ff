"""A decoder-only transformer with mixture-of-experts layers, built of TEX layers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lightning_tex.layers import TokenContext, VocabParallelEmbedding, VocabParallelHead
from lightning_tex.models.block import Block, make_norm
from lightning_tex.models.config import DecoderConfig
from lightning_tex.moe import MoE
from lightning_tex.parallel.collectives import all_gather
from lightning_tex.parallel.errors import UserValueError

# B sequences, S positions, D model width, V vocabulary


class Decoder(nn.Module):
    """Token ids to next-token logits: [B, S] -> [B, S, V], the last dim sharded as VocabParallelHead leaves it.

    Args:
        config: the sizes.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.rotary = config.rotary
        self.embedding = VocabParallelEmbedding(config.vocab_size, config.dim, std=config.dim**-0.5)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = make_norm(config)
        self.head = VocabParallelHead(
            config.dim, config.vocab_size, softcap=config.final_logit_softcapping, bias=config.head_bias
        )
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
        if self.config.embedding_multiplier != 1:
            x = x * self.config.embedding_multiplier
        rotary = self.rotary.tables(ids.shape[-1], x)
        for block in self.blocks:
            x = block(x, context, rotary)
        x = self.norm(x)
        return x if self.config.logits_scaling == 1 else x / self.config.logits_scaling

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
