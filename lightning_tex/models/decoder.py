"""A decoder-only transformer with mixture-of-experts layers, built of TEX layers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lightning_tex.layers import (
    CachedContext,
    Context,
    DocumentContext,
    TokenContext,
    VocabParallelEmbedding,
    VocabParallelHead,
)
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

    def forward(self, input_ids: Tensor, segments: Tensor | None = None, token_mask: Tensor | None = None) -> Tensor:
        """Score next tokens; arguments and errors as of :meth:`hidden`."""
        return self.head(self.hidden(input_ids, segments, token_mask))

    def hidden(self, input_ids: Tensor, segments: Tensor | None = None, token_mask: Tensor | None = None) -> Tensor:
        """What the head scores next tokens by: [B, S] -> [B, S, D], or a rank's part of it under sequence parallelism.

        Args:
            input_ids: [B, S] integer, S at most ``max_sequence_length``.
            segments: [B, S] integers, a token's document in its sequence: neighbours of one number are of one document,
                which sees no other and whose positions begin at 0. ``None``: a sequence is one document.
            token_mask: [B, S], True or 1 for a token, False or 0 for padding, which no token sees, no expert serves
                and no routing loss or position counts. ``None``: there is no padding.

        Raises:
            ValueError: a longer sequence, a mask that is not one of tokens, or segments that are not.
        """
        if input_ids.shape[-1] > self.config.max_sequence_length:
            raise UserValueError(
                f"sequence of {input_ids.shape[-1]} tokens is longer than "
                f"max_sequence_length={self.config.max_sequence_length}"
            )
        return self._hidden(input_ids, token_context(input_ids, segments, token_mask))

    def _hidden(self, ids: Tensor, context: Context | None) -> Tensor:  # [B, S] -> [B, s, D]
        x = self.embedding(ids)
        if self.config.embedding_multiplier != 1:
            x = x * self.config.embedding_multiplier
        length = ids.shape[-1]
        rotary = self.rotary.tables(length, x) if context is None else context.tables(self.rotary, length, x)
        for layer, block in enumerate(self.blocks):
            x = block(x, None if context is None else context.of_layer(layer), rotary, ids)
        x = self.norm(x)
        return x if self.config.logits_scaling == 1 else x / self.config.logits_scaling

    def moe_layers(self) -> Iterator[tuple[int, MoE]]:
        """The MoE layers with their block's number."""
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            if isinstance(block.mlp, MoE):
                yield layer, block.mlp

    @torch.no_grad()
    def logits(self, input_ids: Tensor, segments: Tensor | None = None, token_mask: Tensor | None = None) -> Tensor:
        """Whole logits on every rank of the tensor axis: [B, S] -> [B, S, V]. For generation; costs a gather."""
        return self._whole(self(input_ids, segments, token_mask))

    @torch.no_grad()
    def next_logits(self, ids: Tensor, context: CachedContext) -> Tensor:
        """Whole logits of the token after each sequence's last one, on every rank of the tensor axis: [B, V].

        Args:
            ids: [1, T], tokens of all sequences as the context has them.
            context: what these tokens are, and the cache that remembers those before them.
        """
        x = self.head.activation_layout.enter(self._hidden(ids, context))
        return self._whole(self.head.columns(context.last(x)))

    def _whole(self, logits: Tensor) -> Tensor:  # [.., v] -> [.., V]
        return all_gather(logits, -1, self.head.tensor)[..., : self.config.vocab_size]


def token_context(ids: Tensor, segments: Tensor | None, token_mask: Tensor | None) -> Context | None:
    """What a batch says of its tokens; ``None``: that each sequence is one document, without padding.

    Raises:
        ValueError: a mask or segments that are not of tokens.
    """
    if token_mask is not None:
        token_mask = require_token_mask(token_mask, ids)
    if segments is None:
        return None if token_mask is None else TokenContext.causal(token_mask)
    if segments.shape != ids.shape:
        raise UserValueError(
            f"segments are of shape {list(segments.shape)} for input_ids of shape {list(ids.shape)}; legal: their "
            "shape, a number for each token"
        )
    return DocumentContext.of(segments, token_mask)


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
