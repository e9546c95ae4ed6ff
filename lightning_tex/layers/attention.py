"""Causal self-attention with rotary embedding and grouped-query heads, sharded over the tensor axis by heads."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from lightning_tex.layers.attention_scores import AttentionScores, AttentionSinks
from lightning_tex.layers.linear import ColumnParallelLinear, RowParallelLinear, require_divisible
from lightning_tex.layers.qk_norm import QKNorm, make_qk_norms
from lightning_tex.layers.rotary import Rotary, RotaryTables
from lightning_tex.layers.token_context import Context, visible_keys
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.layout import Layout
from lightning_tex.parallel.rank_random_state import rank_random_state
from lightning_tex.parallel.sharding import TexModule

# B sequences, S positions, D model width, H heads, K key/value heads, d head width (per rank: H/tensor, K/tensor)


class Attention(TexModule):
    """Self-attention with its heads sharded over the tensor axis: [B, S, D] -> [B, S, D].

    Under sequence parallelism x and the result hold a rank's positions, but every position attends to whole sequences.
    A subclass makes heads of what enters (:meth:`turned_heads`), and may make what enters of x (:meth:`entering`).

    Args:
        num_heads: query heads; divisible by the tensor axis.
        rotary: how queries and keys turn.
        scores: what becomes of their products.
        causal: position t sees positions up to t.
        dropout: probability with which attention weights are zeroed in training. Ranks draw different masks.
        sinks: each head has a learned score that takes part in its softmax.
    """

    out: RowParallelLinear

    def __init__(
        self, num_heads: int, rotary: Rotary, scores: AttentionScores, causal: bool, dropout: float, sinks: bool
    ) -> None:
        super().__init__()
        self.num_heads, self.rotary, self.scores, self.causal, self.dropout = num_heads, rotary, scores, causal, dropout
        self.sinks = AttentionSinks(num_heads) if sinks else None

    def check(self, name: str, layout: Layout) -> None:
        require_divisible(name, "num_heads", self.num_heads, layout)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        context: Context | None = None,
        rotary: RotaryTables | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: [B, S, D].
            attention_mask: boolean, True where a position may be seen: [B, S] over keys, or anything that broadcasts
                to [B, H, S, S] with a head dim of 1. S is the whole sequence's, always.
            context: in place of a mask, what all layers of a model have in common: it alone decides what is seen, and
                where tokens stand. The result at padding is nobody's.
            rotary: ``self.rotary.tables(S, x)``, or ``context.tables(self.rotary, S, x)``, made once for all layers
                that turn alike; ``None``: made here.

        Returns:
            [B, S, D]

        Raises:
            ValueError: a mask and a context.
        """
        if attention_mask is not None and context is not None:
            raise UserValueError("attention_mask and context both say what is seen; legal: one of them")
        x = self.activation_layout.enter(self.entering(x))
        x = x if context is None else context.pack(x)
        if rotary is None:
            length = x.shape[-2]
            rotary = self.rotary.tables(length, x) if context is None else context.tables(self.rotary, length, x)
        y = self._attend(*self.turned_heads(x, rotary), self._mask(attention_mask), context).flatten(-2)
        return self.out(y if context is None else context.unpack(y))

    def entering(self, x: Tensor) -> Tensor:  # [B, s, D] -> [B, s, ..]
        """What enters the region that is sharded over tensor, of each token by itself."""
        return x

    @abstractmethod
    def turned_heads(self, x: Tensor, rotary: RotaryTables) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of this rank's heads, of what has entered: [B, S, ..] -> [B, S, h, d] each."""

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, context: Context | None
    ) -> Tensor:
        """[B, S, h, d] each -> [B, S, h, d]. ``visible``: what may be seen, where no context says it."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        sinks = None if self.sinks is None else self.sinks.weight
        with rank_random_state(self.tensor, enabled=dropout > 0):
            if context is not None:
                y = context.attend(self.scores, query, key, value, dropout, sinks)
            else:
                y = self.scores.attend(query, key, value, visible, self.causal, dropout, sinks)
        return y.transpose(1, 2)

    def _mask(self, mask: Tensor | None) -> Tensor | None:
        if mask is None:
            return None
        mask = mask.bool()
        return visible_keys(mask[:, None, None, :] if mask.dim() == 2 else mask, self.causal)


class ParallelAttention(Attention):
    """Self-attention with its heads sharded over the tensor axis: [B, S, D] -> [B, S, D].

    Query, key and value are column parallel, the output row parallel: one all-reduce forward, one backward. Under
    sequence parallelism x and the result hold a rank's positions, but every position attends to whole sequences.

    Args:
        dim: model width D.
        num_heads: query heads; divisible by the tensor axis.
        num_kv_heads: key/value heads, each shared by num_heads/num_kv_heads query heads; divisible by the tensor axis.
            ``None``: num_heads.
        bias: biases in the projections of queries, keys and values.
        rope_base: base of the rotary embedding's wavelengths.
        causal: position t sees positions up to t.
        dropout: probability with which attention weights are zeroed in training. Ranks draw different masks.
        head_dim: head width d, even; ``None``: dim / num_heads.
        out_bias: bias in the output projection; ``None``: as ``bias``.
        qk_norm: queries and keys are normed before they turn: ``"head"`` by head, ``"full"`` over all heads together.
        norm_eps: of these norms.
        clip_qkv: queries, keys and values are clamped to plus and minus this, after the norms.
        rotary: how queries and keys turn; ``None``: whole heads, by ``rope_base``.
        window: a position sees this many, itself included; ``None``: all.
        sinks: each head has a learned score, which takes part in its softmax and has no value (gpt-oss).
        scale: of the products of queries and keys; ``None``: 1 / sqrt(d).
        softcap: of these scores, see :class:`AttentionScores`.

    Raises:
        ValueError: sizes that do not divide.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        bias: bool = False,
        rope_base: float = 10000.0,
        causal: bool = True,
        dropout: float = 0.0,
        *,
        head_dim: int | None = None,
        out_bias: bool | None = None,
        qk_norm: QKNorm | None = None,
        norm_eps: float = 1e-5,
        clip_qkv: float | None = None,
        rotary: Rotary | None = None,
        window: int | None = None,
        sinks: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> None:
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        head_dim = head_width(dim, num_heads) if head_dim is None else head_dim
        if rotary is None and head_dim % 2:
            raise UserValueError(f"head_dim={head_dim} must be even (rotary embedding pairs)")
        if num_heads % num_kv_heads:
            raise UserValueError(f"num_heads={num_heads} is not divisible by num_kv_heads={num_kv_heads}")
        rotary = Rotary(head_dim, rope_base) if rotary is None else rotary
        scores = AttentionScores(head_dim**-0.5 if scale is None else scale, window, softcap)
        super().__init__(num_heads, rotary, scores, causal, dropout, sinks)
        self.num_kv_heads, self.head_dim, self.clip_qkv = num_kv_heads, head_dim, clip_qkv
        self.query = ColumnParallelLinear(dim, num_heads * head_dim, bias)
        self.key = ColumnParallelLinear(dim, num_kv_heads * head_dim, bias)
        self.value = ColumnParallelLinear(dim, num_kv_heads * head_dim, bias)
        self.out = RowParallelLinear(num_heads * head_dim, dim, bias if out_bias is None else out_bias)
        self.qk_norms = make_qk_norms(qk_norm, num_heads, num_kv_heads, head_dim, norm_eps)

    def check(self, name: str, layout: Layout) -> None:
        super().check(name, layout)
        require_divisible(name, "num_kv_heads", self.num_kv_heads, layout)

    def turned_heads(self, x: Tensor, rotary: RotaryTables) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.heads(x)
        return *rotary.turn(query, key), value

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of this rank's heads, before they turn: [B, S, D] -> [B, S, h, d] each."""
        columns = [project.columns(x) for project in (self.query, self.key, self.value)]
        if self.qk_norms is not None:
            columns[:2] = self.qk_norms["query"](columns[0]), self.qk_norms["key"](columns[1])
        if self.clip_qkv is not None:
            columns = [column.clamp(-self.clip_qkv, self.clip_qkv) for column in columns]
        query, key, value = (column.unflatten(-1, (-1, self.head_dim)) for column in columns)
        return query, key, value


def head_width(dim: int, num_heads: int) -> int:
    """dim / num_heads; ``ValueError`` unless that is an even number."""
    if dim % num_heads or dim // num_heads % 2:
        raise UserValueError(f"dim={dim} must be an even multiple of num_heads={num_heads} (rotary embedding pairs)")
    return dim // num_heads
