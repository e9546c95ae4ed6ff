"""Write the tables of ``docs/gpu.md`` from the files that the parts of ``gpu_parts.py`` have written.

    python benchmarks/gpu_tables.py [--results docs/gpu] [--check]

What lies between two markers is a part's table; without a file of it, it stays as it is. With other results than
those of ``docs/gpu`` the page is written beside them. ``--check`` tells by the exit code whether anything would change.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"
RESULTS = PAGE.parent / "gpu"
NOT_YET = "Not measured yet."
Report = dict[str, Any]


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, all columns but the first to the right."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, rule, *rows))


def told(record: Report) -> str:
    """On what, with what and when it was measured."""
    short = "" if record["size"] == "full" else f"; {record['size']} run"
    return f"{record['device']} ({record['memory_gib']} GiB), torch {record['torch']}, {record['date']}{short}."


def tests(report: Report) -> str:
    """How many came out how."""
    counts = ", ".join(f"{count} {kind}" for kind, count in report["counts"].items())
    failures = "".join(f"\n- failed: `{name}`" for name in report["failures"])
    return f"`pytest tests/cuda`: {counts}.{failures}"


def layer(report: Report) -> str:
    """A layer's cases one below the other."""
    headings = (
        "", "ms: forward", "both", "x ours", "tokens/s", "TFLOP/s: forward", "both", "% of peak: forward", "both",
        "peak MB", "kept MB", "launches", "waits",
    )  # fmt: skip
    pieces = []
    for case in report["cases"]:
        again = ", recomputed" if case["recomputed"] else ""
        first = (
            f"**{case['shape']}** (D {case['dim']}, H {case['hidden']}, {case['experts']} experts, "
            f"top-{case['top_k']}), {case['tokens']:,} tokens, {case['dtype']}, {case['routing']} routing (the fullest "
            f"expert has {case['largest_load']:.2f} of the mean){again}. Peak: "
            f"{case['peak']['flops_per_second'] / 1e12:.0f} TFLOP/s ({case['peak']['of']}); a large product reaches "
            f"{case['product_flops_per_second'] / 1e12:.0f}."
        )
        rows = [_layer_row(name, row) for name, row in case["layers"].items()]
        pieces += [first, table(headings, rows)]
    skipped = {name: reason for case in report["cases"] for name, reason in case["skipped"].items()}
    pieces += [f"Not there: {', '.join(f'{name} ({reason})' for name, reason in skipped.items())}."] if skipped else []
    return "\n\n".join(pieces)


def _layer_row(name: str, row: Report) -> list[str]:
    waits = row["synchronisations"]
    return [
        name,
        f"{row['forward_ms']:.2f}",
        f"{row['both_ms']:.2f}",
        f"{row['to_ours'][1]:.2f}",
        f"{row['tokens_per_second'][1]:,.0f}",
        *(f"{rate / 1e12:.0f}" for rate in row["flops_per_second"]),
        *(f"{100 * share:.1f}" for share in row["share_of_peak"]),
        f"{row['peak_bytes'] / 1e6:,.0f}",
        f"{row['kept_bytes'] / 1e6:,.0f}",
        "+".join(map(str, row["launches"])),
        "-" if waits is None else "+".join(map(str, waits)),
    ]


