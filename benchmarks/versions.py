"""Are sdist and wheel whole, and does the wheel work with the oldest and the newest versions that it allows?

    python benchmarks/versions.py                                # this Python, the torch of constraints.txt
    python benchmarks/versions.py --sets oldest --pythons python3.11 python3.12 --torches 2.11.0 2.14.1

Run before a release. Both archives are built from a copy of the tracked files and compared with them. Then, for every
interpreter, torch and set of versions: a fresh virtual environment, torch first and alone, the wheel, and there,
outside of this tree, the command line (``--version``, a plan, a fit of two steps on two processes) and a part of the
tests. Each is a row of docs/versions.md, in the place of the row that it had before; of what fails the logs are kept.

torch comes from wherever pip is set up to look, or from ``--torch_index``: builds without CUDA are a tenth of the size.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "versions.md"
BEGIN, END = "<!-- versions: written by benchmarks/versions.py -->\n", "<!-- end of versions -->"
SHOWN = (
    "lightning",
    "torchmetrics",
    "datasets",
    "tokenizers",
    "jsonargparse",
    "fsspec",
    "numpy",
    "xxhash",
    "rich",
    "jinja2",
)
TOOLS = ("pytest", "pytest-xdist", "hypothesis")
# What meets the dependencies: Lightning, torch.distributed, datasets and tokenizers, jsonargparse, fsspec.
TESTS = (
    "tests/strategy/test_layouts.py",
    "tests/saving/test_checkpoints.py",
    "tests/cli/test_main.py",
    "tests/cli/test_options.py",
    "tests/data/test_corpus.py",
    "tests/data/test_module.py",
    "tests/data/test_resume.py",
    "tests/data/chat/test_answers.py",
    "tests/models/test_families.py",
)


class Failed(Exception):
    """What did not work, in a few words."""


@dataclass(frozen=True)
class Environment:
    """What one row is about.

    Args:
        versions: the set's name: ``oldest``, ``pinned``, ``newest``.
        python: the interpreter, a path or a name on ``PATH``.
        torch: its version.
        torch_index: where pip finds torch; ``None``: where it looks for all else.
    """

    versions: str
    python: str
    torch: str
    torch_index: str | None = None


def constraints_of(versions: str) -> list[str]:
    """The set as pip's constraints, without torch."""
    if versions == "oldest":
        return [f"{name}=={bound}" for name, bound in lower_bounds().items() if name != "torch"]
    if versions == "pinned":
        lines = (ROOT / "constraints.txt").read_text().splitlines()
        return [line for line in lines if not line.startswith(("torch==", "#"))]
    return []


def lower_bounds() -> dict[str, str]:
    """Of every dependency of ``pyproject.toml``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [Requirement(line) for line in project["dependencies"]]
    return {each.name: next(part.version for part in each.specifier if part.operator == ">=") for each in requirements}


def tracked_files() -> list[str]:
    """Of the tree, relative to its root."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in listed.splitlines() if (ROOT / name).exists()]


def built(work: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    source, log = work / "source", work / "build.log"
    for name in tracked_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    run([sys.executable, "-m", "venv", str(work / "builder")], work, log)
    run([str(work / "builder/bin/pip"), "install", "build"], work, log)
    run([str(work / "builder/bin/python"), "-m", "build", "--outdir", str(work / "dist"), str(source)], work, log)
    (sdist,), (wheel,) = (work / "dist").glob("*.tar.gz"), (work / "dist").glob("*.whl")
    return sdist, wheel


def check_contents(sdist: Path, wheel: Path, tracked: list[str]) -> None:
    """The sdist is the tree, the wheel the package and nothing beside it.

    Raises:
        Failed: with what is missing or too much.
    """
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name for name in archive.namelist() if not re.match(r"[^/]+\.dist-info/", name)}
    package = {name for name in tracked if name.startswith("lightning_tex/")}
    wrong = {
        "the sdist lacks": set(tracked) - in_sdist,
        "the wheel lacks": package - in_wheel,
        "the wheel has besides": in_wheel - package,
    }
    if any(wrong.values()):
        raise Failed("; ".join(f"{what} {', '.join(sorted(names))}" for what, names in wrong.items() if names))


