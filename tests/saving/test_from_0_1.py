"""What version 0.1 wrote is loaded: its checkpoints of both forms, and its saved configurations (``from_0_1/``)."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import tiny_recipe
from helpers.cases import in_full, selected
from helpers.ranks import on_ranks, together

import lightning_tex as tex
from lightning_tex.saving import consolidated, reading_format
from lightning_tex.saving.directory import DirectoryCheckpoint
from lightning_tex.saving.plain import PlainCheckpoint
from lightning_tex.testing.ranks import run_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Lightning's calls of jsonargparse
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]

WRITTEN = Path(__file__).parent / "from_0_1"
CONFIG = WRITTEN / "config.yaml"
LOSSES: list[float] = json.loads((WRITTEN / "losses.json").read_text())
FORMS = ["directory", "plain"]
STEPS = ("--trainer.max_steps", "8")
STRATEGY = "--trainer.strategy.init_args"
OTHER_LAYOUTS: dict[str, Any] = {
    "data": (2, "--trainer.devices=2", f"{STRATEGY}.tensor_parallel_size=1", f"{STRATEGY}.zero_stage=2"),
    "folding": (4, f"{STRATEGY}.expert_tensor_parallel_size=1"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("from_0_1")
    tiny_recipe.write_recipe(folder)
    with tarfile.open(WRITTEN / "checkpoints.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def fit(folder: Path, name: str, *options: str) -> list[float]:
    data = ["--data.init_args.path", str(folder / "text"), "--data.init_args.cache_dir", str(folder / "cache")]
    tiny_recipe.fit(folder / name, CONFIG, *data, *options)
    return tiny_recipe.losses(folder / name)


@pytest.fixture(scope="module")
def resumed(request: pytest.FixtureRequest, folder: Path) -> dict[str, list[float]]:
    runs = {form: (fit, folder, form, *STEPS, "--ckpt_path", str(folder / f"{form}.ckpt")) for form in FORMS}
    losses = {form: losses[0] for form, losses in together(4, runs, timeout=300).items()}
    checkpoint = (*STEPS, "--ckpt_path", str(folder / "directory.ckpt"))
    for name in sorted(selected(request, "layout")):
        world, *options = OTHER_LAYOUTS[name]
        losses[name] = on_ranks(world, fit, folder, f"on {name}", *checkpoint, *options)[0]
    return losses


def test_both_forms_go_on_bit_equal(resumed: dict[str, list[float]]) -> None:
    assert resumed["directory"] == resumed["plain"]


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_goes_on_as_it_did_in_0_1(resumed: dict[str, list[float]], form: str) -> None:
    # Experts' outputs were weighted where they were summed, and are now before they are made: another rounding.
    assert resumed[form] == pytest.approx(LOSSES, rel=1e-6)


@pytest.mark.parametrize("layout", in_full(OTHER_LAYOUTS, ("data",)))
def test_a_directory_goes_on_on_another_layout(resumed: dict[str, list[float]], layout: str) -> None:
    assert resumed[layout] == pytest.approx(LOSSES, rel=1e-5)


def test_a_module_loads_from_both_forms(folder: Path) -> None:
    directory, plain = (tex.load_from_checkpoint(tex.LanguageModel, folder / f"{form}.ckpt") for form in FORMS)
    weights = torch.load(folder / "plain.ckpt", weights_only=True)["state_dict"]
    assert directory.state_dict().keys() == plain.state_dict().keys() == weights.keys()
    for name, value in directory.state_dict().items():
        assert torch.equal(value, weights[name]), name
        assert torch.equal(plain.state_dict()[name], weights[name]), name


def test_the_forms_are_told_by_the_rule_and_consolidate_gives_a_version(folder: Path) -> None:
    assert isinstance(reading_format(folder / "directory.ckpt"), DirectoryCheckpoint)
    assert isinstance(reading_format(folder / "plain.ckpt"), PlainCheckpoint)
    old: dict[str, Any] = torch.load(folder / "plain.ckpt", weights_only=True)
    assert "lightning_tex" not in old
    whole = consolidated(folder / "directory.ckpt")
    rounding_seed = old["optimizer_states"][0]["dice"]
    assert rounding_seed["step"] == 4
    assert whole["lightning_tex"] == {"version": 1, "rounding_seed": rounding_seed}


def trains_and_saves(folder: Path, config: Path) -> list[str]:
    data = ["--data.init_args.path", str(folder / "text"), "--data.init_args.cache_dir", str(folder / "cache")]
    run = folder / "old paths"
    tiny_recipe.fit(run, config, *data, *tiny_recipe.ON_ONE, "--trainer.max_steps=1")
    (saved,) = run.rglob("config.yaml")
    names = yaml.safe_load(saved.read_text())
    assert len(tiny_recipe.losses(run)) == 1
    return [names["model"]["class_path"], names["data"]["class_path"]]


def test_a_configuration_with_the_class_paths_of_0_1_trains_and_is_saved_with_public_ones(folder: Path) -> None:
    config = yaml.safe_load(CONFIG.read_text())
    config["model"]["class_path"] = "lightning_tex.language_model.LanguageModel"
    config["data"]["class_path"] = "lightning_tex.data.module.TextDataModule"
    path = folder / "old paths.yaml"
    path.write_text(yaml.safe_dump(config))
    (names,) = run_ranks(1, trains_and_saves, folder, path)
    assert names == ["lightning_tex.LanguageModel", "lightning_tex.TextDataModule"]
