"""The bias that balances a sigmoid router: what moves it, when, and that every layout moves it alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.behaviour_modules import FOLDED, TED, SmallDecoder, batches, loader, new_trainer, on_data_axis
from helpers.ranks import together
from helpers.trainers import quiet
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_tex import LanguageModel
from lightning_tex.models import DecoderConfig
from lightning_tex.moe import MoE, SigmoidRouter, step_is_over
from lightning_tex.parallel.errors import UserValueError

RATE = 0.05
ROUTER = {"name": "sigmoid", "init_args": {"bias_update_rate": RATE}}
SIZES = {"num_layers": 4, "router": ROUTER, "load_balance_coefficient": 0.0}


class Balanced(SmallDecoder):
    def __init__(self) -> None:
        super().__init__(**SIZES)

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.decoder(batch[0])


def biases(module: L.LightningModule) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers() if name.endswith("correction_bias")}


def test_it_rises_for_experts_below_the_mean_and_falls_for_those_above() -> None:
    layer = MoE(4, 4, 3, top_k=1, router=ROUTER, load_balance_coefficient=0.0)
    router = layer.router
    assert isinstance(router, SigmoidRouter)
    router.choose = lambda scores, tokens: torch.tensor([0, 0, 0, 1, 1, 2])[:, None]  # type: ignore[method-assign]
    layer(torch.randn(6, 4))
    layer.eval()(torch.randn(6, 4))
    layer.train()
    step_is_over(layer)
    assert torch.equal(router.correction_bias, RATE * torch.tensor([-1.0, 0.0, 1.0]))
    before = router.correction_bias.clone()
    step_is_over(layer)  # nothing was routed since
    layer(torch.randn(6, 4))
    step_is_over(layer, taken=False)
    step_is_over(layer)
    assert torch.equal(router.correction_bias, before)


def test_it_stays_without_a_rate_and_a_rate_is_not_negative() -> None:
    layer = MoE(4, 4, 3, top_k=1, router="sigmoid")
    layer(torch.randn(6, 4))
    step_is_over(layer)
    assert not layer.router.correction_bias.any()
    with pytest.raises(UserValueError, match="bias_update_rate=-1"):
        SigmoidRouter(4, 3, bias_update_rate=-1)


class Watched(Balanced):
    """Counts by itself what each layer's router chooses, and moves a bias of its own."""

    def __init__(self, accumulated: int) -> None:
        super().__init__()
        self.accumulated, self.passes = accumulated, 0
        self.routers = [layer.router for _, layer in self.decoder.moe_layers()]
        self.counts = [torch.zeros(4, dtype=torch.long) for _ in self.routers]
        self.expected = [torch.zeros(4) for _ in self.routers]
        for counts, router in zip(self.counts, self.routers, strict=True):
            router.register_forward_hook(lambda r, _, route, c=counts: self.see(r, route.indices, c))

    def see(self, router: Any, indices: Tensor, counts: Tensor) -> None:
        if router.training:
            counts += torch.bincount(indices.flatten(), minlength=4)

    def on_train_batch_end(self, *args: Any) -> None:
        self.passes += 1
        if self.passes % self.accumulated == 0:
            for counts, bias in zip(self.counts, self.expected, strict=True):
                bias += RATE * (counts.double().mean() - counts).sign().float()
                counts.zero_()


def watched(accumulated: int) -> list[tuple[Tensor, Tensor]]:
    """Of every layer the bias, and what it should be."""
    module = Watched(accumulated)
    trainer = new_trainer({}, max_epochs=3, accumulate_grad_batches=accumulated, val_check_interval=2)
    trainer.fit(module, loader(batches(4)), loader(batches(2, seed=1)))
    return [(router.correction_bias, bias) for router, bias in zip(module.routers, module.expected, strict=True)]


