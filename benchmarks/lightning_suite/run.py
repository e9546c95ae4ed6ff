"""Lightning's own tests under this project's strategy and under DDP: what fails here and passes there.

    git clone --depth 1 --branch 2.6.5 https://github.com/Lightning-AI/pytorch-lightning
    python benchmarks/lightning_suite/run.py pytorch-lightning/tests models core --json before.json

Folders and files are of ``tests_pytorch``. Each file runs in a process of its own, in a copy of the tests, under every
strategy, at most ``--limit`` seconds at a time: the test that ran when it ended has failed, and the others go on. Under
DDP run those tests alone that have failed before.
``--compare before.json`` says what has changed since, ``--table table.md`` writes what fails with the reasons of
``reasons.py``; ``docs/lightning.md`` has such a table. The tests need some packages of their own
(``requirements/pytorch/test.txt`` there); a test that misses one fails under every strategy and is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

from reasons import WANTS_A_FILE, reason

HERE = Path(__file__).resolve().parent
REFERENCE = "ddp"
OURS = ("tex_moe_plain", "tex_moe")
# Of one file, until it is given up.
_ATTEMPTS = 6

# test -> (outcome, first line of the error)
Outcomes = dict[str, tuple[str, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", type=Path, help="the folder that tests_pytorch lies in")
    parser.add_argument("chosen", nargs="+", help="folders and files of tests_pytorch")
    parser.add_argument("--strategies", nargs="+", default=[REFERENCE, *OURS], help="see placed_strategy.py")
    parser.add_argument("--jobs", type=int, default=1, help="files at a time")
    parser.add_argument("--limit", type=float, default=300, help="seconds of one process")
    parser.add_argument("--select", default="", help="only tests that this matches, as pytest's -k")
    parser.add_argument("--json", type=Path, help="write all outcomes here; what it holds of other files is kept")
    parser.add_argument("--table", type=Path, help="write what fails, and why, as a table of Markdown")
    parser.add_argument("--compare", type=Path, help="a file written so: list what has changed since")
    options = parser.parse_args()
    held: dict[str, Outcomes] = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    files = list(_files(options.tests / "tests_pytorch", options.chosen))
    run = partial(_of_strategies, options.tests, options.strategies, limit=options.limit, select=options.select)
    with ThreadPoolExecutor(options.jobs) as pool:
        for file, of_strategies in zip(files, pool.map(run, files), strict=True):
            for strategy, outcomes in of_strategies.items():
                counts = Counter(outcome for outcome, _ in outcomes.values())
                print(f"{strategy:14} {file}: {', '.join(f'{n} {o}' for o, n in sorted(counts.items()))}", flush=True)
                held.setdefault(strategy, {}).update(outcomes)
            if options.json:
                options.json.write_text(json.dumps(held, indent=1))
    before = json.loads(options.compare.read_text()) if options.compare else {}
    for strategy in options.strategies:
        if strategy != REFERENCE and REFERENCE in held:
            _report(strategy, held, before)
    if options.table:
        options.table.write_text("".join(_table(held)))


def _files(root: Path, chosen: list[str]) -> Iterator[str]:
    """Test files below the root, relative to it."""
    for name in chosen:
        path = root / name
        found = [path] if path.is_file() else sorted(path.rglob("test_*.py"))
        if not found:
            sys.exit(f"there are no tests in {path}")
        yield from (str(file.relative_to(root)) for file in found)


def _of_strategies(tests: Path, strategies: list[str], file: str, *, limit: float, select: str) -> dict[str, Outcomes]:
    """Outcomes of one file; the reference's are of what has failed under the others, if there are others."""
    ours = [strategy for strategy in strategies if strategy != REFERENCE]
    held = {strategy: _outcomes(tests, strategy, [file], limit, select) for strategy in ours}
    if REFERENCE in strategies:
        failed = sorted({test for outcomes in held.values() for test, (o, _) in outcomes.items() if o == "failed"})
        chosen = [test.removeprefix("tests/tests_pytorch/") for test in failed] if ours else [file]
        held[REFERENCE] = _outcomes(tests, REFERENCE, chosen, limit, select) if chosen else {}
    return held


def _outcomes(tests: Path, strategy: str, chosen: list[str], limit: float, select: str) -> Outcomes:
    """Run a file, or tests of it, until all have an outcome."""
    outcomes: Outcomes = {}
    with tempfile.TemporaryDirectory(prefix="lightning_suite_") as folder:
        copy = Path(folder) / "project" / "tests"
        shutil.copytree(tests / "tests_pytorch", copy / "tests_pytorch")
        shutil.copytree(tests / "legacy", copy / "legacy") if (tests / "legacy").is_dir() else None
        shutil.copy(tests.parent / "pyproject.toml", copy.parent)
        for attempt in range(_ATTEMPTS):
            through = _attempt(copy, strategy, chosen, outcomes, limit, select, Path(folder) / f"attempt{attempt}")
            if through:
                break
    return outcomes


