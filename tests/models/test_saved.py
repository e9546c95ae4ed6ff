"""A checkpoint of a sharded decoder with every kind of part is whole: biases, sinks, norms, and a router's buffer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers.behaviour_modules import new_trainer, on_data_axis
from helpers.perturbed import Perturbed, batches, config
from helpers.ranks import on_ranks
from helpers.trainers import gathered
from torch import Tensor

from lightning_tex.models import DecoderConfig
from lightning_tex.saving import consolidated

PARTS: dict[str, Any] = {
    "router": {"name": "sigmoid", "init_args": {"bias": True}}, "expert_bias": True, "shared_expert_hidden_dim": 6,
    "shared_expert_gate": True, "attention_sinks": True, "qk_norm": "full", "attention_bias": True, "norm": "layer",
    "head_bias": True, "tie_embeddings": False, "mlp_bias": True, "moe_layers": [1],
}  # fmt: skip
TED = {"tensor_parallel_size": 2, "expert_parallel_size": 2}


class Saved(Perturbed):
    """Built of nothing but its configuration, as a checkpoint's hyper-parameters have it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config if isinstance(config, DecoderConfig) else DecoderConfig(**config))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(dict(zip(("input_ids", "labels"), batch, strict=True)), batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(path: Path) -> dict[str, Tensor]:
    module, trainer = Saved(config(**PARTS)), new_trainer(TED)
    trainer.fit(module, on_data_axis(trainer, [list(batch.values()) for batch in batches()]))
    trainer.save_checkpoint(path)
    return {**gathered(module, trainer), **{name: buffer.clone() for name, buffer in module.named_buffers()}}


def test_a_sharded_decoder_is_saved_whole(tmp_path: Path) -> None:
    trained = on_ranks(4, fit, tmp_path / "one.ckpt")[0]
    checkpoint = consolidated(tmp_path / "one.ckpt", weights_only=True)
    module = Saved(checkpoint["hyper_parameters"]["config"])
    assert module.config == config(**PARTS)
    module.double().load_state_dict(checkpoint["state_dict"])
    loaded = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert loaded.keys() == trained.keys() and any("correction_bias" in name for name in loaded)
    for name, tensor in loaded.items():
        assert torch.equal(tensor.detach(), trained[name]), name
