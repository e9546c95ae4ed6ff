"""Tiny models of published families with random weights, as transformers writes them, and what it makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

VOCABULARY, LENGTH = 101, 12

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}

_QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 28, "norm_topk_prob": True}
_OLMOE_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}

_LATENT = {"num_key_value_heads": 6, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
_GROUPS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 2,
           "moe_intermediate_size": 14, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5}  # fmt: skip
_SHARED = {"shared_expert_intermediate_size": 18}
_YARN = {"rope_type": "yarn", "rope_theta": 700.0, "factor": 4.0, "original_max_position_embeddings": 16}
_WINDOWS = {"use_sliding_window": True, "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}  # fmt: skip

# By the name of the case: the class of its configuration, and options.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {**_SIZES, **_EXPERTS, "sliding_window": None, "head_dim": 10}),
    "llama, biases": ("LlamaConfig", {**_SIZES, "rms_norm_eps": 1e-5, "attention_bias": True}),
    "llama, tied head": ("LlamaConfig", {**_SIZES, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**_SIZES, "sliding_window": None}),
    "mistral, windows": ("MistralConfig", {**_SIZES, "sliding_window": 4}),
    "llama, stretched": ("LlamaConfig", {**_SIZES, "rope_parameters": _YARN}),
    "qwen2-moe": ("Qwen2MoeConfig", {**_SIZES, **_QWEN_EXPERTS, **_SHARED, **_WINDOWS}),
    "deepseek-v2": (
        "DeepseekV2Config",
        {**_SIZES, **_LATENT, **_GROUPS, "q_lora_rank": None, "topk_method": "group_limited_greedy"},
    ),
    "deepseek-v2, stretched": (
        "DeepseekV2Config",
        {**_SIZES, **_LATENT, **_GROUPS, "q_lora_rank": 7, "rope_parameters": {**_YARN, "mscale": 0.7}},
    ),
    "deepseek-v3": ("DeepseekV3Config", {**_SIZES, **_LATENT, **_GROUPS, "q_lora_rank": 7}),
    "glm-4-moe": (
        "Glm4MoeConfig",
        {**_SIZES, **_GROUPS, "head_dim": 8, "attention_bias": True, "use_qk_norm": True},
    ),
    "gpt-oss": ("GptOssConfig", {**_SIZES, **_EXPERTS, "head_dim": 10, "sliding_window": 4, "rope_parameters": _YARN}),
    "granite-moe": (
        "GraniteMoeConfig",
        {
            **_SIZES,
            **_EXPERTS,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.3,
            "logits_scaling": 2.5,
        },
    ),
    "phi-moe": (
        "PhimoeConfig",
        {**_SIZES, **_EXPERTS, "attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.2},
    ),
    "qwen3": ("Qwen3Config", {**_SIZES, "head_dim": 10}),
    "qwen3-moe": ("Qwen3MoeConfig", {**_SIZES, **_QWEN_EXPERTS, "head_dim": 10}),
    "qwen3-moe, dense blocks": ("Qwen3MoeConfig", {**_SIZES, **_QWEN_EXPERTS, "mlp_only_layers": [1]}),
    "qwen3-moe, every second": ("Qwen3MoeConfig", {**_SIZES, **_QWEN_EXPERTS, "decoder_sparse_step": 2}),
    "olmoe": (
        "OlmoeConfig",
        {**_SIZES, "num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 0.5, "pad_token_id": None},
    ),
}


def publish(case: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "60KB", **options: Any) -> Path:
    """A folder of one case, with weights that its norms, biases and routers do not leave at their first values."""
    transformers = pytest.importorskip("transformers")
    kind, sizes = CASES[case]
    torch.manual_seed(11)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**sizes, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    transformers.utils.logging.disable_progress_bar()
    model.to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # transformers keeps it in fp32
            buffer.data = 0.1 * torch.randn(buffer.shape)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def loaded(folder: Path) -> Any:
    """The folder's model, as transformers loads it, in fp32."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}  # others take even widths alone
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **plain)


def tensors(folder: Path) -> dict[str, Tensor]:
    """All that lies in a folder's safetensors files."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def require_equal_tensors(first: Path, second: Path) -> None:
    """Names, dtypes, shapes and every bit."""
    ones, others = tensors(first), tensors(second)
    assert ones.keys() == others.keys(), ones.keys() ^ others.keys()
    for name, one in ones.items():
        assert one.dtype == others[name].dtype and torch.equal(one, others[name]), name


def token_ids(rows: int, seed: int = 3) -> Tensor:
    """Random ids of the vocabulary: [rows, LENGTH + 1]."""
    return torch.randint(0, VOCABULARY, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(seed))


class Rows(torch.utils.data.Dataset):
    """Ids and the next ones, as a text data module's batches have them."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[row, :-1], "labels": self.ids[row, 1:]}


def stepped(folder: Path, ids: Tensor, lr: float) -> dict[str, Tensor]:
    """Parameters, as transformers names them in files, after one step of SGD on the mean loss of all next tokens."""
    model = loaded(folder)
    logits = model(ids[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    torch.optim.SGD(model.parameters(), lr=lr).step()
    there = folder.with_name(f"{folder.name}, stepped")
    model.save_pretrained(there)
    return tensors(there)


def changed_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change ``config.json`` in place."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
