"""Models of every family are those of transformers: logits, one step of training, and every bit on the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.published_folders import (
    CASES,
    Rows,
    changed_config,
    loaded,
    publish,
    require_equal_tensors,
    stepped,
    tensors,
    token_ids,
)
from helpers.ranks import together
from helpers.trainers import quiet
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from lightning_tex import LanguageModel, TexMoEStrategy
from lightning_tex.models.families import FAMILIES

cases = pytest.mark.parametrize("case", CASES)
ROWS, RATE = 4, 0.5

# On 4 ranks; experts are spread over as many as the layout allows.
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor 2 x expert 2": {"tensor_parallel_size": 2},
    "sequence parallelism": {"tensor_parallel_size": 2, "sequence_parallel": True},
    "folding": {"tensor_parallel_size": 2, "expert_tensor_parallel_size": 1},
    "folding, sequence parallelism": {
        "tensor_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
        "sequence_parallel": True,
    },
    "expert 4": {"zero_stage": 2},
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    return {case: publish(case, folder / case) for case in CASES}


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@cases
@torch.no_grad()
def test_logits_are_those_of_transformers(case, published):
    ids = token_ids(ROWS)[:, :-1]
    model = LanguageModel.from_pretrained(published[case])
    model.configure_model()
    assert difference(model(ids), loaded(published[case])(ids).logits) < 1e-5


@cases
def test_what_was_read_is_written_again_to_the_bit(case, published, tmp_path):
    model = LanguageModel.from_pretrained(published[case])
    model.configure_model()
    model.save_pretrained(tmp_path / "out", max_shard_size="70KB")
    require_equal_tensors(published[case], tmp_path / "out")
    ours, theirs = (loaded(folder).config.to_dict() for folder in (tmp_path / "out", published[case]))
    assert {**ours, "_name_or_path": None} == {**theirs, "_name_or_path": None}


@cases
def test_sixteen_bits_become_any_precision_and_come_back_to_the_bit(case, tmp_path):
    model = LanguageModel.from_pretrained(publish(case, tmp_path / "in", torch.bfloat16))
    model.configure_model()
    assert model.decoder.embedding.weight.dtype == torch.float32
    model.save_pretrained(tmp_path / "out")
    require_equal_tensors(tmp_path / "in", tmp_path / "out")


@pytest.fixture(scope="module")
def trained(published, tmp_path_factory, request):
    """Folders of every family after one step, by case and layout; logits before it."""
    out = tmp_path_factory.mktemp("trained")
    wanted = {tuple(item.callspec.params[name] for name in ("case", "layout"))
              for item in request.session.items if "layout" in getattr(getattr(item, "callspec", None), "params", {})
              and item.path == request.path}  # fmt: skip
    runs = {(case, layout): (_train, published[case], LAYOUTS[layout], out / f"{case}, {layout}")
            for case, layout in sorted(wanted)}  # fmt: skip
    return {key: (out / ", ".join(key), results[0]) for key, results in together(4, runs, timeout=300).items()}


def _train(folder: Path, layout: dict[str, Any], out: Path) -> torch.Tensor:
    """Take a step on the layout and write what came of it; the logits of all rows before it, in their order."""
    model = _Stepped.from_pretrained(folder, load_balance_coefficient=0.0)
    strategy = TexMoEStrategy(**layout)
    trainer = quiet(devices=4, strategy=strategy, max_steps=1, use_distributed_sampler=True)
    data = DataLoader(Rows(token_ids(ROWS)), batch_size=ROWS * layout.get("tensor_parallel_size", 1) // 4)
    before = torch.cat(trainer.predict(model, data))
    trainer.fit(model, DataLoader(data.dataset, batch_size=data.batch_size, shuffle=False))
    model.save_pretrained(out, dtype="float32", max_shard_size="70KB")
    rows = torch.zeros(ROWS, *before.shape[1:])
    rows[strategy.topology.data.rank :: strategy.topology.data.size] = before
    if strategy.topology.tensor.rank:
        rows.zero_()
    return strategy.reduce(rows, torch.distributed.group.WORLD, "sum")


class _Stepped(LanguageModel):
    def predict_step(self, batch, batch_idx):
        return self.decoder.logits(batch["input_ids"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=RATE)


# Each layout by some families; all on all in full.
_CHOSEN = {
    ("mixtral", "sequence parallelism"),
    ("llama, tied head", "tensor 2 x expert 2"),
    ("qwen2-moe", "tensor 2 x expert 2"),
    ("qwen3-moe", "folding"),
    ("olmoe", "expert 4"),
    ("deepseek-v3", "folding"),
    ("gpt-oss", "sequence parallelism"),
}


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        pytest.param(case, layout, marks=[] if (case, layout) in _CHOSEN else pytest.mark.full)
        for case in CASES
        for layout in LAYOUTS
    ],
)
def test_a_layout_has_the_logits_and_takes_the_step_of_transformers(case, layout, published, trained):
    folder, logits = trained[case, layout]
    with torch.no_grad():
        assert difference(logits, loaded(published[case])(token_ids(ROWS)[:, :-1]).logits) < 1e-5
    require_the_step_of_transformers(published[case], folder)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in ("qwen2-moe", "glm-4-moe") else pytest.mark.full) for case in CASES]
)
@pytest.mark.filterwarnings("ignore:You defined a `validation_step`", "ignore:.*does not have many workers")
def test_one_process_takes_the_step_of_transformers(case, published, tmp_path):
    model = _Stepped.from_pretrained(published[case], load_balance_coefficient=0.0)
    quiet(devices=1, max_steps=1).fit(model, DataLoader(Rows(token_ids(ROWS)), batch_size=ROWS))
    model.save_pretrained(tmp_path / "out", dtype="float32")
    require_the_step_of_transformers(published[case], tmp_path / "out")


def require_the_step_of_transformers(published: Path, folder: Path) -> None:
    before, ours, theirs = tensors(published), tensors(folder), stepped(published, token_ids(ROWS), RATE)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert difference(ours[name], theirs[name]) < 1e-5, name
        step = theirs[name] - before[name]
        is_buffer = name.endswith("e_score_correction_bias")
        assert (step.norm() > 0) != is_buffer and (ours[name] - theirs[name]).norm() <= 1e-3 * step.norm(), name


def test_blocks_that_predict_further_tokens_are_left_out_with_a_warning(tmp_path):
    folder = publish("glm-4-moe", tmp_path / "glm", shard="1GB")
    content = tensors(folder)
    further = {
        name.replace("layers.2.", "layers.3."): value.clone() for name, value in content.items() if "layers.2." in name
    }
    save_file({**content, **further, "model.layers.3.eh_proj.weight": torch.ones(3)}, folder / "model.safetensors")
    with pytest.warns(UserWarning, match=rf"{len(further) + 1} tensors of .* are left out, such as model.layers.3."):
        model = LanguageModel.from_pretrained(folder)
    model.configure_model()
    model.save_pretrained(tmp_path / "out")
    assert tensors(tmp_path / "out").keys() == content.keys()


@torch.no_grad()
def test_a_glm_that_does_not_say_which_part_of_a_head_turns_turns_half(tmp_path):
    """As transformers reads it."""
    folder = publish("glm-4-moe", tmp_path / "glm")
    changed_config(folder, lambda config: config["rope_parameters"].pop("partial_rotary_factor"))
    model = LanguageModel.from_pretrained(folder)
    model.configure_model()
    ids = token_ids(ROWS)[:, :-1]
    assert model.config.partial_rotary_factor == 0.5
    assert difference(model(ids), loaded(folder)(ids).logits) < 1e-5


def test_every_family_is_tried():
    names = {kind.removesuffix("Config").lower() for kind, _ in CASES.values()}
    assert {name.replace("_", "") for name in FAMILIES} == names
