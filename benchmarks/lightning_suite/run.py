"""Lightning's own tests under this project's strategy and under DDP: what fails here and passes there.

    git clone --depth 1 --branch 2.6.5 https://github.com/Lightning-AI/pytorch-lightning
    python benchmarks/lightning_suite/run.py pytorch-lightning/tests models core --json before.json

Folders and files are of ``tests_pytorch``. ``--together`` files share a process, in a copy of the tests, under every
strategy; a test that takes more than ``--limit`` seconds, or ends its process, has failed, and the others go on. Under
DDP run those tests alone that have failed before. ``--seconds`` cuts a run into pieces: what has an outcome in
``--json`` is not run again by ``--resume``.
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
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from reasons import SEVERAL, reason

HERE = Path(__file__).resolve().parent
REFERENCE = "ddp"
# With files, with directories, and with directories that tests take for files.
CONSOLIDATED = "tex_moe_consolidated"
OURS = ("tex_moe_plain", "tex_moe", CONSOLIDATED)
# What has failed under these is all that is run.
ONLY_FAILED = {CONSOLIDATED: ("tex_moe",), REFERENCE: ("tex_moe_plain", "tex_moe")}
# Processes of a few files, until these are given up.
_ATTEMPTS = 12

PREFIX = "tests/tests_pytorch/"
# test -> (outcome, first line of the error)
Outcomes = dict[str, tuple[str, str]]


@dataclass(frozen=True)
class Suite:
    """Lightning's tests: the folder that they lie in, pytest's ``-k``, seconds of one, monotonic time of the end."""

    tests: Path
    select: str
    limit: float
    deadline: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", type=Path, help="the folder that tests_pytorch lies in")
    parser.add_argument("chosen", nargs="+", help="folders and files of tests_pytorch")
    parser.add_argument("--strategies", nargs="+", default=[REFERENCE, *OURS], help="see placed_strategy.py")
    parser.add_argument("--together", type=int, default=1, help="files of one process")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--limit", type=float, default=120, help="seconds of one test")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of the whole run, which then stops")
    parser.add_argument("--select", default="", help="only tests that this matches, as pytest's -k")
    parser.add_argument("--json", type=Path, help="write all outcomes here; what it holds of other tests is kept")
    parser.add_argument("--resume", action="store_true", help="leave out what has an outcome there")
    parser.add_argument("--table", type=Path, help="write what fails, and why, as a table of Markdown")
    parser.add_argument("--compare", type=Path, help="a file written so: list what has changed since")
    options = parser.parse_args()
    held: dict[str, Outcomes] = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    files = list(_files(options.tests / "tests_pytorch", options.chosen))
    parts = [files[start : start + options.together] for start in range(0, len(files), options.together)]
    suite = Suite(options.tests, options.select, options.limit, time.monotonic() + options.seconds)
    run = partial(_of_strategies, suite, options.strategies, held if options.resume else {})
    with ThreadPoolExecutor(options.jobs) as pool:
        for part, of_strategies in zip(parts, pool.map(run, parts), strict=True):
            for strategy, outcomes in of_strategies.items():
                counts = Counter(outcome for outcome, _ in outcomes.values())
                print(
                    f"{strategy:14} {', '.join(f'{n} {o}' for o, n in sorted(counts.items()))}: {' '.join(part)}",
                    flush=True,
                )
                held.setdefault(strategy, {}).update(outcomes)
            if options.json:
                options.json.write_text(json.dumps(held, indent=1))
    if time.monotonic() > suite.deadline:
        print(f"stopped after {options.seconds:.0f} s: what has no outcome yet is left to another run")
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


def _of_strategies(
    suite: Suite, strategies: list[str], held: Mapping[str, Outcomes], files: list[str]
) -> dict[str, Outcomes]:
    """Outcomes of some files, without those that are held.

    Of those in ``ONLY_FAILED`` what has failed under the strategies that they name, if these are run.
    """
    found: dict[str, Outcomes] = {}
    for strategy in sorted(strategies, key=lambda name: name in ONLY_FAILED):
        known = held.get(strategy, {})
        others = [other for other in ONLY_FAILED.get(strategy, ()) if other in strategies]
        of_files = [test for other in others for test in _failed(files, held.get(other, {}), found[other])]
        chosen = sorted({test for test in of_files if PREFIX + test not in known}) if others else files
        found[strategy] = _outcomes(suite, strategy, chosen, known) if chosen else {}
    return found


def _failed(files: list[str], *outcomes: Outcomes) -> Iterator[str]:
    """Names, below ``tests_pytorch``, of the tests of some files that have failed."""
    for test, (outcome, _) in ((test, found) for some in outcomes for test, found in some.items()):
        short = test.removeprefix(PREFIX)
        if outcome == "failed" and short.split("::")[0] in files:
            yield short


def _outcomes(suite: Suite, strategy: str, chosen: list[str], known: Outcomes) -> Outcomes:
    """Run files, or tests of them, until all have an outcome, or the time is over."""
    outcomes: Outcomes = {}
    with tempfile.TemporaryDirectory(prefix="lightning_suite_") as folder:
        copy = Path(folder) / "project" / "tests"
        shutil.copytree(suite.tests / "tests_pytorch", copy / "tests_pytorch")
        shutil.copytree(suite.tests / "legacy", copy / "legacy") if (suite.tests / "legacy").is_dir() else None
        shutil.copy(suite.tests.parent / "pyproject.toml", copy.parent)
        for attempt in range(_ATTEMPTS):
            scratch = Path(folder) / f"attempt{attempt}"
            if time.monotonic() > suite.deadline or _attempt(suite, copy, strategy, chosen, known, outcomes, scratch):
                break
    return outcomes


def _attempt(
    suite: Suite, tests: Path, strategy: str, chosen: list[str], known: Outcomes, outcomes: Outcomes, scratch: Path
) -> bool:
    """Run what has no outcome yet; whether all is through."""
    scratch.mkdir()
    results = scratch / "results"
    results.touch()
    (scratch / "known").write_text(json.dumps([*known, *outcomes]))
    command = [sys.executable, "-m", "pytest", *(f"{PREFIX}{test}" for test in chosen), "-q"]
    command += ["-p", "placed_strategy", "-p", "no:cacheprovider", "--tb=short", f"--basetemp={scratch / 'pytest'}"]
    command += ["--continue-on-collection-errors"]
    command += ["-k", suite.select] if suite.select else []
    with (scratch / "output").open("w") as output:
        process = subprocess.Popen(
            command, cwd=tests.parent, env=_environment(tests, strategy, scratch), start_new_session=True,
            stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            ended = _ends(process, results, suite)
        finally:
            _end_session(process)
    for line in results.read_text().splitlines():
        entry = json.loads(line)
        if outcomes.get(entry["test"], ("running", ""))[0] != "failed":  # in its body, and torn down well
            outcomes[entry["test"]] = (entry["outcome"], entry["error"])
    for test in [test for test, (outcome, _) in outcomes.items() if outcome == "running"]:
        ended = False
        if time.monotonic() > suite.deadline:
            del outcomes[test]
        else:
            why = f"did not end within {suite.limit:.0f} s, or ended its process ({process.returncode})"
            outcomes[test] = ("failed", why)
    return ended


def _ends(process: subprocess.Popen[bytes], results: Path, suite: Suite) -> bool:
    """Whether a process ends by itself, before a test takes too long and before the time is over."""
    written, since = -1, 0.0
    while process.poll() is None:
        now, size = time.monotonic(), results.stat().st_size
        written, since = (written, since) if size == written else (size, now)
        if now > min(since + suite.limit, suite.deadline):
            return False
        time.sleep(0.2)
    return process.returncode >= 0


def _environment(tests: Path, strategy: str, scratch: Path) -> dict[str, str]:
    paths = [tests, HERE, HERE.parent.parent, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    ours = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}
    files = {f"LIGHTNING_SUITE_{name.upper()}": str(scratch / name) for name in ("results", "known")}
    return {**os.environ, **ours, **files, "LIGHTNING_SUITE_STRATEGY": strategy}


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
            print(f"        {test.removeprefix(PREFIX)}")
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
    consolidated = held.get(CONSOLIDATED, {})
    for test in sorted({test for tests in failing for test in tests}):
        short = test.removeprefix(PREFIX)
        wants_a_file = consolidated.get(test, ("",))[0] == "passed"
        for column, tests in enumerate(failing):
            if test in tests:
                rows[reason(short, tests[test], wants_a_file)][column] += 1
    yield f"| *tests run* | {' | '.join(_run(strategy, held) for strategy in ours)} | |\n"
    before = ""
    for (name, why), counts in sorted(rows.items(), key=lambda row: row[0][0] == SEVERAL):
        told, before = "as above" if why == before else why, why
        yield f"| `{name}` | {' | '.join(str(count or '') for count in counts)} | {told} |\n"
    yield f"| together | {' | '.join(str(len(tests)) for tests in failing)} | |\n"


def _run(strategy: str, held: Mapping[str, Outcomes]) -> str:
    """How many tests were run under a strategy, and of which folders."""
    ran = [test for test, (outcome, _) in held[strategy].items() if outcome != "skipped"]
    return f"{len(ran)} of {', '.join(sorted(set(map(_folder, ran))))}"


def _folder(test: str) -> str:
    return test.removeprefix(PREFIX).split("/")[0]


if __name__ == "__main__":
    main()