def run(words: list[str], folder: Path, log: Path, *, tells: str = "") -> None:
    """Run a command outside of this tree; what it prints goes to ``log``.

    Args:
        words: the command.
        folder: where it runs.
        log: added to.
        tells: must be among what it prints.

    Raises:
        Failed: it failed, or did not say so.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with log.open("a") as file:
        print("$", *words, file=file, flush=True)
        at = file.tell()
        code = subprocess.run(words, cwd=folder, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if code or tells not in log.read_text()[at:]:
        raise Failed(f"{Path(words[0]).name} {' '.join(words[1:3])} failed")


def install(environment: Environment, wheel: Path, folder: Path, log: Path) -> dict[str, str]:
    """A fresh virtual environment below ``folder``.

    Returns:
        The versions that it has got, by name in lower case, ``python`` among them.
    """
    run([environment.python, "-m", "venv", str(folder / "venv")], folder, log)
    python = str(folder / "venv/bin/python")
    pip = [python, "-m", "pip", "install", "--quiet"]
    index = ["--index-url", environment.torch_index] if environment.torch_index else []
    run([*pip, *index, f"torch=={environment.torch}"], folder, log)
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join([f"torch=={environment.torch}", *constraints_of(environment.versions)]) + "\n")
    run([*pip, "--constraint", str(constraints), str(wheel), *TOOLS], folder, log)
    run([python, "-m", "pip", "check"], folder, log)
    listed = subprocess.run([python, "-m", "pip", "list", "--format", "json"], check=True, capture_output=True).stdout
    number = subprocess.run([python, "--version"], check=True, capture_output=True, text=True).stdout.split()[1]
    return {"python": number} | {package["name"].lower(): package["version"] for package in json.loads(listed)}


def try_commands(folder: Path, version: str, log: Path) -> None:
    """The command line, as a user has it who has a recipe and some text."""
    (folder / "text").mkdir()
    for page in (ROOT / "docs").glob("*.md"):
        shutil.copy2(page, folder / "text")
    shutil.copy2(ROOT / "recipes" / "own_text.yaml", folder / "recipe.yaml")
    tex, recipe = str(folder / "venv/bin/lightning-tex"), ["--config", "recipe.yaml", "--data.path", "text"]
    run([tex, "--version"], folder, log, tells=f"lightning-tex {version}\n")
    run([tex, "plan", "--cluster", "h100", *recipe], folder, log, tells="Recommended: ")
    layout = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy.tensor_parallel_size", "1"]
    run([tex, "fit", *recipe, *layout, "--trainer.max_steps", "2"], folder, log, tells="2 optimizer steps")


def try_tests(folder: Path, tests: list[str], log: Path) -> str:
    """Run ``tests`` on the installed package, their files copied beside it.

    Returns:
        How many passed and were skipped, and which were run, where these are not ``TESTS``.
    """
    for name in ("tests", "recipes", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "pyproject.toml", folder)
    python, results = str(folder / "venv/bin/python"), folder / "results.xml"
    run([python, "-c", "import lightning_tex as tex; print(tex.__file__)"], folder, log, tells=str(folder / "venv"))
    failed: Failed | None = None
    try:
        # A deprecation is no failure here: .ci/run holds the pinned versions to no warning.
        run([python, "-m", "pytest", "-q", "-n", "0", "-W", "default", f"--junitxml={results}", *tests], folder, log)
    except Failed as error:
        failed = error
    counts = dict(next(ElementTree.parse(results).iter("testsuite")).attrib) if results.exists() else {}
    bad = int(counts.get("failures", 0)) + int(counts.get("errors", 0))
    if failed:
        raise Failed(f"{bad} tests failed" if bad else "the tests did not run") from failed
    skipped = int(counts["skipped"])
    which = "" if tests == list(TESTS) else f" of {', '.join(f'`{name}`' for name in tests)}"
    return f"{int(counts['tests']) - skipped} tests passed" + (f", {skipped} skipped" if skipped else "") + which


def row(environment: Environment, wheel: Path, work: Path, tests: list[str]) -> list[str]:
    """What becomes of one environment, as cells of the table: set, Python, torch, other versions, outcome."""
    folder = Path(tempfile.mkdtemp(prefix=f"{environment.versions}-{environment.torch}-", dir=work))
    log, has = work / f"{folder.name}.log", dict[str, str]()
    try:
        has = install(environment, wheel, folder, log)
        try_commands(folder, wheel.name.split("-")[1], log)
        outcome = try_tests(folder, tests, log)
    except Failed as error:
        print(f"{environment.versions}, torch {environment.torch}: {error} (log: {log})", file=sys.stderr)
        outcome = f"**{error}**"
    shutil.rmtree(folder)  # gigabytes
    python = has.get("python", Path(environment.python).name)
    return [
        environment.versions,
        python,
        has.get("torch", environment.torch),
        *(has.get(n, "") for n in SHOWN),
        outcome,
    ]


def rewritten(page: str, rows: list[list[str]]) -> str:
    """``page`` with ``rows`` in its table, each in the place of the one of the same set, Python and torch."""
    before, rest = page.split(BEGIN)
    table, after = rest.split(END)
    held = {tuple(cells[:3]): cells for cells in [*rows_of(table), *rows]}
    lines = [
        ["set", "Python", "torch", *SHOWN, "outcome"],
        ["---"] * (4 + len(SHOWN)),
        *(held[key] for key in sorted(held)),
    ]
    written = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"{before}{BEGIN}\n{written}\n\n{END}{after}"


def rows_of(table: str) -> Iterator[list[str]]:
    """The cells of a table's rows, without its head."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    for line in lines[2:]:
        yield [cell.strip() for cell in line.strip("|").split("|")]


def main() -> None:
    """Build, try, write the table; exit code 1 where anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pinned = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    parser.add_argument("--sets", nargs="+", default=["oldest", "newest"], choices=["oldest", "pinned", "newest"])
    parser.add_argument("--pythons", nargs="+", default=[sys.executable], help="interpreters, by name or path")
    parser.add_argument("--torches", nargs="+", default=[pinned[1]], help="versions of torch")
    parser.add_argument("--torch_index", help="a package index that has these builds of torch")
    parser.add_argument("--tests", nargs="*", default=list(TESTS), help="files and folders of tests")
    parser.add_argument("--only_build", action="store_true", help="no environments: build and compare the archives")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page whose table is written")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="versions-"))
    sdist, wheel = built(work)
    check_contents(sdist, wheel, tracked_files())
    print(f"{sdist.name} and {wheel.name} hold what they should", flush=True)
    rows = []
    for environment in () if args.only_build else environments(args):
        rows.append(row(environment, wheel, work, args.tests))
        print(" | ".join(rows[-1]), flush=True)
        args.page.write_text(rewritten(args.page.read_text(), [rows[-1]]))
    if any("**" in cells[-1] for cells in rows):
        sys.exit(f"logs: {work}")
    shutil.rmtree(work)


def environments(args: argparse.Namespace) -> Iterator[Environment]:
    """Every interpreter with every torch and set."""
    for python, torch, versions in product(args.pythons, args.torches, args.sets):
        yield Environment(versions, python, torch, args.torch_index)


if __name__ == "__main__":
    main()