def _attempt(
    tests: Path, strategy: str, chosen: list[str], outcomes: Outcomes, limit: float, select: str, scratch: Path
) -> bool:
    """Run what has no outcome yet; whether all is through."""
    scratch.mkdir()
    results = scratch / "results"
    results.touch()
    command = [sys.executable, "-m", "pytest", *(f"tests/tests_pytorch/{test}" for test in chosen), "-q"]
    command += ["-p", "placed_strategy", "-p", "no:cacheprovider", "--tb=short", f"--basetemp={scratch / 'pytest'}"]
    command += ["-k", select] if select else []
    command += [word for test in outcomes for word in ("--deselect", test)]
    with (scratch / "output").open("w") as output:
        process = subprocess.Popen(
            command, cwd=tests.parent, env=_environment(tests, strategy, results, scratch), start_new_session=True,
            stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            ended = process.wait(limit) >= 0
        except subprocess.TimeoutExpired:
            ended = False
        finally:
            _end_session(process)
    for line in results.read_text().splitlines():
        entry = json.loads(line)
        if outcomes.get(entry["test"], ("running", ""))[0] != "failed":  # in its body, and torn down well
            outcomes[entry["test"]] = (entry["outcome"], entry["error"])
    for test, (outcome, _) in outcomes.items():
        if outcome == "running":
            outcomes[test] = (
                "failed",
                f"did not end within {limit:.0f} s, or ended its process ({process.returncode})",
            )
            ended = False
    return ended


def _environment(tests: Path, strategy: str, results: Path, scratch: Path) -> dict[str, str]:
    paths = [tests, HERE, HERE.parent.parent, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    ours = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **ours, "LIGHTNING_SUITE_STRATEGY": strategy, "LIGHTNING_SUITE_RESULTS": str(results)}


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """End what the tests have started and left, too."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def _report(strategy: str, held: Mapping[str, Outcomes], before: Mapping[str, Outcomes]) -> None:
    failing = _failures(strategy, held)
    groups: dict[str, list[str]] = defaultdict(list)
    for test, line in failing.items():
        groups[line].append(test)
    print(f"\n=== {strategy}: {len(failing)} fail of {len(held[strategy])}, and do not under {REFERENCE}")
    print("    " + ", ".join(f"{folder} {n}" for folder, n in sorted(Counter(map(_folder, failing)).items())))
    for line, tests in sorted(groups.items(), key=lambda group: -len(group[1])):
        print(f"\n{len(tests):4}  {line}")
        for test in tests:
            print(f"        {test.removeprefix('tests/tests_pytorch/')}")
    if before:
        earlier = {test: line for test, line in _failures(strategy, before).items() if test in held[strategy]}
        print(f"\n--- since then: {len(earlier.keys() - failing.keys())} mended, new ones:")
        for test in failing.keys() - earlier.keys():
            print(f"        {test}: {failing[test]}")


def _failures(strategy: str, held: Mapping[str, Outcomes]) -> dict[str, str]:
    """What fails under a strategy and not under the reference, and its error's first line."""
    reference = held[REFERENCE]
    outcomes = held.get(strategy, {})
    return {
        test: line for test, (outcome, line) in outcomes.items()
        if outcome == "failed" and reference.get(test, ("passed", ""))[0] != "failed"
    }  # fmt: skip


def _table(held: Mapping[str, Outcomes]) -> Iterator[str]:
    """What fails under our strategies and not under the reference, by reason."""
    ours = [strategy for strategy in OURS if strategy in held]
    failing = [_failures(strategy, held) for strategy in ours]
    yield f"| of Lightning's tests | {' | '.join(ours)} | why |\n|---|{'---|' * len(ours)}---|\n"
    rows: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0] * len(ours))
    for test in sorted({test for tests in failing for test in tests}):
        short = test.removeprefix("tests/tests_pytorch/")
        for column, tests in enumerate(failing):
            if test in tests:
                why = reason(short, tests[test])
                rows["several" if why == WANTS_A_FILE else short.split("[")[0], why or tests[test]][column] += 1
    for (name, why), counts in rows.items():
        yield f"| `{name}` | {' | '.join(str(count or '') for count in counts)} | {why} |\n"
    yield f"| together | {' | '.join(str(len(tests)) for tests in failing)} | |\n"


def _folder(test: str) -> str:
    return test.removeprefix("tests/tests_pytorch/").split("/")[0]


if __name__ == "__main__":
    main()
