"""A decoder's block: attention and feed-forward with their norms, each the module that the configuration names."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_tex.layers import ParallelAttention, ParallelMLP, RMSNorm, RotaryTables, TokenContext
from lightning_tex.models.config import DecoderConfig
from lightning_tex.moe import MoE

# B sequences, S positions, D model width


class Block(nn.Module):
    """Attention and feed-forward, each normed before and added after: [B, S, D] -> [B, S, D].

    Args:
        config: of the decoder.
        layer: the block's place in it, from 0.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = make_attention(config, layer)
        self.mlp_norm = make_norm(config)
        self.mlp = make_feed_forward(config, layer)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, context: TokenContext | None = None, rotary: RotaryTables | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), context=context, rotary=rotary))
        return x + self.dropout(self._feed_forward(self.mlp_norm(x), context))

    def _feed_forward(self, x: Tensor, context: TokenContext | None) -> Tensor:
        if context is not None and isinstance(self.mlp, MoE):
            return self.mlp(x, context.token_mask)
        return self.mlp(x)


def make_norm(config: DecoderConfig) -> nn.Module:
    """A norm over the model width."""
    return RMSNorm(config.dim, eps=config.norm_eps)


def make_attention(config: DecoderConfig, layer: int) -> nn.Module:
    """A block's attention, which takes ``(x, context=, rotary=)``."""
    c = config
    return ParallelAttention(
        c.dim,
        c.num_heads,
        c.num_kv_heads,
        c.attention_bias,
        c.rope_base,
        dropout=c.dropout,
        head_dim=c.head,
        out_bias=c.attention_out_bias,
        qk_norm=c.qk_norm,
        norm_eps=c.norm_eps,
        clip_qkv=c.clip_qkv,
    )


def make_feed_forward(config: DecoderConfig, layer: int) -> nn.Module:
    """A block's experts or MLP."""
    c = config
    if not c.has_experts(layer):
        return ParallelMLP(c.dim, c.hidden, c.activation)
    return MoE(
        c.dim,
        c.expert_hidden,
        c.num_experts,
        c.top_k,
        c.capacity_factor,
        c.activation,
        norm_topk_prob=c.norm_topk_prob,
        load_balance_coefficient=c.load_balance_coefficient,
        z_loss_coefficient=c.z_loss_coefficient,
    )
