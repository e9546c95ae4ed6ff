"""More or fewer experts of a trained model: equal logits where they are promised, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.published_folders import loaded, publish, token_ids
from helpers.ranks import on_ranks
from helpers.trainers import quiet
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_tex import LanguageModel, TexMoEStrategy
from lightning_tex.cli import main
from lightning_tex.models import DecoderConfig
from lightning_tex.models.growing import grow
from lightning_tex.models.growth import Add, Growth, Split
from lightning_tex.models.removal import Remove, dead_experts
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.saving import consolidated, load_from_checkpoint

SIZES: dict[str, Any] = {
    "vocab_size": 61, "dim": 16, "num_layers": 4, "num_heads": 4, "hidden_dim": 24, "num_experts": 4, "top_k": 2,
    "activation": "swiglu",
}  # fmt: skip
SIGMOID = {"name": "sigmoid", "init_args": {"bias_update_rate": 0.01}}
GROUPED = {"name": "softmax", "init_args": {"n_group": 2, "topk_group": 1, "bias": True}}
BLOCKS = (1, 3)
# Experts of each block whose router rows are so low that nobody chooses them.
UNUSED = {1: [0, 2], 3: [1, 2]}


def trained(**options: Any) -> LanguageModel:
    """A model of random weights in fp64, with biases that differ and some experts that nobody chooses."""
    torch.manual_seed(0)
    model = LanguageModel(DecoderConfig(**{**SIZES, **options}))
    model.configure_model()
    model.double()
    for block, layer in model.decoder.moe_layers():
        if "correction_bias" in dict(layer.router.named_buffers()):
            layer.router.correction_bias.copy_(torch.tensor([0.1, -0.2, 0.05, 0.0])[: layer.num_experts])
            layer.router.correction_bias[UNUSED[block]] -= 3
    return model


def logits(model: LanguageModel) -> Tensor:
    ids = torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(ids)


def save(model: LanguageModel, path: Path) -> Path:
    trainer = quiet(strategy="auto", devices=1, precision="64-true")
    trainer.strategy.connect(model)
    checkpoint = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    checkpoint["pytorch-lightning_version"] = "2.6.0"
    torch.save(checkpoint, path)
    return path


def grown(model: LanguageModel, growth: Growth, folder: Path) -> tuple[LanguageModel, tuple[str, ...]]:
    made = grow(save(model, folder / "old.ckpt"), folder / "new.ckpt", growth)
    new = load_from_checkpoint(LanguageModel, folder / "new.ckpt").double()
    assert new.config == made.config
    assert sum(p.numel() for p in new.parameters()) == made.parameters
    new.load_state_dict(consolidated(folder / "new.ckpt")["state_dict"])  # in fp64
    return new, made.differences


EXACT = {
    "copies": (Split(2), {}),
    "copies of scores that do not sum to 1": (Split(3), {"norm_topk_prob": True}),
    "parts": (Split(2, granular=True), {"expert_bias": True}),
    "parts, weights that sum to 1": (Split(3, granular=True), {"norm_topk_prob": True, "activation": "gelu"}),
    "copies of sigmoids": (Split(2), {"router": SIGMOID, "expert_bias": True}),
    "parts of sigmoids": (Split(2, granular=True), {"router": SIGMOID, "norm_topk_prob": True}),
    "copies in groups": (Split(2), {"router": GROUPED, "shared_expert_hidden_dim": 8}),
    "copies of switch's": (Split(2), {"router": "switch", "top_k": 1}),
    "one copy of one, sigmoids": (Split(2, top_k=1), {"router": SIGMOID, "top_k": 1}),
    "copies that choose": (Split(2), {"router": "expert_choice"}),
    "copies with a capacity": (Split(2), {"capacity_factor": 0.6}),
    "copies of modules": (Split(2), {"expert_module": "tests_own_experts", "norm_topk_prob": True}),
    "added to sigmoids": (Add(3), {"router": SIGMOID}),
    "added, one of weight 1": (Add(2), {"top_k": 1, "norm_topk_prob": True}),
    "removed from sigmoids": (Remove(UNUSED), {"router": SIGMOID}),
}


DEFAULT = ("copies", "parts, weights that sum to 1", "copies of sigmoids", "added to sigmoids", "removed from sigmoids")


class Expert(torch.nn.Linear):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__(dim, dim)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in DEFAULT else pytest.mark.full) for n in EXACT])
def test_logits_stay_equal_where_it_is_said(name: str, tmp_path: Path) -> None:
    growth, options = EXACT[name]
    if "expert_module" in options:
        options = {**options, "expert_module": f"{__name__}.Expert"}
    model = trained(**options)
    new, differences = grown(model, growth, tmp_path)
    assert not differences
    before, after = logits(model), logits(new)
    assert (after - before).norm() / before.norm() < 1e-12
    used = {block: layer.num_experts for block, layer in new.decoder.moe_layers()}
    assert used == dict.fromkeys(BLOCKS, growth.sizes(model.config)[0])


NEARLY = {
    "copies take places": (Split(2, top_k=2), {"norm_topk_prob": True}, "top_k=2 of 8"),
    "noise": (Split(2, noise=0.1), {}, "noise=0.1"),
    "a softmax over more": (Add(2), {}, "copies take a share"),
    "a softmax over fewer": (Remove({1: [0], 3: [3]}), {}, "scores of those that are gone"),
    "a smaller capacity": (Add(2), {"router": SIGMOID, "capacity_factor": 0.6}, "capacity_factor=0.6"),
    "best two of a group": (
        Split(2), {"router": {"name": "sigmoid", "init_args": {"n_group": 2, "topk_group": 1}}}, "top2_sum",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "noise" else pytest.mark.full) for n in NEARLY])
def test_what_changes_logits_is_said(name: str, tmp_path: Path) -> None:
    growth, options, told = NEARLY[name]
    model = trained(**options)
    new, differences = grown(model, growth, tmp_path)
    assert any(told in difference for difference in differences)
    before, after = logits(model), logits(new)
    assert 1e-9 < (after - before).norm() / before.norm() < 1


def test_noise_tells_copies_apart_and_repeats_with_the_seed(tmp_path: Path) -> None:
    old = save(trained(), tmp_path / "old.ckpt")
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        grow(old, tmp_path / name, Split(2, noise=0.1), seed=seed)
    one, again, other = (
        load_from_checkpoint(LanguageModel, tmp_path / name).state_dict() for name in ("one", "again", "other")
    )
    up = "decoder.blocks.1.mlp.experts.up"
    before = torch.load(old)["state_dict"][up]
    assert torch.equal(one[up], again[up]) and not torch.equal(one[up], other[up])
    assert torch.equal(one[up][::2], before)
    assert ((one[up][1::2] - before).std() / before.std()).item() == pytest.approx(0.1, rel=0.1)


def test_those_that_are_copied_come_by_their_order(tmp_path: Path) -> None:
    model = trained()
    new, _ = grown(model, Add(2, like={1: [3, 1, 0, 2], 3: [2, 0, 1, 3]}), tmp_path)
    before, after = model.state_dict(), new.state_dict()
    for block, (first, second) in {1: (3, 1), 3: (2, 0)}.items():
        name = f"decoder.blocks.{block}.mlp.experts.down"
        assert torch.equal(after[name][4], before[name][first]) and torch.equal(after[name][5], before[name][second])


@pytest.mark.parametrize(
    ("growth", "options", "told"),
    [
        (Split(1), {}, "split=1; legal: at least 2"),
        (Split(5, granular=True), {}, "split=5 with granular=True of experts of 24"),
        (Split(2, granular=True, top_k=2), {}, "top_k=2 with granular=True; legal: 4"),
        (Split(2, granular=True, noise=0.1), {}, "noise=0.1 with granular=True"),
        (Split(2), {"router": "hash"}, "router='hash' chooses by no weights"),
        (Split(2), {"router": "gshard"}, "top_k=4; legal: 2"),
        (Split(2, top_k=9), {}, "top_k=9"),
        (Add(3), {"router": GROUPED}, "add=3 to num_experts=4 in 2 groups"),
        (Add(5), {}, "add=5 to num_experts=4"),
        (Remove({1: [0, 1, 2], 3: [0, 1, 2]}), {}, "leaves 1 of num_experts=4, with top_k=2; legal: at most 2 fewer"),
        (Remove({1: [0], 3: [0, 1]}), {}, "block 1: 1; block 3: 2"),
        (Remove({1: [0, 1], 3: [0, 2]}), {"router": GROUPED}, "block 1: 2, 0; block 3: 1, 1"),
        (Remove({1: [4], 3: [0]}), {}, "expert 4 of num_experts=4"),
        (Remove({0: [0], 1: [0], 3: [0]}), {}, "block 0; legal, those with experts: 1, 3"),
    ],
    ids=str,
)
def test_what_is_not_legal_is_refused_with_its_numbers(
    growth: Growth, options: dict[str, Any], told: str, tmp_path: Path
) -> None:
    old = save(trained(**options), tmp_path / "old.ckpt")
    with pytest.raises(UserValueError, match=told):
        grow(old, tmp_path / "new.ckpt", growth)
    assert not (tmp_path / "new.ckpt").exists()


def test_dead_experts_are_as_many_of_every_block() -> None:
    assert dead_experts({1: [0, 5, 0, 0], 3: [4, 0, 2, 0]}) == {1: [0, 2], 3: [1, 3]}
    with pytest.raises(UserValueError, match="block 1: 1, block 3: 0"):
        dead_experts({1: [0, 5], 3: [1, 1]})


def tokens() -> DataLoader:
    ids = torch.randint(61, (16, 9), generator=torch.Generator().manual_seed(0))
    return DataLoader([{"input_ids": row[:-1], "labels": row[1:]} for row in ids], batch_size=8)  # type: ignore[arg-type]


def fit_and_save(path: str) -> None:
    trainer = quiet(devices=2, strategy=TexMoEStrategy(tensor_parallel_size=2), precision="bf16-true", max_steps=1)
    trainer.fit(LanguageModel(DecoderConfig(**SIZES)), tokens())
    trainer.save_checkpoint(path)


def continue_from(path: str) -> float:
    """Of a new run on another layout that begins with it: the first loss."""
    strategy = TexMoEStrategy(expert_parallel_size=2, init_from=path)
    trainer = quiet(devices=2, strategy=strategy, max_steps=1)
    trainer.fit(LanguageModel(replace(DecoderConfig(**SIZES), num_experts=8, top_k=4)), tokens())
    return float(trainer.callback_metrics["train_loss"])


def test_a_run_begins_with_it_on_another_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.ckpt", tmp_path / "new.ckpt"
    on_ranks(2, fit_and_save, str(old))
    main(["experts", str(old), str(new), "--split", "2", "--json"])
    told = capsys.readouterr().out.splitlines()
    report = json.loads(told[-1])
    assert report["num_experts"] == 8 and report["top_k"] == 4 and report["differences"] == []
    assert "logits stay equal" in " ".join(told)
    losses = on_ranks(2, continue_from, str(new))
    assert losses[0] == losses[1]
    model = load_from_checkpoint(LanguageModel, new)
    assert model.decoder.blocks[1].mlp.experts.up.dtype == torch.float32  # the masters'
    ids, labels = (torch.cat([batch[name] for batch in tokens()]) for name in ("input_ids", "labels"))
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), labels.flatten())
    assert losses[0] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
@torch.no_grad()
def test_a_published_folder_becomes_one_that_transformers_loads(family: str, tmp_path: Path) -> None:
    old = publish(family, tmp_path / "old")
    main(["experts", str(old), str(tmp_path / "new"), "--split", "2", "--granular"])
    ids = token_ids(3)
    expected, found = loaded(old)(ids).logits, loaded(tmp_path / "new")(ids).logits
    assert (found - expected).norm() / expected.norm() < 1e-5
    with pytest.raises(FileExistsError):
        grow(old, tmp_path / "new", Split(2))
