"""The sizes and kinds of a decoder's parts: plain values, which a recipe and a checkpoint hold as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_tex.layers.attention import head_width
from lightning_tex.layers.mlp import Activation
from lightning_tex.layers.qk_norm import QKNorm
from lightning_tex.parallel.errors import UserValueError

# V vocabulary, D model width


@dataclass
class DecoderConfig:
    """Sizes of a :class:`Decoder`.

    Args:
        vocab_size: V; any size, padded inside where the tensor axis does not divide it.
        dim: model width D.
        num_layers: blocks.
        num_heads: attention heads.
        num_kv_heads: key/value heads; ``None``: num_heads.
        hidden_dim: hidden width of MLPs; ``None``: 4 * dim.
        max_sequence_length: longest sequence the model is made for, in tokens.
        num_experts: experts of a MoE layer; 1: every layer is a plain MLP.
        top_k: experts per token.
        capacity_factor: see :class:`lightning_tex.moe.MoE`; ``None``: dropless.
        moe_every: every n-th block has experts, the last of each n (2: blocks 1, 3, 5, ..).
        activation: ``"gelu"`` or ``"swiglu"``.
        norm_topk_prob: rescale a token's weights to sum to 1.
        load_balance_coefficient: weight of the load-balance loss.
        z_loss_coefficient: weight of the router's z-loss.
        rope_base: base of the rotary embedding.
        dropout: dropout of attention weights and of each residual branch.
        tie_embeddings: embedding and head share one matrix.
        norm_eps: added to the mean square in every norm.
        head_dim: width of a head, even; ``None``: dim / num_heads.
        attention_bias: biases of queries, keys and values.
        attention_out_bias: a bias of attention's output projection.
        qk_norm: norm queries and keys, ``"head"`` by head, ``"full"`` over all heads together.
        clip_qkv: clamp queries, keys and values to plus and minus this.
        expert_hidden_dim: hidden width of each expert; ``None``: hidden_dim.
        first_dense_layers: so many blocks from the first have no experts.
        moe_layers: the blocks that have experts, from 0, in place of ``moe_every`` and ``first_dense_layers``.

    Raises:
        ValueError: sizes that are not positive, heads that do not divide the width, or blocks that do not exist.
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
    load_balance_coefficient: float = 0.01
    z_loss_coefficient: float = 0.0
    rope_base: float = 10000.0
    dropout: float = 0.0
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    head_dim: int | None = None
    attention_bias: bool = False
    attention_out_bias: bool = False
    qk_norm: QKNorm | None = None
    clip_qkv: float | None = None
    expert_hidden_dim: int | None = None
    first_dense_layers: int = 0
    moe_layers: list[int] | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "dim", "num_layers", "num_heads", "max_sequence_length", "num_experts", "moe_every")
        for name in (*sizes, "num_kv_heads", "hidden_dim", "head_dim", "expert_hidden_dim"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise UserValueError(f"{name}={size} must be at least 1")
        if wrong := [layer for layer in self.moe_layers or () if not 0 <= layer < self.num_layers]:
            raise UserValueError(
                f"moe_layers has {', '.join(map(str, wrong))}; legal with num_layers={self.num_layers}: "
                f"0 to {self.num_layers - 1}"
            )

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.head_dim or head_width(self.dim, self.num_heads)

    @property
    def hidden(self) -> int:
        """Hidden width of MLPs."""
        return self.hidden_dim or 4 * self.dim

    @property
    def expert_hidden(self) -> int:
        """Hidden width of each expert."""
        return self.expert_hidden_dim or self.hidden

    def has_experts(self, layer: int) -> bool:
        """Whether block ``layer`` (from 0) has experts."""
        if self.moe_layers is not None:
            return self.num_experts > 1 and layer in self.moe_layers
        in_turn = layer % self.moe_every == self.moe_every - 1
        return self.num_experts > 1 and layer >= self.first_dense_layers and in_turn

    def block_kinds(self) -> list[object]:
        """Of each block what tells it from others: blocks of one kind are built alike."""
        return [self.has_experts(layer) for layer in range(self.num_layers)]

    def of_blocks(self, layers: Sequence[int]) -> DecoderConfig:
        """The decoder of these blocks of this one alone."""
        experts = [place for place, layer in enumerate(layers) if self.has_experts(layer)]
        return replace(self, num_layers=len(layers), moe_layers=experts)
