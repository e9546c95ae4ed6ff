"""``lightning-tex verify`` on recipes whose modules are right, and wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lightning_tex.cli import main

RECIPES = Path(__file__).parents[2] / "recipes"


def verified(capsys, *words: str) -> tuple[int, dict, str]:
    """Exit code, the JSON of the last line, and all that was printed."""
    code = 0
    try:
        main(["verify", *words, "--json"])
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr().out
    return code, json.loads(printed.splitlines()[-1]), printed


@pytest.mark.full
def test_the_recipe_of_a_language_model(recipe, capsys):
    code, report, printed = verified(capsys, "--config", str(recipe), "--devices", "2", "--steps", "2")
    assert code == 0
    assert report["alike"]
    assert [layout["alike"] for layout in report["layouts"]] == [True] * 5
    assert all(layout["worst"]["gradients"] < 1e-9 for layout in report["layouts"])
    assert "5 of 5 layouts train as one process does" in printed


def test_the_module_of_own_module_py_with_its_own_loader(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(RECIPES)
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"model": {"class_path": "own_module.Regression"}, "data": None}))
    code, report, _ = verified(capsys, "--config", str(path), "--devices", "2", "--steps", "1")
    assert code == 0
    assert [layout["status"] for layout in report["layouts"]] == ["alike"] * 5


def test_a_module_that_does_not_train_in_one_process_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["verify", "--config", str(own_recipe(tmp_path, "Broken")), "--devices", "2", "--steps", "1"])
    assert end.value.code == 2
    assert "error: the module does not train in one process: ZeroDivisionError: broken" in capsys.readouterr().err


def own_recipe(folder: Path, name: str) -> Path:
    path = folder / f"{name}.yaml"
    classes = {"model": name, "data": "Numbers"}
    path.write_text(
        yaml.safe_dump({part: {"class_path": f"helpers.verified_modules.{cls}"} for part, cls in classes.items()})
    )
    return path


@pytest.mark.parametrize(
    ("name", "reason", "wrong"),
    [
        ("PlainLinearBetween", "mix (Linear) is given 8 of 16 features", [(2, 2)]),
        ("SummedOverRanks", "every gradient is 2 times that of one process", [(2, 1), (2, 2)]),
    ],
)
def test_a_wrong_module_is_named_where_it_is_wrong_and_ends_with_code_1(name, reason, wrong, tmp_path, capsys):
    words = ("--config", str(own_recipe(tmp_path, name)), "--devices", "1", "2", "--steps", "1")
    code, report, printed = verified(capsys, *words)
    assert code == 1
    assert not report["alike"]
    named = [layout for layout in report["layouts"] if not layout["alike"]]
    assert [(layout["devices"], layout["strategy"]["tensor_parallel_size"]) for layout in named] == wrong
    assert {layout["status"] for layout in named} <= {"differs", "failed"}
    assert all(reason in layout["reason"] for layout in named)
    assert reason in printed.replace("\n", " ")


def test_a_model_that_is_too_large_for_this_machine_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        main(["verify", "--config", str(RECIPES / "ted-40b-128xa100.yaml")])
    assert end.value.code == 2
    assert "legal: a smaller model" in capsys.readouterr().err
