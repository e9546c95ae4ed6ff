"""Tiny models of published families with random weights, made by transformers, and decoders with the same weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_tex.models import Decoder, DecoderConfig

VOCABULARY = 61
# A name in transformers, and that of the same tensor here.
NAMES = {
    r"model\.embed_tokens\.": "embedding.",
    r"model\.norm\.": "norm.",
    r"lm_head\.": "head.",
    r"model\.layers\.(\d+)\.": r"blocks.\1.",
    r"input_layernorm\.": "attention_norm.",
    r"post_attention_layernorm\.": "mlp_norm.",
    r"self_attn\.q_proj\.": "attention.query.",
    r"self_attn\.k_proj\.": "attention.key.",
    r"self_attn\.v_proj\.": "attention.value.",
    r"self_attn\.o_proj\.": "attention.out.",
    r"self_attn\.q_norm\.": "attention.qk_norms.query.",
    r"self_attn\.k_norm\.": "attention.qk_norms.key.",
    r"mlp\.up_proj\.": "mlp.up.",
    r"mlp\.down_proj\.": "mlp.down.",
    r"mlp\.gate\.weight$": "mlp.router.weight",
    r"mlp\.gate_proj\.": "mlp.gate.",
    r"mlp\.experts\.down_proj$": "mlp.experts.down",
}


def random_model(kind: str, **sizes: Any) -> nn.Module:
    """A family's model in transformers, every weight of which is random, norms and biases included."""
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    usual = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0, "rope_parameters": rope}
    config = getattr(transformers, f"{kind}Config")(**{**usual, **sizes})
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")._from_config(config, **plain)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and "inv_freq" not in name:
                usual_scale = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                tensor.copy_(usual_scale + 0.3 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def named_as_here(theirs: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Their tensors by our names."""
    found = {}
    for name, tensor in with_experts_apart(theirs).items():
        for pattern, ours in {**NAMES, **names}.items():
            name = re.sub(pattern, ours, name)
        found[name] = tensor
    return found


def with_experts_apart(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gate and up of experts, which they have in one tensor: one after the other, or in turn and transposed."""
    found = {}
    in_turn = any(name.endswith("gate_up_proj_bias") for name in theirs)
    for name, tensor in theirs.items():
        prefix, projection, suffix = name.partition("gate_up_proj")
        if projection and in_turn:
            found[f"{prefix}gate{suffix}"], found[f"{prefix}up{suffix}"] = (
                part if suffix else part.mT for part in (tensor[..., ::2], tensor[..., 1::2])
            )
        elif projection:
            found[f"{prefix}gate"], found[f"{prefix}up"] = tensor.chunk(2, 1)
        else:
            found[name] = tensor.mT if in_turn and name.endswith("experts.down_proj") else tensor
    return found


def with_the_weights_of(
    theirs: nn.Module,
    config: DecoderConfig,
    names: Mapping[str, str],
    norms_from_one: bool = False,
) -> Decoder:
    """A decoder with all tensors of a model of transformers, and no others.

    Args:
        norms_from_one: norms multiply by 1 and their weight there.
    """
    decoder = Decoder(config)
    tensors = named_as_here(theirs.state_dict(), names)
    if norms_from_one:
        tensors = {name: 1 + tensor if "norm" in name else tensor for name, tensor in tensors.items()}
    decoder.load_state_dict(tensors)
    return decoder.eval()


@torch.no_grad()
def relative_difference(decoder: Decoder, theirs: nn.Module, length: int = 23) -> float:
    """Of the logits of two sequences: the largest difference by the largest logit."""
    ids = torch.randint(1, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))
    expected = theirs(input_ids=ids).logits
    return float((decoder(ids) - expected).abs().max() / expected.abs().max())
