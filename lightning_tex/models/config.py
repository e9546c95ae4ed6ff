"""The sizes and kinds of a decoder's parts: plain values, which a recipe and a checkpoint hold as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from lightning_tex.layers.attention import head_width
from lightning_tex.layers.mlp import Activation
from lightning_tex.layers.qk_norm import QKNorm
from lightning_tex.layers.rotary import Rotary
from lightning_tex.layers.rotary_scaling import make_scaling
from lightning_tex.moe.capacity import Precedence
from lightning_tex.moe.named import plain_choice
from lightning_tex.moe.routers import plain_router
from lightning_tex.parallel.errors import UserValueError

# V vocabulary, D model width

# What makes attention latent.
_LATENT = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")

NormKind = Literal["rms", "layer"]
NormPlacement = Literal["pre", "post", "sandwich"]
AttentionType = Literal["full_attention", "sliding_attention"]

# Fields that take one of a few words, or a list of them.
_WORDS = {
    "activation": get_args(Activation),
    "norm": get_args(NormKind),
    "norm_placement": get_args(NormPlacement),
    "qk_norm": (*get_args(QKNorm), None),
    "layer_types": (*get_args(AttentionType), None),
    "overflow_by": get_args(Precedence),
}


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
        activation: of MLPs and experts, ``"swiglu"``, ``"gelu"`` and others; see
            :class:`lightning_tex.layers.ParallelMLP`.
        norm_topk_prob: rescale a token's weights to sum to 1.
        load_balance_coefficient: weight of the load-balance loss.
        z_loss_coefficient: weight of the router's z-loss.
        rope_base: base of the rotary embedding.
        dropout: dropout of attention weights and of each residual branch.
        tie_embeddings: embedding and head share one matrix.
        norm_eps: added to the mean square in every norm.
        norm: ``"rms"``, or ``"layer"``, which has a bias.
        norm_placement: ``"pre"``: norms before attention and feed-forward; ``"post"``: of what they give, before it is
            added (OLMo 2); ``"sandwich"``: both (Gemma 2).
        head_bias: a bias of the logits.
        embedding_multiplier: what the embedding gives is multiplied with it.
        residual_multiplier: what attention and feed-forward give, before it is added.
        logits_scaling: logits are divided by it.
        head_dim: width of a head, even; ``None``: dim / num_heads.
        attention_bias: biases of queries, keys and values.
        attention_out_bias: a bias of attention's output projection.
        qk_norm: norm queries and keys, ``"head"`` by head, ``"full"`` over all heads together.
        clip_qkv: clamp queries, keys and values to plus and minus this.
        partial_rotary_factor: part of a head's width that turns, from the first dim on.
        rope_interleaved: pairs that turn lie side by side, not in halves.
        rope_scaling: for sequences beyond those that the model was made for, as published configurations have it:
            ``{"rope_type": "yarn", "factor": 4.0, ..}``; see :mod:`lightning_tex.layers.rotary_scaling`.
        sliding_window: a position sees so many, itself included; ``None``: all before it.
        layer_types: of each block ``"sliding_attention"`` or ``"full_attention"``; ``None``: all have the window.
        attention_sinks: each head has a learned score that takes part in its softmax.
        attention_multiplier: attention's scores are multiplied with it; ``None``: 1 / sqrt(head width).
        attn_logit_softcapping: attention's scores s become c * tanh(s / c), which no fast kernel has.
        final_logit_softcapping: the head's logits likewise.
        kv_lora_rank: multi-head latent attention, whose keys and values are made of a latent of so many numbers;
            ``None``: attention as above.
        q_lora_rank: of the latent that queries are made of; ``None``: they are made of the model's width.
        qk_nope_head_dim, qk_rope_head_dim: of latent attention, widths of the parts of a head that stay and that turn.
        v_head_dim: of latent attention, width of a head's values.
        expert_hidden_dim: hidden width of each expert; ``None``: hidden_dim.
        router: a name, ``"softmax"``, ``"sigmoid"`` or another of :class:`lightning_tex.moe.MoE`'s, or an import path;
            one with arguments of its own, ``{"name": .., "init_args": {..}}``; or a :class:`lightning_tex.moe.Router`
            subclass, which is kept as its import path.
        round_factor: of dropless routing over an expert axis, see :class:`lightning_tex.moe.MoE`.
        shared_expert_hidden_dim: hidden width of an expert that every token uses beside its own; ``None``: none.
        shared_expert_gate: that one's output is multiplied by a sigmoid gate.
        expert_bias: biases in experts; dropless only.
        mlp_bias: biases in MLPs.
        first_dense_layers: so many blocks from the first have no experts.
        sequence_balance_coefficient, step_balance_coefficient, entropy_coefficient: weights of further losses of the
            routers, see :class:`lightning_tex.moe.MoE`.
        eval_capacity_factor, min_capacity, overflow_by: with ``capacity_factor``, see :class:`lightning_tex.moe.MoE`.
        expert_module: an import path of the experts' class, alone or with arguments, see
            :class:`lightning_tex.moe.MoE`; or a class, which is kept as its path. ``None``: MLPs.
        residual_hidden_dim: hidden width of an MLP that is mixed with the experts, see :class:`lightning_tex.moe.MoE`;
            ``None``: there is none.
        zero_experts, identity_experts: further experts that compute nothing, see :class:`lightning_tex.moe.MoE`.
        moe_layers: the blocks that have experts, from 0, in place of ``moe_every`` and ``first_dense_layers``.

    Raises:
        ValueError: sizes that are not positive, words that mean nothing, or blocks that do not exist.
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
    norm: NormKind = "rms"
    norm_placement: NormPlacement = "pre"
    head_bias: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    head_dim: int | None = None
    attention_bias: bool = False
    attention_out_bias: bool = False
    qk_norm: QKNorm | None = None
    clip_qkv: float | None = None
    partial_rotary_factor: float = 1.0
    rope_interleaved: bool = False
    rope_scaling: dict[str, Any] | None = None
    sliding_window: int | None = None
    layer_types: list[AttentionType] | None = None
    attention_sinks: bool = False
    attention_multiplier: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    expert_hidden_dim: int | None = None
    router: str | dict[str, Any] = "softmax"
    shared_expert_hidden_dim: int | None = None
    shared_expert_gate: bool = False
    expert_bias: bool = False
    mlp_bias: bool = False
    first_dense_layers: int = 0
    moe_layers: list[int] | None = None
    round_factor: float | None = None
    sequence_balance_coefficient: float = 0.0
    step_balance_coefficient: float = 0.0
    entropy_coefficient: float = 0.0
    eval_capacity_factor: float | None = None
    min_capacity: int = 0
    overflow_by: Precedence = "position"
    expert_module: str | dict[str, Any] | None = None
    residual_hidden_dim: int | None = None
    zero_experts: int = 0
    identity_experts: int = 0

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "dim", "num_layers", "num_heads", "max_sequence_length", "num_experts", "moe_every")
        optional = (
            "num_kv_heads", "hidden_dim", "head_dim", "expert_hidden_dim", "shared_expert_hidden_dim",
            "residual_hidden_dim", "sliding_window", *_LATENT, "q_lora_rank",
        )  # fmt: skip
        for name in (*sizes, *optional):
            if (size := getattr(self, name)) is not None and size < 1:
                raise UserValueError(f"{name}={size} must be at least 1")
        for name, legal in _WORDS.items():
            value = getattr(self, name)
            for word in value or () if isinstance(value, list) else (value,):
                if word not in legal:
                    raise UserValueError(f"{name} has {word!r}; legal: {', '.join(map(repr, legal))}")
        given = [name for name in _LATENT if getattr(self, name) is not None]
        if given and len(given) < len(_LATENT):
            missing = [name for name in _LATENT if name not in given]
            raise UserValueError(f"{', '.join(given)} without {', '.join(missing)}; legal: all of them, or none")
        if not 0 < self.partial_rotary_factor <= 1:
            raise UserValueError(f"partial_rotary_factor={self.partial_rotary_factor}; legal: above 0, at most 1")
        make_scaling(self.rope_scaling)
        self.router = plain_router(self.router)
        if self.expert_module is not None:
            self.expert_module = plain_choice(self.expert_module, "expert_module")
        if self.layer_types is not None and len(self.layer_types) != self.num_layers:
            raise UserValueError(
                f"layer_types has {len(self.layer_types)} entries; legal with num_layers={self.num_layers}: as many"
            )
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
    def rotary(self) -> Rotary:
        """How queries and keys turn, in all blocks alike."""
        width = self.qk_rope_head_dim or int(self.head * self.partial_rotary_factor)
        if width % 2:
            raise UserValueError(
                f"partial_rotary_factor={self.partial_rotary_factor} of heads of {self.head} is {width}; legal: an "
                "even width (rotary embedding pairs)"
            )
        return Rotary(width, self.rope_base, make_scaling(self.rope_scaling), self.rope_interleaved)

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

    def window(self, layer: int) -> int | None:
        """How many positions those of block ``layer`` (from 0) see; ``None``: all before them."""
        sliding = self.layer_types is None or self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if sliding else None

    def block_kinds(self) -> list[object]:
        """Of each block what tells it from others: blocks of one kind are built alike."""
        return [(self.has_experts(layer), self.window(layer)) for layer in range(self.num_layers)]

    def of_blocks(self, layers: Sequence[int]) -> DecoderConfig:
        """The decoder of these blocks of this one alone."""
        experts = [place for place, layer in enumerate(layers) if self.has_experts(layer)]
        types = None if self.layer_types is None else [self.layer_types[layer] for layer in layers]
        return replace(self, num_layers=len(layers), moe_layers=experts, layer_types=types)
