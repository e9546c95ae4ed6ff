"""A decoder's block: attention and feed-forward with their norms, each the module that the configuration names."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_tex.layers import (
    Context,
    LayerNorm,
    ParallelAttention,
    ParallelLatentAttention,
    ParallelMLP,
    RMSNorm,
    RotaryTables,
)
from lightning_tex.models.config import DecoderConfig
from lightning_tex.moe import MoE

# B sequences, S positions, D model width


class Block(nn.Module):
    """Attention and feed-forward, each normed before or after, and added: [B, S, D] -> [B, S, D].

    Args:
        config: of the decoder.
        layer: the block's place in it, from 0.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        before, after = config.norm_placement != "post", config.norm_placement != "pre"
        self.attention_norm = make_norm(config) if before else nn.Identity()
        self.attention = make_attention(config, layer)
        self.attention_output_norm = make_norm(config) if after else nn.Identity()
        self.mlp_norm = make_norm(config) if before else nn.Identity()
        self.mlp = make_feed_forward(config, layer)
        self.mlp_output_norm = make_norm(config) if after else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.multiplier = config.residual_multiplier

    def forward(
        self,
        x: Tensor,
        context: Context | None = None,
        rotary: RotaryTables | None = None,
        token_ids: Tensor | None = None,
    ) -> Tensor:
        attended = self.attention(self.attention_norm(x), context=context, rotary=rotary)
        x = x + self._branch(self.attention_output_norm(attended))
        return x + self._branch(self.mlp_output_norm(self._feed_forward(self.mlp_norm(x), context, token_ids)))

    def _branch(self, x: Tensor) -> Tensor:
        x = self.dropout(x)
        return x if self.multiplier == 1 else x * self.multiplier

    def _feed_forward(self, x: Tensor, context: Context | None, token_ids: Tensor | None) -> Tensor:
        if isinstance(self.mlp, MoE):
            return self.mlp(x, None if context is None else context.token_mask, token_ids=token_ids)
        return self.mlp(x)


def make_norm(config: DecoderConfig) -> nn.Module:
    """A norm over the model width."""
    kind = {"rms": RMSNorm, "layer": LayerNorm}[config.norm]
    return kind(config.dim, eps=config.norm_eps)


def make_attention(config: DecoderConfig, layer: int) -> nn.Module:
    """A block's attention, which takes ``(x, context=, rotary=)``."""
    c = config
    if c.kv_lora_rank is not None:
        return make_latent_attention(c)
    return ParallelAttention(
        c.dim,
        c.num_heads,
        c.num_kv_heads,
        c.attention_bias,
        dropout=c.dropout,
        head_dim=c.head,
        out_bias=c.attention_out_bias,
        qk_norm=c.qk_norm,
        norm_eps=c.norm_eps,
        clip_qkv=c.clip_qkv,
        rotary=c.rotary,
        window=c.window(layer),
        sinks=c.attention_sinks,
        scale=c.attention_multiplier,
        softcap=c.attn_logit_softcapping,
    )


def make_latent_attention(config: DecoderConfig) -> nn.Module:
    """The same of a decoder with latent attention."""
    c = config
    assert c.kv_lora_rank and c.qk_nope_head_dim and c.qk_rope_head_dim and c.v_head_dim, c
    return ParallelLatentAttention(
        c.dim,
        c.num_heads,
        c.kv_lora_rank,
        c.qk_nope_head_dim,
        c.qk_rope_head_dim,
        c.v_head_dim,
        c.q_lora_rank,
        c.attention_bias,
        c.rotary,
        dropout=c.dropout,
    )


def make_feed_forward(config: DecoderConfig, layer: int) -> nn.Module:
    """A block's experts or MLP."""
    c = config
    if not c.has_experts(layer):
        return ParallelMLP(c.dim, c.hidden, c.activation, c.mlp_bias)
    return MoE(
        c.dim,
        c.expert_hidden,
        c.num_experts,
        c.top_k,
        c.capacity_factor,
        c.activation,
        c.router,
        c.norm_topk_prob,
        load_balance_coefficient=c.load_balance_coefficient,
        z_loss_coefficient=c.z_loss_coefficient,
        round_factor=c.round_factor,
        shared_hidden_dim=c.shared_expert_hidden_dim,
        shared_gate=c.shared_expert_gate,
        bias=c.expert_bias,
        sequence_balance_coefficient=c.sequence_balance_coefficient,
        step_balance_coefficient=c.step_balance_coefficient,
        entropy_coefficient=c.entropy_coefficient,
        eval_capacity_factor=c.eval_capacity_factor,
        min_capacity=c.min_capacity,
        overflow_by=c.overflow_by,
        expert_module=c.expert_module,
        residual_hidden_dim=c.residual_hidden_dim,
        zero_experts=c.zero_experts,
        identity_experts=c.identity_experts,
    )