def step(report: Report) -> str:
    """A step by part."""
    fitted = report["fitted"]
    whole = fitted["layers"] == fitted["of_layers"]
    cut = "all layers" if whole else f"{fitted['layers']} of {fitted['of_layers']} layers"
    allocated, planned = report["peak_bytes"], fitted["planned_bytes"] / 2**30
    held = "" if allocated is None else f"; allocated at most {allocated / 2**30:.1f} GiB, planned {planned:.1f}"
    first = (
        f"{cut}, {report['parameters'] / 1e9:.2f}B parameters, {report['precision']}, states in "
        f"{fitted['optimizer_state_format']}, recomputation: {fitted['activation_checkpointing'] or 'none'}; "
        f"{report['tokens']:,} tokens a step in sequences of {report['sequence_length']:,}. "
        f"**{report['tokens_per_second_of_a_device']:,.0f} tokens/s**, {report['step_ms']:.1f} ms a step, "
        f"{report['flops_per_second'] / 1e12:.0f} TFLOP/s, MFU {100 * report['mfu']:.1f} %{held}."
    )
    passes = ("forward", "recompute", "backward", "between")
    rows = []
    for name, part in report["parts"].items():
        times = [f"{part['ms'][during]:.2f}" if during in part["ms"] else "" for during in passes]
        share = f"{100 * part['total_ms'] / report['step_ms_by_part']:.1f}"
        mfu = "" if part["mfu"] is None else f"{100 * part['mfu']:.1f}"
        rows.append([name, *times, f"{part['total_ms']:.2f}", share, mfu])
    return f"{first}\n\n{table(('part', *(f'{name} ms' for name in passes), 'all ms', '% of step', 'MFU %'), rows)}"


def memory(report: Report) -> str:
    """One line."""
    return (
        f"planned {report['planned'] / 2**30:.3f} GiB, allocated {report['allocated'] / 2**30:.3f} GiB: "
        f"**{report['planned'] / report['allocated']:.3f}**"
    )


def optimizer(report: Report) -> str:
    """The cases one below the other."""
    pieces = []
    for case in report["cases"]:
        rows = [
            [
                name,
                f"{row['peak_temporary_bytes'] / 1e6:,.1f}",
                f"{row['state_bytes_per_parameter']:.2f}",
                "no room" if row["step_ms"] is None else f"{row['step_ms']:.2f}",
                "" if row["ratio"] is None else f"{row['ratio']:.2f}",
                "" if row["gb_per_s"] is None else f"{row['gb_per_s']:,.0f}",
            ]
            for name, row in case["candidates"].items()
        ]
        headings = ("", "temporary MB", "bytes a parameter", "step ms", "by torch fused", "GB/s")
        pieces += [
            f"{case['elements']:,} elements, {case['dtype']}; a copy: {case['copy_gb_per_s']:,.0f} GB/s",
            table(headings, rows),
        ]
    return "\n\n".join(pieces)


def checkpoint(report: Report) -> str:
    """What each way takes."""
    rows = [
        [name, f"{1e3 * seconds:,.0f}", f"{report['megabytes'] / seconds:,.0f}"]
        for name, seconds in report["seconds"].items()
    ]
    return f"{report['megabytes']:,} MB of states on {report['device']}:\n\n{table(('', 'ms', 'MB/s'), rows)}"


def _shown(part: str) -> Callable[[Report], str]:
    return {"tests": tests, "step": step, "optimizer": optimizer, "checkpoint": checkpoint}.get(
        part, layer if part.startswith("layer") else memory
    )


def rewritten(page: str, results: Path) -> str:
    """The page with the tables of the files that there are."""

    def with_table(found: re.Match[str]) -> str:
        part, before = found[1], found[2].strip()
        path = results / f"{part}.json"
        text = before or NOT_YET
        if path.is_file():
            record = json.loads(path.read_text())
            text = f"{told(record)}\n\n{_shown(part)(record['report'])}"
        return f"<!-- {part} -->\n\n{text}\n\n<!-- /{part} -->"

    return re.sub(r"<!-- ([\w-]+) -->\n(.*?)<!-- /\1 -->", with_table, page, flags=re.DOTALL)


def main(words: Sequence[str]) -> None:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the files")
    parser.add_argument("--check", action="store_true", help="only tell whether anything would change")
    options = parser.parse_args(words)
    page = PAGE.read_text()
    made = rewritten(page, options.results)
    if options.check:
        sys.exit(f"{PAGE} is not what the files make of it: python benchmarks/gpu_tables.py" if made != page else 0)
    where = PAGE if options.results.resolve() == RESULTS.resolve() else options.results / PAGE.name
    where.write_text(made)
    print(f"written: {where}")


if __name__ == "__main__":
    main(sys.argv[1:])
