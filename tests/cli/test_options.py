"""Options of the commands: one spelling and the older one, lists, switches, and one line for what is wrong."""

from __future__ import annotations

import importlib
import json
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from lightning_tex.cli import main
from lightning_tex.cli.main import COMMANDS
from lightning_tex.cli.options import Command, Count
from lightning_tex.errors import UserValueError
from lightning_tex.testing.ranks import run_ranks

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
SIZES = "--dim 256 --num_layers 4 --num_heads 4 --vocab_size 1000 --num_experts 8"
PLAN = f"plan {SIZES} --cluster a100-40gb --gpus 8 --global_batch_size 16 --sequence_length 128 --micro_batch 2"
CHOICES = "--tensor_parallel_size 2 --zero_stage 1 2 --sequence_parallel true --optimizer_state_format fp32"
CALIBRATE = "bench calibrate --output own.yaml --ranks 1 --turns 1 --megabytes 1 --device cpu"
# A command that reports, in a folder of its own.
REPORTING = {
    "plan": f"{PLAN} {CHOICES} --activation_checkpointing full",
    "largest base": f"{PLAN} --largest_base --activation_checkpointing full --optimizer_state_format fp32",
    "optimizer": "bench optimizer --elements 1e4 --dtype float32 --turns 1 --builds 1",
    "calibrate": CALIBRATE,
}


@dataclass(frozen=True)
class Options:
    """Some options.

    Args:
        path: a path.
        count_of_all: a number.
        names: several.
        numbers: several.
    """

    path: Path = Path("here")
    count_of_all: Count | None = None
    names: list[Literal["fp32", "int8"]] = field(default_factory=list)
    numbers: list[Count] = field(default_factory=list)
    switch: bool = False


def parsed(*words: str, takes_recipe: bool = False) -> tuple[Options, list[str]]:
    (options, output), rest = Command("some", lambda *_: None, (Options,), takes_recipe).parse(words)
    assert not output.json
    return options, rest


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--count_of_all", "1e6"], {"count_of_all": 1_000_000}),
        (["--count-of-all", "7"], {"count_of_all": 7}),
        (["--count-of-all=7", "--count_of_all=8"], {"count_of_all": 8}),
        (["--names", "fp32", "int8", "--switch"], {"names": ["fp32", "int8"], "switch": True}),
        (["--names", "int8"], {"names": ["int8"]}),
        (["--names+", "int8", "--names+=fp32"], {"names": ["int8", "fp32"]}),
        (["--names=[fp32,int8]", "--switch", "false"], {"names": ["fp32", "int8"]}),
        (["--numbers", "1e5", "2"], {"numbers": [100_000, 2]}),
        (["--switch=true", "--path", "a/b"], {"switch": True, "path": Path("a/b")}),
    ],
)
def test_words_are_options(words: list[str], expected: dict[str, Any]) -> None:
    options, rest = parsed(*words)
    assert (options, rest) == (Options(**expected), [])
    assert type(options.count_of_all) in (int, type(None)) and {type(n) for n in options.numbers} <= {int}


def test_what_is_no_option_is_the_recipes() -> None:
    words = ["--trainer.devices", "2", "--switch", "--data.some-option", "x", "--names", "fp32"]
    options, rest = parsed(*words, takes_recipe=True)
    assert options == Options(switch=True, names=["fp32"])
    assert rest == ["--trainer.devices", "2", "--data.some-option", "x"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--count-of-all", "0"], "--count_of_all 0; legal: a whole number of at least 1, such as 4 or 1e6"),
        (["--numbers", "1", "0.5"], "--numbers 1 0.5; legal: a whole number of at least 1"),
        (["--names", "fp7"], "--names fp7; legal: fp32, int8; one or more"),
        (["--switch=maybe"], "--switch maybe; legal: true, false"),
        (["--count_of_all"], "--count_of_all; legal: a whole number"),
        (["--colour", "red"], "unknown: --colour red; `lightning-tex some --help`"),
        (["--count-of-al", "2"], "unknown: --count-of-al 2; nearest: --count_of_all; "),
        (["fp32"], "unknown: fp32"),
    ],
)
def test_what_is_wrong_is_told_with_what_is_legal(words: list[str], said: str) -> None:
    with pytest.raises(UserValueError) as error:
        parsed(*words)
    assert said in str(error.value) and "\n" not in str(error.value)


def report_of(words: str, capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
    main(words.split())
    report = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    assert isinstance(report, dict)
    return report


def test_what_is_nearly_an_option_is_not_the_recipes() -> None:
    with pytest.raises(UserValueError, match=r"unknown: --switc; nearest: --switch"):
        parsed("--trainer.devices", "2", "--switc", takes_recipe=True)


@pytest.mark.parametrize("words", REPORTING.values(), ids=REPORTING.keys())
def test_the_last_line_is_one_json_object(words: str, tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    assert report_of(f"{words} --json", capfd)


@pytest.mark.parametrize("name", ["plan", "largest base"])
def test_dashes_and_underscores_mean_the_same(name: str, capfd) -> None:
    words = f"{REPORTING[name]} --json"
    dashed = " ".join(word.replace("_", "-") if word.startswith("--") else word for word in words.split())
    assert "_" not in "".join(word for word in dashed.split() if word.startswith("--"))
    assert report_of(dashed, capfd) == report_of(words, capfd)


@pytest.mark.parametrize(
    "words",
    [
        f"plan --cluster h100 --config {RECIPE} --colour red",
        f"plan --trace --config {RECIPE} --colour red",
        f"bench communication --config {RECIPE} --colour red",
        "bench communication --config nowhere.yaml",
        "plan --trace --config nowhere.yaml",
        f"{PLAN} --colour red",
        "plan --trace --colour red",
        "bench communication --colour red",
        "bench optimizer --colour red",
        f"{CALIBRATE} --colour red",
        "bench colour",
        "bench",
        "checkpoint inspect somewhere --colour red",
        "checkpoint verify somewhere --colour red",
        "checkpoint consolidate somewhere --colour red",
        "checkpoint inspect one two",
        "checkpoint inspect",
    ],
)
def test_a_wrong_word_is_one_line_and_exit_code_2(words: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == ""
    (line,) = printed.err.strip().splitlines()
    assert line.startswith("error: ")


HELPED = ["plan", "plan --trace", "bench", "bench optimizer", "checkpoint", "checkpoint inspect"]


@pytest.mark.parametrize("words", HELPED)
def test_help_lists_options_by_their_one_spelling(words: str, capsys) -> None:
    with suppress(SystemExit):
        main([*words.split(), "--help"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: lightning-tex {words}")
    options = [word for line in printed.splitlines() for word in line.split()[:1] if word.startswith("--")]
    assert not any("-" in option[2:] for option in options), options


def test_the_command_line_imports_no_more_than_it_runs() -> None:
    # What torchmetrics imports, where it is installed, is not ours.
    others = ["matplotlib", "deepspeed", "datasets", "tokenizers", "transformers"]
    (imported,) = run_ranks(1, imported_anew, ["lightning_tex.cli", "lightning_tex.data"], others)
    heavy = {*others, "lightning_tex.planner_trace", *COMMANDS.values()}
    assert imported & {"lightning_tex.cli.main"} and not imported & heavy


def imported_anew(modules: list[str], others: list[str]) -> set[str]:
    """What is imported with some modules, were neither this package nor ``others`` imported yet."""
    for name in list(sys.modules):
        if name.partition(".")[0] in ("lightning_tex", *others):
            del sys.modules[name]
    before = set(sys.modules)
    for name in modules:
        importlib.import_module(name)
    return set(sys.modules) - before
