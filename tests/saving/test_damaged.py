"""A checkpoint that was cut, changed, robbed of a file or mixed with another is refused by name, and nothing changes.

A seeded tenth of all cases by default; all of them with ``pytest -m faults``.
"""

from __future__ import annotations

import filecmp
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.checkpoint_runs import Data, Model, trainer

import lightning_tex as tex
from lightning_tex.saving import CorruptCheckpointError
from lightning_tex.testing.ranks import run_ranks

TED = {"tensor_parallel_size": 2, "expert_parallel_size": 1}
Damage = Callable[[Path], str]  # does it, and gives the name of the file that must be named


def cut(name: str, part: float) -> Damage:
    def act(folder: Path) -> str:
        file = folder / name
        with file.open("r+b") as opened:
            opened.truncate(int(file.stat().st_size * part))
        return name

    return act


def flipped(name: str, part: float, mask: int) -> Damage:
    def act(folder: Path) -> str:
        file = folder / name
        content = bytearray(file.read_bytes())
        content[int(len(content) * part)] ^= mask
        file.write_bytes(content)
        return name

    return act


def missing(name: str) -> Damage:
    def act(folder: Path) -> str:
        (folder / name).unlink()
        return name

    return act


def swapped(name: str) -> Damage:
    def act(folder: Path) -> str:
        shutil.copy(folder.parent / "other.ckpt" / name, folder / name)
        return name if name != "manifest.json" else ""  # then the other files are the wrong ones

    return act


def damages(names: list[str], seed: int, share: float) -> Iterator[tuple[str, Damage]]:
    """Each file cut at 20 lengths, 200 changes of a byte over all files, each file missing, each of another step."""
    draw = random.Random(seed)
    cases: list[tuple[str, Damage]] = []
    for name in names:
        cases += [(f"{name} cut to {i}/20", cut(name, i / 20)) for i in range(20)]
        cases += [(f"{name} missing", missing(name)), (f"{name} of another step", swapped(name))]
    for index in range(200):
        name, part, mask = names[index % len(names)], draw.random(), 1 << draw.randrange(8)
        cases.append((f"{name} changed at {part:.4f} by {mask}", flipped(name, part, mask)))
    return iter(draw.sample(cases, int(len(cases) * share)))


def state_of(run: L.Trainer, module: L.LightningModule) -> list[torch.Tensor]:
    """Copies of all that a load could change on this rank."""
    kept = [
        value
        for piece in run.optimizers[0].pieces()
        for value in piece.shard.states.saved_states(piece.window).values()
    ]
    numbers = [torch.as_tensor(value) for value in kept if not hasattr(value, "read")]
    elements = [value.read() for value in kept if hasattr(value, "read")]
    random_state = torch.get_rng_state()
    return [t.detach().clone() for t in (*module.parameters(), *module.buffers(), *elements, *numbers, random_state)]


def refused(folder: str, share: float) -> tuple[list[str], int]:
    run, module = trainer(tex.TexMoEStrategy(**TED), 2), Model()
    run.fit(module, Data())
    source, other, victim = (Path(folder, f"{name}.ckpt") for name in ("source", "other", "victim"))
    run.save_checkpoint(source)
    next(module.parameters()).data.add_(1)
    run.save_checkpoint(other)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
    before, wrong, count = state_of(run, module), [], 0
    names = sorted(file.name for file in source.iterdir())
    for what, damage in damages(names, seed=7, share=share):
        count += 1
        named = None
        if run.is_global_zero:
            shutil.rmtree(victim, ignore_errors=True)
            shutil.copytree(source, victim)
            named = damage(victim)
            if (victim / named).is_file() and filecmp.cmp(source / named, victim / named, shallow=False):
                named = None  # the other step's is the same
        named = run.strategy.broadcast(named)
        if named is None:
            continue
        try:
            run.strategy.load_checkpoint(str(victim))
            wrong.append(f"{what}: loaded")
        except CorruptCheckpointError as error:
            text = str(error)
            if f"{victim}/{named}" not in text or "expected" not in text or "found" not in text:
                wrong.append(f"{what}: {text}")
        if not all(torch.equal(a, b) for a, b in zip(before, state_of(run, module), strict=True)):
            wrong.append(f"{what}: something was loaded")
    run.strategy.load_checkpoint(str(source))
    if all(torch.equal(a, b) for a, b in zip(before, state_of(run, module), strict=True)):
        wrong.append("the undamaged one changed nothing, so the comparison is blind")
    return wrong, count


def test_a_tenth_of_all_damages_is_refused(tmp_path: Path) -> None:
    for wrong, count in run_ranks(2, refused, str(tmp_path), 0.1, detail=False):
        assert not wrong
        assert count > 30


@pytest.mark.faults
def test_every_damage_is_refused(tmp_path: Path) -> None:
    for wrong, count in run_ranks(2, refused, str(tmp_path), 1.0, detail=False):
        assert not wrong
        print(f"{count} damages refused by name, nothing changed")


def changed_while_read(folder: str) -> Any:
    """The file changes after it was checked."""
    run, module = trainer(tex.TexMoEStrategy(), 1), Model()
    run.fit(module, Data())
    path = Path(folder, "a.ckpt")
    run.save_checkpoint(path)
    from lightning_tex.saving import reading

    verified = reading.damages

    def then_changed(*arguments: Any) -> list[str]:
        found = verified(*arguments)
        for file in path.glob("*.distcp"):
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        return found

    reading.damages = then_changed
    try:
        run.strategy.load_checkpoint(str(path))
    except CorruptCheckpointError as error:
        return str(error)
    return "loaded"


def test_what_was_checked_is_what_is_loaded(tmp_path: Path) -> None:
    assert "has changed while it was read" in run_ranks(1, changed_while_read, str(tmp_path))[0]
