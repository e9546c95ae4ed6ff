"""``lightning-tex checkpoint``: what checkpoints hold, whether they are whole, and one file of each."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from lightning_tex.cli.options import Command, run_one_of
from lightning_tex.cli.tables import console, table, tell_line
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.saving import CorruptCheckpointError, Location, at, paths
from lightning_tex.saving.checkpoint_format import OWN_ENTRY
from lightning_tex.saving.consolidate import checkpoints_in, consolidate, default_output
from lightning_tex.saving.model_state import MODEL, OPTIMIZERS, TIES
from lightning_tex.saving.newest import find, latest
from lightning_tex.saving.reading import Directory


@dataclass(frozen=True)
class CheckpointOptions:
    """Which checkpoint.

    Args:
        path: a checkpoint directory, or a link to one; or its URL.
    """

    path: str


@dataclass(frozen=True)
class InspectOptions(CheckpointOptions):
    """Which checkpoint.

    Args:
        tensors: list every tensor.
    """

    tensors: bool = False


@dataclass(frozen=True)
class ConsolidateOptions(CheckpointOptions):
    """Which checkpoint.

    Args:
        output: the file to write; left out: beside PATH, whole-of-NAME or weights-of-NAME.
        weights_only: leave optimizer states out.
    """

    output: str | None = None
    weights_only: bool = False


def inspect(options: InspectOptions) -> dict[str, Any]:
    """Show what a checkpoint holds, or which checkpoints a folder holds."""
    path = find(at(options.path))
    if path.is_dir() and not paths.has_manifest(path) and (checkpoints := checkpoints_in(path)):
        return _inspect_folder(path, checkpoints)
    manifest = paths.manifest_of(path)
    directory = Directory(path, manifest)
    kinds = {"weights": MODEL, "optimizer states": OPTIMIZERS.format(""), "random states": "random"}
    amounts: dict[str, dict[str, int]] = {}
    again = {(MODEL, name) for name in _further_names(directory)}
    for title, kind in kinds.items():
        tensors = [one for name, one in directory.saved.items() if name[0].startswith(kind) and name not in again]
        elements = [prod(saved.shape) for saved in tensors]
        size = sum(n * saved.dtype.itemsize for n, saved in zip(elements, tensors, strict=True))
        amounts[title] = {"tensors": len(tensors), "elements": sum(elements), "bytes": size}
    facts = asdict(manifest) | {"path": str(path), "holds": amounts}
    facts["files"] = {name: record._asdict() for name, record in manifest.files.items()}
    about = table("", " ", title=str(options.path), left=["", " "])
    about.show_header = False
    about.add_row("step, epoch", f"{manifest.step}, {manifest.epoch}")
    about.add_row("layout", ", ".join(f"{axis} {size}" for axis, size in manifest.layout.items()))
    about.add_row("written", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.written)))
    about.add_row("by", ", ".join(f"{name} {version}" for name, version in manifest.versions.items()))
    about.add_row("files", f"{len(manifest.files)}, {sum(f.bytes for f in manifest.files.values()):,} bytes")
    for title, amount in amounts.items():
        about.add_row(title, f"{amount['tensors']} tensors, {amount['elements']:,} elements, {amount['bytes']:,} bytes")
    console().print(about)
    if options.tensors:
        listed = table("tensor", "shape", "dtype", left=["tensor", "shape", "dtype"])
        for name, saved in directory.saved.items():
            listed.add_row(".".join(name), str(list(saved.shape)), str(saved.dtype).removeprefix("torch."))
        console().print(listed)
        facts["tensors"] = {
            ".".join(name): {"shape": list(saved.shape), "dtype": str(saved.dtype).removeprefix("torch.")}
            for name, saved in directory.saved.items()
        }
    return facts


def _further_names(directory: Directory) -> Collection[str]:
    """Of tied parameters, which are saved under every name; none where the state around tensors is not read."""
    with suppress(UserValueError):
        ties: Mapping[str, str] = directory.trainer_state()[OWN_ENTRY].get(TIES, {})
        return ties.keys()
    return ()


def _inspect_folder(folder: Location, checkpoints: Sequence[tuple[Location, str | None]]) -> dict[str, Any]:
    listed = table("checkpoint", "step", "complete", title=str(folder), left=["checkpoint", "complete"])
    facts = []
    for path, problem in checkpoints:
        step = None if problem else paths.manifest_of(path).step
        listed.add_row(path.name, "" if step is None else str(step), problem or "yes")
        facts.append({"path": str(path), "step": step, "problem": problem})
    console().print(listed)
    newest = latest(folder)
    return {"checkpoints": facts, "latest": newest and str(newest)}


def verify(options: CheckpointOptions) -> dict[str, Any]:
    """Compare every file with the digest in the manifest."""
    path = find(at(options.path))
    if not paths.is_directory(path):
        raise CorruptCheckpointError(f"{path} is a plain file, which has no digests; legal: a checkpoint directory")
    manifest = Directory.verified(path).manifest
    size = sum(record.bytes for record in manifest.files.values())
    tell_line(
        f"{options.path}: {len(manifest.files)} files, {size:,} bytes, as they were written at step {manifest.step}"
    )
    return {"path": str(path), "step": manifest.step, "files": len(manifest.files), "bytes": size}


def consolidate_to_file(options: ConsolidateOptions) -> dict[str, Any]:
    """Write one file that torch.load and strategy='auto' read."""
    output = at(options.output) if options.output else default_output(at(options.path), options.weights_only)
    consolidate(options.path, output, options.weights_only)
    size = paths.size(output)
    tell_line(f"{output}: {size:,} bytes")
    return {"path": str(output), "bytes": size}


COMMANDS = (
    Command("checkpoint inspect", inspect, (InspectOptions,), takes_path=True),
    Command("checkpoint verify", verify, (CheckpointOptions,), takes_path=True),
    Command("checkpoint consolidate", consolidate_to_file, (ConsolidateOptions,), takes_path=True),
)


def main(words: Sequence[str]) -> None:
    """Run ``lightning-tex checkpoint``."""
    run_one_of("checkpoint", COMMANDS, words)
