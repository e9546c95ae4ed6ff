"""What the command line makes of its options."""

from __future__ import annotations

import re
import socket
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import pytest
import torch
import yaml
from helpers import tiny_recipe
from helpers.ranks import together

import lightning_tex
from lightning_tex import cli
from lightning_tex.errors import UserRuntimeError
from lightning_tex.recipe import Recipe, TexCLI
from lightning_tex.resilience.telling import mark_told
from lightning_tex.testing.ranks import run_ranks

PROBE = "--trainer.callbacks+=tiny_recipe.Probe"


def _printed(capsys, *options: str) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(["fit", *options, "--print_config"])
    assert end.value.code == 0
    return capsys.readouterr().out


def _refused(capsys, *options: str) -> list[str]:
    """The lines on stderr of a command that ends with exit code 2."""
    with pytest.raises(SystemExit) as end:
        cli.main(["fit", *options])
    assert end.value.code == 2
    return capsys.readouterr().err.strip().splitlines()


def test_printed_configuration_is_a_recipe(recipe, tmp_path, capsys):
    printed = _printed(capsys, "--config", str(recipe), "--model.config.num_experts", "4", "--data.path", "elsewhere")
    found = yaml.safe_load(printed)
    assert found["model"]["init_args"]["config"]["num_experts"] == 4
    assert found["data"]["init_args"]["path"] == "elsewhere"
    assert found["trainer"]["strategy"]["init_args"]["tensor_parallel_size"] == 2
    (tmp_path / "printed.yaml").write_text(printed)
    assert yaml.safe_load(_printed(capsys, "--config", str(tmp_path / "printed.yaml"))) == found


def test_optimizer_of_the_command_line_and_vocabulary_of_the_data(recipe, tmp_path):
    run_ranks(
        1,
        tiny_recipe.fit,
        tmp_path,
        recipe,
        PROBE,
        *tiny_recipe.ON_ONE,
        "--optimizer",
        "AdamW",
        "--optimizer.lr",
        "1e-3",
    )
    found = tiny_recipe.probed(tmp_path)
    assert found["strategy"] == "TexMoEStrategy"
    assert (found["optimizer"], found["lr"]) == ("AdamW", 1e-3)
    assert "vocab_size" not in yaml.safe_load(recipe.read_text())["model"]["init_args"]["config"]
    assert found["vocabulary"] == tiny_recipe.VOCABULARY


def test_runs_again_in_the_same_directory_and_goes_on_from_the_last_checkpoint(recipe, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    # No version_0, version_1: the configuration is saved over.
    same_place = (PROBE, *tiny_recipe.ON_TWO, "--trainer.logger", "false")
    runs = {
        "whole": (tiny_recipe.fit, whole, recipe, PROBE, *tiny_recipe.ON_TWO),
        "begun": (tiny_recipe.fit, parts, recipe, *same_place, "--trainer.max_steps", "2"),
        "goes on": (tiny_recipe.fit, parts, recipe, *same_place, "--ckpt_path", "last"),
    }
    together(2, runs)
    assert (parts / "config.yaml").exists()
    found = tiny_recipe.probed(parts)
    assert (found["first_step"], found["last_step"]) == (2, 4)
    assert found["last_loss"] == tiny_recipe.probed(whole)["last_loss"]


def test_another_strategy_than_the_recipes(recipe, tmp_path):
    run_ranks(1, tiny_recipe.fit, tmp_path, recipe, PROBE, "--trainer.strategy", "auto", "--trainer.devices", "1")
    assert tiny_recipe.probed(tmp_path)["strategy"] == "SingleDeviceStrategy"


def test_a_wrong_layout_is_one_line(recipe, capsys):
    lines = _refused(capsys, "--config", str(recipe), "--trainer.devices", "3")
    assert lines[-1] == "error: tensor_parallel_size=2 does not divide the world of 3 ranks; legal: 1, 3"
    assert not any("Traceback" in line for line in lines)


def test_an_error_after_the_processes_have_started_is_one_line_per_rank(recipe, tmp_path):
    endings = run_ranks(2, _ending, tmp_path, recipe, "--data.global_batch_size", "5", "--trainer.devices", "2")
    for rank, (code, lines) in enumerate(endings):
        errors = [line for line in lines if "error: " in line]
        assert code == 2
        assert len(errors) == (rank == 0)
        assert all(line.startswith("error: global_batch_size=5") for line in errors)
        assert not any("Traceback" in line for line in lines)


def test_an_error_of_one_rank_is_not_buried_by_the_others(recipe, tmp_path):
    endings = run_ranks(2, _ending, tmp_path, recipe, "--data.path", "/nowhere", "--trainer.devices", "2")
    (code, lines), (other_code, other_lines) = endings
    assert (code, lines[-1]) == (
        2,
        "error: cannot read path='/nowhere', split='train': Couldn't find any data file at /nowhere.",
    )
    assert other_code == 1
    told = rf"\[rank 1\] ended: rank 0 \({socket.gethostname()}, step 0\) failed first: UserFileError: .* /nowhere."
    assert re.fullmatch(told, other_lines[-1])
    assert not any("Traceback" in line for line in lines + other_lines)


def _ending(folder: Path, recipe: Path, *options: str) -> tuple[object, list[str]]:
    with redirect_stderr(StringIO()) as printed:
        try:
            tiny_recipe.fit(folder, recipe, "--trainer.strategy", "tex_moe", *options)
        except SystemExit as end:
            return end.code, printed.getvalue().splitlines()
    return None, []


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--trainer.max_step", "--trainer.max_step; nearest: --trainer.max_steps"),
        ("--trainr.max_steps", "--trainr.max_steps; nearest: --trainer.max_steps"),
        ("--seed_everythin", "--seed_everythin; nearest: --seed_everything"),
        (
            "--trainer.strategy.tensor_size",
            "--trainer.strategy.tensor_size; nearest: --trainer.strategy.tensor_parallel_size",
        ),
        ("--model.config.num_expert", "--model.config.num_expert; nearest: --model.config.num_experts"),
        ("--model.init_args.config.num_expert", "--model.config.num_expert; nearest: --model.config.num_experts"),
        ("--data.pat", "--data.pat; nearest: --data.path"),
        ("--whim", "--whim"),
    ],
)
def test_an_option_that_does_not_exist_is_told_with_the_nearest(recipe, capsys, option, told):
    lines = _refused(capsys, "--config", str(recipe), option, "2")
    assert lines[-1] == f"error: unknown option {told}"
    assert len(lines) < 5


