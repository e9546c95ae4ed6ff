"""Resume: bit-equal on the layout that saved, exact states on every other, and plain files both ways."""

from __future__ import annotations

import json
import os
import runpy
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers.cases import in_full, selected
from helpers.checkpoint_runs import EPOCH, VOCABULARY, Model, fit, largest_difference, tensors

import lightning_tex as tex
from lightning_tex.cli import main
from lightning_tex.saving import plain_form
from lightning_tex.testing.ranks import run_ranks

TED = {"tensor_parallel_size": 2, "expert_parallel_size": 2, "tile_size": 256}
OTHERS: dict[str, dict[str, Any]] = {
    "folding": {"tensor_parallel_size": 2, "expert_tensor_parallel_size": 1, "expert_parallel_size": 4},
    "expert 4": {"expert_parallel_size": 4, "tile_size": 64},
    "tensor 4": {"tensor_parallel_size": 4},
    "data 4": {"expert_parallel_size": 1, "tile_size": 192},
}
RANDOM = {"dropout": 0.1, "noise": True}


def _four_ranks(folder: str, resumed: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    fit(TED, 4, 1, precision="bf16-mixed", model=RANDOM, save=f"{folder}/bf16-mixed.ckpt")
    for precision in resumed:
        path = f"{folder}/{precision}.ckpt"
        if precision != "bf16-mixed":
            fit(TED, 4, 1, precision=precision, model=RANDOM, save=path)
        whole = fit(TED, 4, 2, precision=precision, model=RANDOM)
        found[precision] = whole, fit(TED, 4, 2, ckpt_path=path, precision=precision, model=RANDOM, seed=6)
    found["reference"] = fit(TED, 4, 2)
    found["saved"] = fit(TED, 4, 1, save=f"{folder}/ted.ckpt")
    for name, layout in OTHERS.items():
        found[name] = fit(layout, 4, 1, ckpt_path=f"{folder}/ted.ckpt", save=f"{folder}/{name}.ckpt", model={"seed": 4})
    fit(TED, 4, 1, ckpt_path=f"{folder}/folding.ckpt", save=f"{folder}/back.ckpt", model={"seed": 4})
    plain = {**TED, "save_distributed_checkpoint": False}
    fit(plain, 4, 1, ckpt_path=f"{folder}/ted.ckpt", save=f"{folder}/plain.ckpt", model={"seed": 4})
    fit(OTHERS["folding"], 4, 1, ckpt_path=f"{folder}/plain.ckpt", save=f"{folder}/of plain.ckpt", model={"seed": 4})
    fit(plain, 4, 1, ckpt_path=f"{folder}/bf16-mixed.ckpt", precision="bf16-mixed", save=f"{folder}/plain bf16.ckpt")
    found["folding goes on"] = fit(OTHERS["folding"], 4, 2, ckpt_path=f"{folder}/ted.ckpt", model={"seed": 4})
    return found


def _one_rank(folder: str) -> dict[str, Any]:
    path = f"{folder}/ted.ckpt"
    auto = fit(None, 1, 1, save=f"{folder}/auto.ckpt")
    return {
        "auto from plain": fit(None, 1, 2, ckpt_path=f"{folder}/plain.ckpt", model={"seed": 4}),
        "one process": fit({}, 1, 2, ckpt_path=path, save=None, model={"seed": 4}),
        "resaved": fit({}, 1, 1, ckpt_path=path, save=f"{folder}/one process.ckpt", model={"seed": 4}),
        "auto": auto,
        "from auto": fit({}, 1, 1, ckpt_path=f"{folder}/auto.ckpt", save=f"{folder}/from auto.ckpt", model={"seed": 4}),
        "auto from whole": fit(None, 1, 2, ckpt_path=_whole(folder, "ted"), model={"seed": 4}),
        "from consolidated": fit({}, 1, 2, ckpt_path=_consolidated(folder), model={"seed": 4}),
    }


def _consolidated(folder: str) -> str:
    output = f"{folder}/consolidated.pt"
    command = ["consolidate_checkpoint", f"{folder}/ted.ckpt", "--output_file", output]
    with patch("sys.argv", command):
        runpy.run_module("lightning.pytorch.utilities.consolidate_checkpoint", run_name="__main__")
    return output


def _whole(folder: str, name: str) -> str:
    output = f"{folder}/{name}.whole.ckpt"
    main(["checkpoint", "consolidate", f"{folder}/{name}.ckpt", "--output", output])
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def four(request: pytest.FixtureRequest, folder: Path) -> list[dict[str, Any]]:
    return run_ranks(4, _four_ranks, str(folder), sorted(selected(request, "precision")), detail=False)


@pytest.fixture(scope="module")
def one(folder: Path, four: object) -> dict[str, Any]:
    return run_ranks(1, _one_rank, str(folder))[0]


@pytest.mark.parametrize("precision", in_full(["32-true", "bf16-mixed"], ["bf16-mixed"]))
def test_resume_on_the_same_layout_is_bit_equal(four: list[dict[str, Any]], precision: str) -> None:
    for whole, resumed in (results[precision] for results in four):
        assert resumed["losses"] == whole["losses"][EPOCH:]
        assert resumed["learning_rates"] == whole["learning_rates"][EPOCH:]
        assert torch.equal(resumed["own"], whole["own"])
        assert resumed["seen"] == 2 * EPOCH


@pytest.mark.parametrize("layout", [*OTHERS, "back", "one process", "of plain"])
def test_every_layout_reads_and_writes_the_same_weights_and_states(folder: Path, one: object, layout: str) -> None:
    saved, again = tensors(folder / "ted.ckpt"), tensors(folder / f"{layout}.ckpt")
    assert saved.keys() == again.keys()
    assert any(name.endswith("exp_avg_sq") for name in saved)
    assert all(torch.equal(saved[name], again[name]) for name in saved)


def test_padding_is_not_saved_and_ties_are_saved_under_both_names(folder: Path, four: object) -> None:
    saved = tensors(folder / "tensor 4.ckpt")
    embedding = saved["model.decoder.embedding.weight"]
    assert embedding.shape == (VOCABULARY, 16)
    assert torch.equal(saved["model.decoder.head.weight"], embedding)
    assert saved["decoder.embedding.weight.exp_avg"].shape == (VOCABULARY, 16)


def test_each_element_is_written_once(folder: Path, four: object) -> None:
    bytes_needed = sum(tensor.nbytes for tensor in tensors(folder / "ted.ckpt").values())
    bytes_written = sum(file.stat().st_size for file in (folder / "ted.ckpt").glob("*.distcp"))
    boxes = 4 * 400  # ranks x tensors and boxes; each is an archive of about 1.2 kB
    assert bytes_needed < bytes_written < bytes_needed + boxes * 1500


@pytest.mark.parametrize("run", ["one process", "auto from plain", "auto from whole", "from consolidated"])
def test_one_process_goes_on_as_four_would_have(four: list[dict[str, Any]], one: dict[str, Any], run: str) -> None:
    reference = four[0]["reference"]
    assert one[run]["losses"] == pytest.approx(reference["losses"][EPOCH:], rel=1e-5)
    assert largest_difference(one[run]["weights"], reference["weights"]) < 1e-4


def test_another_layout_goes_on_as_the_first_would_have(four: list[dict[str, Any]]) -> None:
    reference, other = four[0]["reference"], four[0]["folding goes on"]
    assert other["losses"] == pytest.approx(reference["losses"][EPOCH:], rel=1e-5)
    assert other["learning_rates"] == reference["learning_rates"][EPOCH:]


def test_a_plain_file_is_lightnings_own(folder: Path, one: dict[str, Any]) -> None:
    ours = torch.load(folder / "plain.ckpt", weights_only=True)
    theirs = torch.load(folder / "auto.ckpt", weights_only=True)
    assert ours.keys() == theirs.keys() | {"lightning_tex"}
    assert ours["lightning_tex"].keys() == {"version", "rounding_seed"}
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for name, value in theirs["state_dict"].items():
        assert (ours["state_dict"][name].shape, ours["state_dict"][name].dtype) == (value.shape, value.dtype)
    (our_state,), (their_state,) = ours["optimizer_states"], theirs["optimizer_states"]
    assert our_state.keys() == their_state.keys()
    assert [g["params"] for g in our_state["param_groups"]] == [g["params"] for g in their_state["param_groups"]]
    assert our_state["param_groups"][0].keys() == their_state["param_groups"][0].keys()
    assert our_state["state"].keys() == their_state["state"].keys()
    for number, states in their_state["state"].items():
        shapes = {key: value.shape for key, value in states.items()}
        assert {key: value.shape for key, value in our_state["state"][number].items()} == shapes
        assert float(our_state["state"][number]["step"]) == EPOCH
    model = Model.load_from_checkpoint(folder / "plain.ckpt")
    assert all(torch.equal(p, ours["state_dict"][name]) for name, p in model.named_parameters())


def test_a_consolidated_directory_is_the_plain_file(folder: Path, four: object) -> None:
    _whole(str(folder), "bf16-mixed")
    whole = torch.load(folder / "bf16-mixed.whole.ckpt", weights_only=True)
    plain = torch.load(folder / "plain bf16.ckpt", weights_only=True)
    assert whole["state_dict"].keys() == plain["state_dict"].keys()
    for name, value in plain["state_dict"].items():
        assert whole["state_dict"][name].dtype == value.dtype
        assert torch.equal(whole["state_dict"][name], value)
    assert whole["lightning_tex"] == plain["lightning_tex"]
    (ours,), (theirs,) = whole["optimizer_states"], plain["optimizer_states"]
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for number, states in theirs["state"].items():
        assert ours["state"][number].keys() == states.keys()
        assert all(torch.equal(ours["state"][number][key], value) for key, value in states.items())


def test_a_module_loads_from_a_directory(folder: Path, four: object) -> None:
    model = tex.load_from_checkpoint(Model, folder / "ted.ckpt", noise=True)
    saved = tensors(folder / "ted.ckpt")
    assert model.noise
    assert all(torch.equal(p, saved[f"model.{name}"]) for name, p in model.named_parameters())


def test_the_command_line_looks_at_checkpoints(
    folder: Path, four: object, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    main(["checkpoint", "inspect", str(folder / "ted.ckpt"), "--tensors", "--json"])
    about = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert about["step"] == EPOCH
    assert about["layout"] == {"world": 4, "tensor": 2, "expert": 2, "expert_tensor": 2}
    saved = tensors(folder / "ted.ckpt")
    assert about["tensors"]["model.scale"] == {"shape": [], "dtype": "float32"}
    weights = [value for name, value in saved.items() if name.startswith("model.")]
    alone = Model()
    once = sum(value.nbytes for value in [*alone.parameters(), *alone.buffers()])  # tied embeddings
    assert about["holds"]["weights"]["bytes"] == once < sum(value.nbytes for value in weights)

    main(["checkpoint", "inspect", str(folder), "--json"])
    listed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {Path(entry["path"]).name for entry in listed["checkpoints"]} >= {"ted.ckpt", "folding.ckpt"}

    damaged = shutil.copytree(folder / "ted.ckpt", tmp_path / "ted.ckpt")
    main(["checkpoint", "verify", str(damaged), "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["files"] == len(list(damaged.iterdir())) - 1
    with (damaged / "__1_0.distcp").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(SystemExit) as ended:
        main(["checkpoint", "verify", str(damaged)])
    assert ended.value.code == 2
    assert "__1_0.distcp: expected" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["checkpoint", "consolidate", str(folder / "ted.ckpt"), "--output", str(folder / "plain.ckpt")])
    assert "nothing is written over it" in capsys.readouterr().err


def test_a_plain_file_of_another_strategy_loads(folder: Path, one: dict[str, Any]) -> None:
    theirs = torch.load(folder / "auto.ckpt", weights_only=True)
    ours = tensors(folder / "from auto.ckpt")
    for name, value in theirs["state_dict"].items():
        assert torch.equal(ours[f"model.{name}"], value)
    names = [name for name, p in Model().named_parameters() if p.dim() > 1]
    for number, name in enumerate(names):
        assert torch.equal(ours[f"{name}.exp_avg"], theirs["optimizer_states"][0]["state"][number]["exp_avg"])


@pytest.mark.parametrize(
    ("file", "version"),
    [("plain.ckpt", 1), ("ted.whole.ckpt", 1), ("auto.ckpt", 0), ("consolidated.pt", plain_form.CONSOLIDATED)],
)
def test_the_version_of_a_plain_file(folder: Path, one: object, file: str, version: int | str) -> None:
    assert plain_form.version_of(torch.load(folder / file, weights_only=True)) == version


def test_a_plain_file_of_a_later_version_is_refused(folder: Path, four: object, tmp_path: Path) -> None:
    later = torch.load(folder / "plain.ckpt", weights_only=True)
    later["lightning_tex"]["version"] = 2
    torch.save(later, tmp_path / "later.ckpt")
    with pytest.raises(AssertionError, match=r"plain file of version 2; .* reads 0 .* and 1"):
        run_ranks(1, fit, {}, 1, 2, str(tmp_path / "later.ckpt"))


def _steps_differ(folder: str) -> None:
    checkpoint = torch.load(f"{folder}/auto.ckpt", weights_only=True)
    checkpoint["optimizer_states"][0]["state"][0]["step"] += 3
    torch.save(checkpoint, f"{folder}/steps differ.pt")
    with pytest.warns(UserWarning, match="step differs between parameters .* go on with the largest"):
        fit({}, 1, 1, ckpt_path=f"{folder}/steps differ.pt", save=f"{folder}/steps joined.ckpt")


def test_parameters_that_are_updated_together_go_on_with_the_largest_step(folder: Path, one: object) -> None:
    run_ranks(1, _steps_differ, str(folder))
    steps = {name: float(value) for name, value in tensors(folder / "steps joined.ckpt").items() if "step" in name}
    decayed = [name for name, p in Model().named_parameters() if p.dim() > 1]
    assert steps[f"{decayed[0]}.step"] == EPOCH + 3
    for name in decayed:  # experts are in a buffer of their own
        assert steps[f"{name}.step"] == (EPOCH if "experts" in name else EPOCH + 3), name
    assert steps["scale.step"] == EPOCH


def test_a_plain_file_of_16_bit_parameters_holds_the_masters(folder: Path, four: object) -> None:
    saved = tensors(folder / "bf16-mixed.ckpt")
    plain = torch.load(folder / "plain bf16.ckpt", weights_only=True)["state_dict"]
    masters = {name.removesuffix(".master"): value for name, value in saved.items() if name.endswith(".master")}
    assert len(masters) > 10
    for name, master in masters.items():
        assert plain[name].dtype == torch.float32
        assert torch.equal(plain[name], master)
        assert torch.equal(saved[f"model.{name}"], master.bfloat16())


def test_consolidate_checkpoint_gives_a_file_that_plain_torch_loads(
    folder: Path, four: list[dict[str, Any]], one: object
) -> None:
    model = Model.load_from_checkpoint(folder / "consolidated.pt")
    weights = four[0]["saved"]["weights"]
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


def test_nothing_is_left_beside_the_checkpoints(folder: Path, one: object) -> None:
    assert [name for name in os.listdir(folder) if name.startswith(".")] == []
