"""The words of ``lightning-tex checkpoint``."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_tex.saving import CorruptCheckpointError, paths
from lightning_tex.saving.consolidate import checkpoints_in, consolidate
from lightning_tex.saving.model_state import MODEL, OPTIMIZER
from lightning_tex.saving.reading import Directory


def main(arguments: Sequence[str]) -> None:
    """Run ``lightning-tex checkpoint``.

    Args:
        arguments: what follows ``checkpoint`` on the command line.

    Raises:
        ValueError: the checkpoint is damaged, or is none.
        OSError: it cannot be read, or the output not be written.
    """
    parser = argparse.ArgumentParser("lightning-tex checkpoint", description="Look at checkpoint directories.")
    kinds = parser.add_subparsers(required=True)
    inspect = kinds.add_parser("inspect", help="what a checkpoint holds, or which checkpoints a folder holds")
    verify = kinds.add_parser("verify", help="compare every file with the digest in the manifest")
    whole = kinds.add_parser("consolidate", help="one file that torch.load and strategy='auto' read")
    for kind, run in ((inspect, _inspect), (verify, _verify), (whole, _consolidate)):
        kind.add_argument("path", type=Path, metavar="PATH", help="a checkpoint directory, or a link to one")
        kind.add_argument("--json", action="store_true", help="print one JSON object as the last line")
        kind.set_defaults(run=run)
    inspect.add_argument("--tensors", action="store_true", help="list every tensor")
    whole.add_argument("--output", type=Path, help="the file to write (default: PATH without its suffix, .whole.ckpt)")
    whole.add_argument("--weights-only", action="store_true", help="leave optimizer states out")
    options = parser.parse_args(arguments)
    options.run(options)


def _print(found: dict[str, Any], as_json: bool, tables: Sequence[Table | str]) -> None:
    console = Console()
    for table in tables:
        console.print(table, highlight=False, soft_wrap=isinstance(table, str))
    if as_json:
        print(json.dumps(found))


def _inspect(options: argparse.Namespace) -> None:
    path = paths.find(options.path)
    if path.is_dir() and not paths.has_manifest(path) and (found := checkpoints_in(path)):
        _inspect_folder(path, found, options.json)
        return
    manifest = paths.manifest_of(path)
    directory = Directory(path, manifest)
    kinds = {"weights": MODEL, "optimizer states": OPTIMIZER, "random states": "random"}
    amounts: dict[str, dict[str, int]] = {}
    for title, kind in kinds.items():
        tensors = [saved for name, saved in directory.saved.items() if name[0] == kind]
        elements = [prod(saved.shape) for saved in tensors]
        size = sum(n * saved.dtype.itemsize for n, saved in zip(elements, tensors, strict=True))
        amounts[title] = {"tensors": len(tensors), "elements": sum(elements), "bytes": size}
    facts = asdict(manifest) | {"path": str(path), "holds": amounts}
    facts["files"] = {name: record._asdict() for name, record in manifest.files.items()}
    about = Table("", "", title=str(options.path), show_header=False)
    about.add_row("step, epoch", f"{manifest.step}, {manifest.epoch}")
    about.add_row("layout", ", ".join(f"{axis} {size}" for axis, size in manifest.layout.items()))
    about.add_row("written", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.written)))
    about.add_row("by", ", ".join(f"{name} {version}" for name, version in manifest.versions.items()))
    about.add_row("files", f"{len(manifest.files)}, {sum(f.bytes for f in manifest.files.values()):,} bytes")
    for title, amount in amounts.items():
        about.add_row(title, f"{amount['tensors']} tensors, {amount['elements']:,} elements, {amount['bytes']:,} bytes")
    tables = [about]
    if options.tensors:
        listed = Table("tensor", "shape", "dtype")
        for name, saved in directory.saved.items():
            listed.add_row(".".join(name), str(list(saved.shape)), str(saved.dtype).removeprefix("torch."))
        tables.append(listed)
        facts["tensors"] = {
            ".".join(name): {"shape": list(saved.shape), "dtype": str(saved.dtype).removeprefix("torch.")}
            for name, saved in directory.saved.items()
        }
    _print(facts, options.json, tables)


def _inspect_folder(folder: Path, found: list[tuple[Path, str | None]], as_json: bool) -> None:
    table = Table("checkpoint", "step", "complete", title=str(folder))
    facts = []
    for path, problem in found:
        step = None if problem else paths.manifest_of(path).step
        table.add_row(path.name, "" if step is None else str(step), problem or "yes")
        facts.append({"path": str(path), "step": step, "problem": problem})
    newest = paths.latest(folder)
    _print({"checkpoints": facts, "latest": newest and str(newest)}, as_json, [table])


def _verify(options: argparse.Namespace) -> None:
    path = paths.find(options.path)
    if not path.is_dir():
        raise CorruptCheckpointError(f"{path} is a plain file, which has no digests; legal: a checkpoint directory")
    directory = Directory.verified(path)
    files = directory.manifest.files
    size = sum(record.bytes for record in files.values())
    message = (
        f"{options.path}: {len(files)} files, {size:,} bytes, as they were written at step {directory.manifest.step}"
    )
    _print(
        {"path": str(path), "step": directory.manifest.step, "files": len(files), "bytes": size},
        options.json,
        [message],
    )


def _consolidate(options: argparse.Namespace) -> None:
    output = options.output or options.path.with_suffix(".whole.ckpt")
    consolidate(options.path, output, options.weights_only)
    size = output.stat().st_size
    _print({"path": str(output), "bytes": size}, options.json, [f"{output}: {size:,} bytes"])
