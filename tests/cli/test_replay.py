"""A recipe's run that ends because nothing is finite leaves a dump, and one command takes that step again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_tex.cli.main import main


def recipe(folder: Path) -> Path:
    text = folder / "text"
    text.mkdir()
    for number in range(20):
        (text / f"{number}.txt").write_text(f"the route of token {number} to a data expert\n" * 40)
    sizes = {"dim": 32, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "max_sequence_length": 32, "num_experts": 4}
    strategy = {"tensor_parallel_size": 2, "max_skipped_steps": 2}
    described = {
        "trainer": {
            "accelerator": "cpu",
            "devices": 2,
            "max_steps": 6,
            "default_root_dir": str(folder / "run"),
            "enable_progress_bar": False,
            "strategy": {"class_path": "lightning_tex.TexMoEStrategy", "init_args": strategy},
        },
        "model": {"init_args": {"config": sizes}},
        "data": {
            "init_args": {"vocab_size": 300, "sequence_length": 32, "global_batch_size": 4, "path": str(text)},
        },
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1e30}},
    }
    path = folder / "diverges.yaml"
    path.write_text(yaml.safe_dump(described))
    return path


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lightning_tex", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.faults
def test_a_recipes_dump_is_replayed_in_one_command(tmp_path: Path) -> None:
    ended = run("fit", "--config", str(recipe(tmp_path)))
    assert ended.returncode == 2, ended.stderr
    (dump,) = tmp_path.glob("run/**/nonfinite-step=3")
    said = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert f"lightning-tex replay {dump}" in said[0]
    again = run("replay", str(dump))
    assert again.returncode == 0, again.stderr
    (line,) = again.stdout.splitlines()
    assert line.startswith("step 3: infinite or NaN is first ")
    origin = line.removeprefix("step 3: infinite or NaN is first ")
    assert f"in step 3 it was first {origin}; look at" in said[0]


def test_what_is_no_dump_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["replay", str(tmp_path)])
    assert "is no dump of a step: it has no about.json, state.ckpt" in capsys.readouterr().err
