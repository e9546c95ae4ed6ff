"""Frozen parameters and learning rates by pattern: the right ones, on every layout as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.perturbed import Perturbed, batches, config
from helpers.published_folders import Rows, loaded, publish, require_equal_tensors, tensors, token_ids
from helpers.ranks import together
from helpers.trainers import quiet
from torch.utils.data import DataLoader

from lightning_tex import LanguageModel, TexMoEStrategy
from lightning_tex.lora import LoRAConfig
from lightning_tex.models import DecoderConfig
from lightning_tex.models.exporting import export
from lightning_tex.optim import scaled_groups, train_only
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.recipe.lightning_cli import _configure_optimizers
from lightning_tex.testing import assert_trains_alike

SMALL = DecoderConfig(61, 24, 2, 4, num_experts=4, hidden_dim=20, moe_every=1)


def language_model(**options: Any) -> LanguageModel:
    module = LanguageModel(SMALL, **options)
    module.configure_model()
    return module


def trained(module: torch.nn.Module) -> set[str]:
    return {name.removeprefix("decoder.") for name, p in module.named_parameters() if p.requires_grad}


ALL = trained(language_model())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"frozen": ["router"]}, {name for name in ALL if ".router." not in name}),
        ({"frozen": ["*"], "trainable": ["*"]}, None),
        ({"trainable": ["blocks.1"]}, {name for name in ALL if name.startswith("blocks.1.")}),
        ({"trainable": ["head"]}, {"embedding.weight"}),  # is one with the head's
        ({"trainable": ["attention.*", "experts.down"], "frozen": ["blocks.0"]},
         {name for name in ALL if name.startswith("blocks.1.") and (".attention." in name or "experts.down" in name)}),
        ({"trainable": ["blocks.*.mlp_norm", "decoder.norm"]},
         {"blocks.0.mlp_norm.weight", "blocks.1.mlp_norm.weight", "norm.weight"}),
        ({"trainable": ["*_norm"], "frozen": ["b*.0"]}, {"blocks.1.mlp_norm.weight", "blocks.1.attention_norm.weight"}),
    ],
)  # fmt: skip
def test_parameters_are_trained_by_pattern(options: dict[str, Any], expected: set[str] | None) -> None:
    if expected is None:
        with pytest.raises(UserValueError, match="leave nothing to train"):
            language_model(**options)
    else:
        assert trained(language_model(**options)) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"frozen": ["atention"]}, "frozen: 'atention' is of no parameter; the nearest names are 'attention'"),
        ({"trainable": ["block.0"]}, "trainable: 'block.0' is of no parameter; the nearest names are 'blocks.0'"),
        ({"lr_scale": {"expert": 0.1}}, "lr_scale: 'expert' is of no parameter that is trained; .* 'experts'"),
        ({"lr_scale": {"router": 0.1}, "frozen": ["router"]}, "lr_scale: 'router' is of no parameter that is trained"),
        ({"lr_scale": {"router": 0.0}}, r"lr_scale\['router'\]=0.0; legal: above 0 \(frozen=\['router'\]"),
    ],
)
def test_what_is_not_legal_is_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserValueError, match=words):
        language_model(**options).configure_optimizers()


def rates(optimizer: torch.optim.Optimizer, module: torch.nn.Module) -> dict[str, float]:
    of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return {name.removeprefix("decoder."): of[id(p)] for name, p in module.named_parameters() if id(p) in of}


def test_rates_are_those_of_the_first_pattern_in_own_and_named_optimizers() -> None:
    module = language_model(frozen=["router"], lr_scale={"blocks.0": 0.5, "embedding": 0.1, "attention": 2.0})
    factors = {
        name: 0.5 if "blocks.0" in name else 0.1 if "embedding" in name else 2.0 if "attention." in name else 1.0
        for name in trained(module)
    }
    own = module.configure_optimizers()
    assert rates(own, module) == pytest.approx({name: 3e-4 * factor for name, factor in factors.items()})
    decays = {group["weight_decay"] for group in own.param_groups}
    assert decays == {0.0, 0.1} and all(p.requires_grad for group in own.param_groups for p in group["params"])
    named = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.25}}
    scheduler = {"class_path": "torch.optim.lr_scheduler.LinearLR", "init_args": {"start_factor": 0.5}}
    built = _configure_optimizers(module, named, scheduler)["optimizer"]
    assert rates(built, module) == pytest.approx({name: 0.125 * factor for name, factor in factors.items()})
    with pytest.raises(UserValueError, match="lr_scale needs the optimizer's lr"):
        _configure_optimizers(module, {"class_path": "torch.optim.SGD", "init_args": {}}, None)


# --- training


class Partly(Perturbed):
    """Some parameters of every kind are frozen, others are trained at rates of their own, by SGD."""

    def __init__(self) -> None:
        super().__init__(config(shared_expert_hidden_dim=16, attention_bias=True))
        train_only(self, frozen=["blocks.0.*.router", "blocks.1.*.up", "blocks.1.*.query", "blocks.0.attention_norm"])
        self.lr_scale = {"experts": 3.0, "bias": 0.5, "blocks.1.attention": 0.25}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(scaled_groups(self, [{"params": self.parameters()}], 0.05, self.lr_scale))


def test_one_step_takes_what_the_rates_say() -> None:
    module = Partly()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer = quiet(strategy="auto", max_steps=1)
    gradients: dict[str, torch.Tensor] = {}
    module.on_before_optimizer_step = lambda _: gradients.update(  # type: ignore[method-assign]
        {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    )
    module.validation_step = None  # type: ignore[assignment]
    trainer.fit(module, DataLoader(batches(), batch_size=None))
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            assert name not in gradients and torch.equal(parameter, before[name]), name
            continue
        factor = 3.0 if ".experts." in name else 0.5 if name.endswith("bias") else 1.0
        factor = 0.25 if factor == 1 and "blocks.1.attention." in name else factor
        step = before[name] - parameter.detach()
        torch.testing.assert_close(step, 0.05 * factor * gradients[name], rtol=1e-3, atol=1e-7)


TED = {"devices": 4, "tensor_parallel_size": 2, "expert_parallel_size": 2}
LAYOUTS: list[dict[str, Any]] = [
    {**TED, "sequence_parallel": True, "zero_stage": 2},
    {**TED, "expert_parallel_size": 4, "expert_tensor_parallel_size": 1, "activation_checkpointing": "full"},
    {**TED, "zero_stage": 0},
    {"devices": 4, "expert_parallel_size": 4},
]


@pytest.mark.parametrize("layout", [*LAYOUTS[:2], *(pytest.param(one, marks=pytest.mark.full) for one in LAYOUTS[2:])])
def test_layouts_train_as_one_process(layout: dict[str, Any]) -> None:
    assert_trains_alike(Partly, batches(2), layouts=[layout], steps=2, tolerance=1e-10, optimizer=None)


# --- checkpoints

LORA = LoRAConfig(rank=2, targets=("query", "experts.*"))
PARTS: dict[str, Any] = {"frozen": ["embedding", "experts.up"], "lr_scale": {"attention": 0.1, "experts": 2.0}}
BESIDE: dict[str, Any] = {"lora": LORA, "trainable": ["*_norm", "o*.weight"], "frozen": ["blocks.0.*"]}


def fit(
    folder: Path, out: Path, name: str, epochs: int, begun: str | None, layout: dict[str, Any], **options: Any
) -> None:
    torch.manual_seed(0)  # of the adapters that are drawn
    model = LanguageModel.from_pretrained(folder, load_balance_coefficient=0.0, **options)
    trainer = quiet(devices=2, strategy=TexMoEStrategy(**layout), max_epochs=epochs)
    rows = DataLoader(Rows(token_ids(8)), batch_size=2 * layout.get("tensor_parallel_size", 1))
    trainer.fit(model, rows, ckpt_path=None if begun is None else out / f"{begun}.ckpt")
    trainer.save_checkpoint(out / f"{name}.ckpt")
    model.save_pretrained(out / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish("qwen3-moe", tmp_path_factory.mktemp("published") / "qwen3")


@pytest.fixture(scope="module")
def runs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    tensor = {"tensor_parallel_size": 2}
    spread = {"zero_stage": 2, "save_distributed_checkpoint": False}

    def run(name: str, epochs: int, begun: str | None, layout: dict[str, Any], options: dict[str, Any]) -> Any:
        return _fit, folder, out, name, epochs, begun, layout, options

    together(2, {
        "one": run("one", 1, None, tensor, PARTS),
        "two": run("two", 2, None, tensor, PARTS),
        "beside": run("beside", 1, None, tensor, BESIDE),
        "beside two": run("beside two", 2, None, tensor, BESIDE),
    }, timeout=60)  # fmt: skip
    together(2, {
        "resumed": run("resumed", 2, "one", spread, PARTS),
        "beside resumed": run("beside resumed", 2, "beside", spread, BESIDE),
    }, timeout=60)  # fmt: skip
    return out


def _fit(*args: Any) -> None:
    fit(*args[:-1], **args[-1])


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_a_run_goes_on_on_another_layout_and_frozen_parameters_stay(folder: Path, runs: Path) -> None:
    begun, two, resumed = tensors(folder), tensors(runs / "two"), tensors(runs / "resumed")
    for name in begun:
        assert difference(resumed[name], two[name]) < 1e-5, name
        frozen = "embed_tokens" in name or ".up_proj" in name
        assert torch.equal(two[name], begun[name]) == frozen, name
    content = torch.load(runs / "resumed.ckpt", weights_only=True)
    assert content["hyper_parameters"]["lr_scale"] == PARTS["lr_scale"]
    states = content["optimizer_states"][0]
    assert len(states["param_groups"]) == 5  # matrices: the rest, attention, experts; vectors: the rest, attention
    assert len(states["state"]) < len(content["state_dict"]) == len({*content["state_dict"]})


def test_what_is_trained_beside_adapters_is_saved_with_them(folder: Path, runs: Path, tmp_path: Path) -> None:
    begun, two, resumed = tensors(folder), tensors(runs / "beside two"), tensors(runs / "beside resumed")
    for name in begun:
        assert difference(resumed[name], two[name]) < 1e-5, name
        adapted = "q_proj" in name or ".experts." in name or "layernorm" in name or "o_proj" in name
        assert torch.equal(two[name], begun[name]) != (adapted and "layers.0." not in name), name
    content = torch.load(runs / "beside resumed.ckpt", weights_only=True)
    kept = {name for name in content["state_dict"] if "adapter" not in name}
    assert kept == {
        f"decoder.blocks.{block}.{name}.weight"
        for block in (1, 2)
        for name in ("attention_norm", "mlp_norm", "attention.out", "attention.qk_norms.query")
    } - {f"decoder.blocks.{block}.attention.qk_norms.query.weight" for block in (1, 2)}
    with pytest.warns(UserWarning, match="no tokenizer"):
        export(runs / "beside two.ckpt", tmp_path / "exported")
    require_equal_tensors(tmp_path / "exported", runs / "beside two")
    assert loaded(tmp_path / "exported") is not None
    model = LanguageModel.from_pretrained(folder, **BESIDE)
    model.configure_model()
    with pytest.raises(UserValueError, match="besides its adapters the model trains"):
        model.save_adapters(tmp_path / "adapters")
