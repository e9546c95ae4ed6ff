"""The same recipe by every launcher: the same losses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import tiny_recipe
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from lightning_tex.cli import main
from lightning_tex.testing.ranks import reserved_port, run_ranks

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return tiny_recipe.write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def expected(recipe) -> list[float]:
    """The losses of one process; fills the data cache for the others."""
    run_ranks(1, tiny_recipe.fit, recipe.parent / "alone", recipe, *tiny_recipe.ON_ONE)
    found = tiny_recipe.losses(recipe.parent / "alone")
    assert len(found) == 4 and found[0] > found[-1]
    return found


def test_lightnings_own_launcher(recipe, expected, tmp_path):
    script = Path(sys.executable).with_name("lightning-tex")
    run_ranks(1, _own_launcher, tmp_path, [str(script), "fit", "--config", str(recipe), *tiny_recipe.ON_TWO])
    assert tiny_recipe.losses(tmp_path) == pytest.approx(expected, rel=1e-6)


@pytest.mark.full
def test_torchrun(recipe, expected, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    _launch([*torchrun, "-m", "lightning_tex", "fit", "--config", str(recipe), *tiny_recipe.ON_TWO], tmp_path)
    assert tiny_recipe.losses(tmp_path) == pytest.approx(expected, rel=1e-6)


def test_two_agents_of_torchrun(recipe, expected, tmp_path):
    with reserved_port() as port:
        run_ranks(2, _agent, str(port), tmp_path, recipe)
    assert tiny_recipe.losses(tmp_path) == pytest.approx(expected, rel=1e-6)


def test_slurm_with_two_nodes(recipe, expected, tmp_path):
    run_ranks(4, _srun_task, tmp_path, recipe)
    assert tiny_recipe.losses(tmp_path) == pytest.approx(expected, rel=1e-6)


def _own_launcher(folder: Path, command: list[str]) -> None:
    """The first rank as if its command had been started; it starts the other one by the same command."""
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    os.chdir(folder)
    sys.argv = command
    main()


def _agent(port: str, folder: Path, recipe: Path) -> None:
    """``torchrun --nnodes 2 ...`` on one of two nodes, with its worker processes forked."""
    node = os.environ["RANK"]
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    address = ["--master-addr", "127.0.0.1", "--master-port", port]
    words = ["--nnodes", "2", "--node-rank", node, "--nproc-per-node", "2", *address, "--start-method", "fork"]
    config, _, _ = config_from_args(parse_args([*words, "lightning-tex"]))
    config.start_method = "fork"
    nodes = ("--trainer.num_nodes", "2", "--trainer.devices", "2")
    elastic_launch(config, tiny_recipe.fit)(folder, recipe, *nodes)


def _srun_task(folder: Path, recipe: Path) -> None:
    """What ``srun`` with ``--nodes=2 --ntasks-per-node=2`` gives a task."""
    rank, port = int(os.environ["RANK"]), os.environ["MASTER_PORT"]
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(
        SLURM_JOB_ID="4711",
        SLURM_JOB_NAME="train",
        SLURM_NODELIST="localhost,elsewhere",
        SLURM_NNODES="2",
        SLURM_NTASKS="4",
        SLURM_NTASKS_PER_NODE="2",
        SLURM_PROCID=str(rank),
        SLURM_NODEID=str(rank // 2),
        SLURM_LOCALID=str(rank % 2),
        MASTER_PORT=port,  # Lightning's own, 15000 + the job's last four digits, may be taken on this machine
    )
    tiny_recipe.fit(folder, recipe, "--trainer.num_nodes", "2", "--trainer.devices", "2")
    assert os.environ["MASTER_ADDR"] == "localhost"


def _launch(command: list[str], folder: Path) -> None:
    """Run a command and everything it starts in ``folder``; a failure shows what it printed."""
    inherited = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES and not k.startswith("SLURM_")}
    environment = inherited | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(timeout=300)
        finally:
            with suppress(ProcessLookupError):  # the group is gone
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, (folder / "output.txt").read_text()
