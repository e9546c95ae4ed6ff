"""What is measured on one GPU, part by part; each writes one JSON file. ``gpu.sh`` runs it and makes tables of them.

    python benchmarks/gpu_parts.py [--size full|quick|tiny] [--out FOLDER] [PART ...]

Without names all parts run, within 10 minutes (``quick``: half a minute each, once kernels are compiled; ``tiny``: on a
CPU, to see that they run). A part that takes longer than its budget, or fails, is told and leaves an older file alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent
Size = Literal["full", "quick", "tiny"]
TEX = [sys.executable, "-m", "lightning_tex"]
# Seconds beyond a part's budget that its start and end may take.
GRACE = 20


@dataclass(frozen=True)
class Part:
    """One command whose last line is a JSON object.

    Args:
        command: what all sizes have in common.
        full, quick, tiny: further words, and the budget in seconds of the first two.
    """

    command: list[str]
    full: tuple[float, list[str]]
    quick: tuple[float, list[str]]
    tiny: list[str]

    def words(self, size: Size) -> list[str]:
        """The whole command."""
        return [*self.command, *(self.tiny if size == "tiny" else (self.full if size == "full" else self.quick)[1])]

    def budget(self, size: Size) -> float:
        """Seconds that it may take."""
        return {"full": self.full[0], "quick": self.quick[0], "tiny": 300.0}[size]


def _layer(shape: str, budget: float, dtypes: list[str]) -> Part:
    """``bench layer`` of one shape."""
    return Part(
        [*TEX, "bench", "layer", "--shapes", shape, "--json"],
        (
            budget,
            ["--dtype", *dtypes, "--recomputation", "false", "true", "--turns", "5", "--seconds", f"{budget - GRACE}"],
        ),
        (30, ["--routing", "balanced", "--turns", "3", "--repeat", "3"]),
        ["--divide", "16", "--tokens", "64", "--turns", "1", "--repeat", "1"],
    )


RECIPE = ["--config", str(HERE / "gpu_olmoe.yaml")]
SIZES = "--model.init_args.config."
TINY = [
    *("--trainer.accelerator", "cpu", f"{SIZES}dim", "32", f"{SIZES}num_heads", "2", f"{SIZES}hidden_dim", "16"),
    *(f"{SIZES}num_experts", "8", f"{SIZES}top_k", "2", f"{SIZES}num_layers", "2"),
    *("--data.init_args.vocab_size", "64", "--data.init_args.sequence_length", "32"),
]


def _memory(*strategy: str) -> Part:
    """Planned beside allocated memory of a cut of the model."""
    words = [word for option in strategy for word in (f"--trainer.strategy.init_args.{option}").split("=")]
    return Part(
        [sys.executable, str(HERE / "planned_memory.py"), *RECIPE, *words],
        (40, [f"{SIZES}num_layers", "4"]),
        (30, [f"{SIZES}num_layers", "2"]),
        TINY,
    )


def _tests() -> Part:
    command = [sys.executable, "-m", "pytest", str(ROOT / "tests" / "cuda"), "-q", "-p", "no:cacheprovider"]
    return Part(command, (100, []), (60, ["-x"]), ["-k", "test_a_layer_is_that_of_the_cpu and dropless"])


PARTS: dict[str, Part] = {
    "tests": _tests(),
    "layer-olmoe": _layer("olmoe", 70, ["bfloat16", "float32"]),
    "layer-qwen3-30b-a3b": _layer("qwen3-30b-a3b", 70, ["bfloat16", "float32"]),
    "layer-mixtral": _layer("mixtral", 60, ["bfloat16"]),
    "step": Part(
        [sys.executable, str(HERE / "gpu_step.py"), *RECIPE],
        (90, ["--steps", "10", "--warmup", "4"]),
        (40, ["--steps", "3", "--warmup", "2", f"{SIZES}num_layers", "4"]),
        ["--steps", "1", "--warmup", "1", "--gib", "1", *TINY],
    ),
    "memory-fp32": _memory("optimizer_state_format=fp32"),
    "memory-int8": _memory("optimizer_state_format=int8"),
    "memory-recomputed": _memory("optimizer_state_format=fp32", "activation_checkpointing=full"),
    "optimizer": Part(
        [*TEX, "bench", "optimizer", "--json", "--formats", "fp32", "split", "int8", "stochastic"],
        (50, ["--elements", "1e8", "1e9", "--turns", "10", "--builds", "1"]),
        (30, ["--elements", "1e8", "--turns", "5", "--builds", "1"]),
        ["--elements", "1e5", "--turns", "2", "--builds", "1"],
    ),
    "checkpoint": Part(
        [sys.executable, str(HERE / "checkpoint.py"), "--ranks", "1", "--json"],
        (40, ["--device", "cuda", "--megabytes", "4000", "--turns", "2"]),
        (30, ["--device", "cuda", "--megabytes", "1000", "--turns", "1"]),
        ["--megabytes", "8", "--turns", "1"],
    ),
}


def run(name: str, part: Part, size: Size, out: Path) -> bool:
    """Run a part, and write its file if it ends well in time; whether it did."""
    words, budget = part.words(size), part.budget(size)
    print(f"=== {name} ({size}, {budget:.0f} s): {' '.join(words)}", flush=True)
    began, log = time.monotonic(), out / f"{name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, env=_environment(size), cwd=ROOT, start_new_session=True
        )
        try:
            code: int | None = process.wait(budget + GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    seconds, printed = time.monotonic() - began, log.read_text()
    report = _report(name, printed)
    if report is None and not code and printed.strip().startswith("skipped:"):
        print(f"=== {name}: {printed.strip()}", flush=True)
        return True
    wrong = None if report else "it printed no JSON object"
    if code is None:
        wrong = f"it was ended after {seconds:.0f} s"
    elif code and name != "tests":  # whose failures are what it reports
        wrong = f"it ended with exit code {code}"
    print(f"{printed[-6000:]}\n=== {name}: {wrong or 'done'}, {seconds:.0f} s", flush=True)
    if wrong:
        return False
    record = {**_conditions(size), "part": name, "seconds": round(seconds, 1), "report": report}
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    return not code


def _report(name: str, printed: str) -> dict[str, Any] | None:
    """The object in the last line; of the tests, how many came out how."""
    if name == "tests":
        last = next((line for line in reversed(printed.splitlines()) if re.search(r" in [\d.]+s", line)), "")
        counts = {
            kind: int(count) for count, kind in re.findall(r"(\d+) (passed|failed|skipped|error|deselected)", last)
        }
        failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", printed, re.MULTILINE)
        return {"counts": counts, "failures": failures} if counts.keys() - {"skipped", "deselected"} else None
    lines = [line for line in printed.splitlines() if line.startswith("{")]
    try:
        return json.loads(lines[-1]) if lines else None
    except ValueError:
        return None


def _environment(size: Size) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), str(HERE), os.environ.get("PYTHONPATH")]))
    tiny = {"LIGHTNING_TEX_TEST_DEVICE": "cpu", "OMP_NUM_THREADS": "1"} if size == "tiny" else {}
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "150", **tiny}


def _conditions(size: Size) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "size": size,
        "device": "cpu" if found is None else found.name,
        "memory_gib": None if found is None else round(found.total_memory / 2**30, 1),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


def main(words: Sequence[str]) -> None:
    """Run parts; ends with exit code 1 where one did not end well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--size", choices=("full", "quick", "tiny"), default="full")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "gpu", help="folder of the files")
    options = parser.parse_args(words)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; legal: {', '.join(PARTS)}")
    if options.size != "tiny" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; legal without one: --size tiny --out FOLDER")
    options.out.mkdir(parents=True, exist_ok=True)
    ended = {name: run(name, PARTS[name], options.size, options.out) for name in options.parts or PARTS}
    wrong = [name for name, well in ended.items() if not well]
    print(
        f"=== {len(ended) - len(wrong)} of {len(ended)} parts ended well"
        + (f"; not: {', '.join(wrong)}" if wrong else "")
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main(sys.argv[1:])
