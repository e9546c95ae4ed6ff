"""Names in files that most families share, and what they are of a decoder's blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lightning_tex.models.config import DecoderConfig
from lightning_tex.pretrained.rules import Either, Rule


def embedding_and_head(config: DecoderConfig) -> Iterator[Rule]:
    """The first and the last matrices, and the norm between; a tied head may be there again."""
    yield Rule("model.embed_tokens.weight", ("embedding.weight",))
    for kind in norm_kinds(config):
        yield Rule(f"model.norm.{kind}", (f"norm.{kind}",))
    if config.head_bias:
        yield Rule("lm_head.bias", ("head.bias",))
    tied = config.tie_embeddings
    yield Rule("lm_head.weight", ("embedding.weight" if tied else "head.weight",), copy=tied)


def attention(theirs: str, ours: str, config: DecoderConfig) -> Iterator[Rule]:
    """Query, key, value and output of a block, their biases, and norms of queries and keys."""
    for their_name, our_name in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("o_proj", "out")):
        biased = config.attention_out_bias if our_name == "out" else config.attention_bias
        for kind in ("weight", "bias") if biased else ("weight",):
            yield Rule(f"{theirs}.self_attn.{their_name}.{kind}", (f"{ours}.attention.{our_name}.{kind}",))
    if config.qk_norm:
        for their_name, our_name in (("q_norm", "qk_norms.query"), ("k_norm", "qk_norms.key")):
            yield Rule(f"{theirs}.self_attn.{their_name}.weight", (f"{ours}.attention.{our_name}.weight",))


def norms(theirs: str, ours: str, config: DecoderConfig) -> Iterator[Rule]:
    """The norms before attention and before the feed-forward of a block."""
    for kind in norm_kinds(config):
        yield Rule(f"{theirs}.input_layernorm.{kind}", (f"{ours}.attention_norm.{kind}",))
        yield Rule(f"{theirs}.post_attention_layernorm.{kind}", (f"{ours}.mlp_norm.{kind}",))


def norm_kinds(config: DecoderConfig) -> tuple[str, ...]:
    """Parameters of a norm."""
    return ("weight", "bias") if config.norm == "layer" else ("weight",)


def dense_mlp(theirs: str, ours: str) -> Iterator[Rule]:
    """Gate, up and down of a block's MLP."""
    for name in ("gate", "up", "down"):
        yield Rule(f"{theirs}.{name}_proj.weight", (f"{ours}.{name}.weight",))


def experts(theirs: str, ours: str, count: int) -> Either:
    """A block's experts: a tensor each, or stacked ones with gate and up in one, as transformers 5 holds them.

    Args:
        theirs: such as ``model.layers.0.mlp.experts``.
        ours: such as ``blocks.0.mlp.experts``.
        count: of the experts.
    """
    each = tuple(
        Rule(f"{theirs}.{expert}.{name}_proj.weight", (f"{ours}.{name}",), expert=expert)
        for expert in range(count)
        for name in ("gate", "up", "down")
    )
    return Either((each, fused_experts(theirs, ours)))


def fused_experts(theirs: str, ours: str) -> tuple[Rule, ...]:
    """A block's experts stacked, gate and up in one."""
    return (
        Rule(f"{theirs}.gate_up_proj", (f"{ours}.gate", f"{ours}.up"), dim=1),
        Rule(f"{theirs}.down_proj", (f"{ours}.down",)),
    )


def shared_expert(theirs: str, ours: str, config: DecoderConfig, name: str = "shared_experts") -> Iterator[Rule]:
    """The expert that every token of a block uses, if there is one."""
    if config.shared_expert_hidden_dim is not None:
        yield from dense_mlp(f"{theirs}.mlp.{name}", f"{ours}.mlp.shared")


def latent_attention(theirs: str, ours: str, config: DecoderConfig) -> Iterator[Rule]:
    """Multi-head latent attention of a block."""
    parts = [("kv_a_proj_with_mqa", "key_value_latent", True), ("kv_a_layernorm", "key_value_latent_norm", False),
             ("kv_b_proj", "key_value", False), ("o_proj", "out", True)]  # fmt: skip
    if config.q_lora_rank is None:
        parts += [("q_proj", "query", False)]
    else:
        parts += [("q_a_proj", "query_latent", True), ("q_a_layernorm", "query_latent_norm", False),
                  ("q_b_proj", "query", False)]  # fmt: skip
    for their_name, our_name, may_have_bias in parts:
        for kind in ("weight", "bias") if may_have_bias and config.attention_bias else ("weight",):
            yield Rule(f"{theirs}.self_attn.{their_name}.{kind}", (f"{ours}.attention.{our_name}.{kind}",))


def corrected_router(theirs: str, ours: str, config: DecoderConfig) -> Iterator[Rule]:
    """A router's matrix and, if it has sigmoid scores, the bias that corrects its choices, which stays in fp32."""
    yield Rule(f"{theirs}.mlp.gate.weight", (f"{ours}.mlp.router.weight",))
    name = config.router if isinstance(config.router, str) else config.router["name"]
    if name == "sigmoid":
        bias = f"{ours}.mlp.router.correction_bias"
        yield Rule(f"{theirs}.mlp.gate.e_score_correction_bias", (bias,), dtype=torch.float32)