@pytest.mark.parametrize(("key", "told"), [("trainer", "max_step"), ("data", "pat")])
def test_a_key_of_a_recipe_that_does_not_exist_is_told_with_the_nearest(recipe, tmp_path, capsys, key, told):
    content = yaml.safe_load(recipe.read_text())
    (content[key] if key == "trainer" else content[key]["init_args"])[told] = 2
    path = tmp_path / "misspelt.yaml"
    path.write_text(yaml.safe_dump(content))
    assert f"{key}.{told}; nearest: " in _refused(capsys, "--config", str(path))[-1]


def test_a_missing_recipe_is_named(capsys):
    assert any("File does not exist" in line for line in _refused(capsys, "--config", "missing.yaml"))


@pytest.mark.parametrize(
    ("command", "devices"), [*(("fit", devices) for devices in ("two", "0", "-1", "0,1", "1.5")), ("verify", "two")]
)
def test_what_is_no_number_of_processes_is_refused(recipe, capsys, command, devices):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--config", str(recipe), "--trainer.devices", devices])
    assert end.value.code == 2
    assert capsys.readouterr().err.strip() == (
        f"error: --trainer.devices {devices}; legal: auto; a whole number of at least 1, such as 4"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_devices_of_a_host_that_has_no_gpu(recipe, capsys):
    (told,) = _refused(capsys, "--config", str(recipe), "--trainer.accelerator", "auto", "--trainer.devices", "-1")
    assert told.endswith("legal: auto; a whole number of at least 1, such as 4; this host has no GPU")


@pytest.mark.parametrize("devices", ["auto", "-1", "3", "0,1", "[0, 1]", "1,"])
def test_what_may_be_devices_of_gpus(recipe, devices):
    found = Recipe(str(recipe), ["--trainer.accelerator", "gpu", "--trainer.devices", devices]).config.trainer.devices
    assert str(found) == devices


def test_help_lists_every_command(capsys):
    cli.main(["--help"])
    printed = capsys.readouterr().out
    assert printed.startswith("usage: lightning-tex COMMAND")
    for command in (
        "fit",
        "validate",
        "test",
        "predict",
        "plan",
        "plan --trace",
        "bench",
        "checkpoint",
        "prepare",
        "data",
        "export",
        "upcycle",
        "verify",
        "replay",
    ):
        assert f"\n  {command:14} " in printed, command


def test_the_version_is_printed(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"lightning-tex {lightning_tex.__version__}\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trace"], "unknown command trace; nearest: plan --trace; legal: fit, "),
        (["chekpoint", "inspect"], "unknown command chekpoint; nearest: checkpoint; legal: fit, "),
        (["colour"], "unknown command colour; legal: fit, "),
        ([], "a command is needed, before its options; legal: fit, "),
        (["--config", "r.yaml"], "a command is needed, before its options; legal: fit, "),
    ],
)
def test_an_unknown_command_is_told_with_the_nearest_of_all(words, told, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert line.startswith(f"error: {told}") and line.endswith(
        "plan, plan --trace, prepare, data, bench, checkpoint, export, upcycle, experts, verify, replay"
    )


def test_an_own_command_after_its_options_is_told_the_order(capsys):
    with pytest.raises(SystemExit):
        cli.main(["-c", "r.yaml", "plan", "--cluster", "h100"])
    told = "error: the command comes first: lightning-tex plan -c r.yaml --cluster h100\n"
    assert capsys.readouterr().err == told


def test_a_misspelt_option_of_the_command_line_is_told_its_nearest(recipe, capsys):
    assert "unknown option --restart; nearest: --restarts" in "".join(
        _refused(capsys, "--config", str(recipe), "--restart", "2")
    )


def test_a_bug_keeps_its_traceback(recipe, monkeypatch):
    monkeypatch.setattr(TexCLI, "instantiate_trainer", lambda self: int("not a number"))
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["fit", "--config", str(recipe)])


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize(("text", "code"), [("another rank has gone: broken pipe", 1), ("an option", 2)])
def test_what_another_rank_has_caused_is_begun_again(recipe, monkeypatch, capsys, text, code, told):
    """``--restarts`` ends at exit code 2."""

    def fail(self):
        error = UserRuntimeError(text)
        if told:
            mark_told(error)
        raise error

    monkeypatch.setattr(TexCLI, "instantiate_trainer", fail)
    with pytest.raises(SystemExit) as end:
        cli.main(["fit", "--config", str(recipe)])
    assert end.value.code == code
    assert (text in capsys.readouterr().err) != told