def test_it_is_moved_once_a_step_by_what_its_micro_steps_chose() -> None:
    for accumulated, (layers,) in together(1, {n: (watched, n) for n in (1, 2)}).items():
        assert any(bias.any() for bias, _ in layers)
        for bias, expected in layers:
            assert torch.equal(bias, expected), f"{accumulated} micro-steps"


def fit(layout: dict[str, Any], steps: int, folder: Path, begins: Path | None = None) -> dict[str, Tensor]:
    module = Balanced()
    saves = ModelCheckpoint(folder, "half-{step}", every_n_train_steps=steps // 2, save_top_k=-1)
    options = {"max_steps": steps, "max_epochs": -1, "accumulate_grad_batches": 2}
    trainer = new_trainer(layout, callbacks=[saves] if begins is None else [], **options)
    even = [[part[:, :4] for part in batch] for batch in batches(4)]  # two steps; sequence parallelism halves sequences
    trainer.fit(module, on_data_axis(trainer, even), ckpt_path=begins, weights_only=False)
    return biases(module)


SEQUENCE = {"sequence_parallel": True, "activation_checkpointing": "full"}
# By ranks; on the first of them a training goes on that has begun in one process.
LAYOUTS: Mapping[int, Mapping[str, dict[str, Any]]] = {
    2: {
        "expert": {"expert_parallel_size": 2},
        "folded": {"tensor_parallel_size": 2, "expert_parallel_size": 2, "expert_tensor_parallel_size": 1},
    },
    4: {
        "sequence parallel, recomputed": {**TED, **SEQUENCE},
        "folded, replayed": {**FOLDED, "activation_checkpointing": "communication_aware"},
        "ted": TED,
        "data": {},
    },
    8: {"folded, sequence parallel": {**FOLDED, **SEQUENCE}, "ted": TED, "data": {"expert_parallel_size": 1}},
}


@pytest.mark.parametrize(
    ("world", "steps", "count"),
    [(4, 4, 1), *(pytest.param(world, 20, len(LAYOUTS[world]), marks=pytest.mark.full) for world in LAYOUTS)],
)
def test_every_layout_has_the_same_biases_through_a_resume_on_another(
    world: int, steps: int, count: int, tmp_path: Path
) -> None:
    reference = together(1, {0: (fit, {}, steps, tmp_path / "one")})[0][0]
    first = next((tmp_path / "one").glob(f"half-step={steps // 2}*"))
    assert len(reference) == 2 and any(bias.any() for bias in reference.values())
    layouts = dict(list(LAYOUTS[world].items())[:count])
    runs = {name: (fit, layout, steps, tmp_path / name) for name, layout in layouts.items()}
    runs["resumed"] = (fit, next(iter(layouts.values())), steps, tmp_path / "resumed", first)
    for name, ranks in together(world, runs).items():
        for rank, found in enumerate(ranks):
            for key, bias in reference.items():
                assert torch.equal(found[key], bias), f"{key} on rank {rank} of {name}"


def language_model(strategy: str) -> dict[str, Tensor]:
    sizes = {"vocab_size": 61, "dim": 16, "num_heads": 2, "hidden_dim": 16, "num_experts": 4, "top_k": 2}
    given = [{"input_ids": ids, "labels": labels} for ids, labels in batches(5)]
    L.seed_everything(1, verbose=False)
    model = LanguageModel(DecoderConfig(**{**SIZES, **sizes}))
    options = {"max_epochs": 1, "limit_val_batches": 0, "use_distributed_sampler": False}
    quiet(strategy=strategy, devices=1, **options).fit(model, loader(given))
    return biases(model)


def test_they_move_for_a_language_model_under_any_strategy() -> None:
    runs = together(1, {strategy: (language_model, strategy) for strategy in ("auto", "tex_moe")})
    (plain,), (ours,) = runs["auto"], runs["tex_moe"]
    assert any(bias.any() for bias in plain.values())
    for name, bias in plain.items():
        assert torch.equal(bias, ours[name]), name
