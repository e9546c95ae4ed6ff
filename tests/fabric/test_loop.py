"""A raw loop of Fabric: as one process, as the Trainer, and from one layout to another."""

from __future__ import annotations

import io
import os
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoint_runs import LAYOUTS, TOLERANCE, fit, largest_difference
from helpers.fabric_runs import Net, adamw, loop, muon, own_batch, whole
from helpers.ranks import on_ranks, together
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_tex.fabric import TexMoEStrategy
from lightning_tex.saving import consolidated


def steps(layout: dict[str, Any] | None, world: int, precision: str) -> dict[str, Any]:
    return loop(layout, world, 3, accumulate=2, precision=precision, max_norm=0.5)


def compare(worlds: tuple[int, ...], precisions: tuple[str, ...]) -> None:
    for precision in precisions:
        tolerance = TOLERANCE[precision]
        alone = steps(None, 1, precision)
        trainer = fit(None, 1, 1, precision=precision, epoch_steps=6, accumulate_grad_batches=2, gradient_clip_val=0.5)
        assert largest_difference(alone["weights"], trainer["weights"]) < tolerance
        for world in worlds:
            layouts = {name: layout for name, (size, layout) in LAYOUTS.items() if size == world}
            cases = {name: (steps, layout, world, precision) for name, layout in layouts.items()}
            for by_rank in together(world, cases).values():
                for found in by_rank:
                    assert largest_difference(found["weights"], alone["weights"]) < tolerance
                    assert found["norms"] == pytest.approx(alone["norms"], rel=10 * tolerance)
                    assert found["seen"] == 6


def test_a_loop_is_that_of_one_process_and_the_trainers() -> None:
    compare((2,), ("64-true",))


@pytest.mark.full
def test_a_loop_is_that_of_one_process_on_more_layouts() -> None:
    compare((1, 2, 4), ("32-true", "64-true"))


def of_both(layout: dict[str, Any], world: int, precision: str) -> tuple[float, float, int]:
    """How far a loop of Fabric's is from a fit of the Trainer's, and from where it began; its elements of 16 bits."""
    options = {"epoch_steps": 6, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    fitted = fit(layout, world, 1, precision=precision, **options)["weights"]
    began, looped = (loop(layout, world, n, 2, precision, max_norm=0.5)["weights"] for n in (0, 3))
    halves = sum(one.numel() for one in looped.values() if one.dtype.itemsize == 2)
    return largest_difference(looped, fitted), largest_difference(looped, began), halves


def compare_in_16_bits(worlds: tuple[int, ...]) -> None:
    for world in worlds:
        layouts = {name: layout for name, (size, layout) in LAYOUTS.items() if size == world}
        cases = {
            (name, precision): (of_both, layout, world, precision)
            for name, layout in layouts.items()
            for precision in ("bf16-mixed", "16-mixed", "bf16-true")
        }
        for by_rank in together(world, cases).values():
            assert all(apart == 0 and moved > 0.01 and halves > 0 for apart, moved, halves in by_rank)


def test_in_16_bits_it_is_the_trainers() -> None:
    compare_in_16_bits((1,))


@pytest.mark.full
def test_in_16_bits_it_is_the_trainers_on_two_ranks() -> None:
    compare_in_16_bits((2,))


def from_and_to(layout: dict[str, Any], world: int, load: str | None, save: str | None) -> dict[str, Any]:
    return loop(layout, world, 2, precision="64-true", load=load, save=save, build=muon)


def resumed(folder: Path, chain: list[tuple[str, str]]) -> None:
    """Of each pair the first one saves after two steps, and the second goes on from there."""
    expected = loop(None, 1, 4, precision="64-true", build=muon)["weights"]
    for source, target in chain:
        path = f"{folder}/{source}.ckpt"
        world, layout = LAYOUTS[source]
        on_ranks(world, from_and_to, layout, world, None, path)
        world, layout = LAYOUTS[target]
        for found in on_ranks(world, from_and_to, layout, world, path, None):
            assert largest_difference(found["weights"], expected) < 1e-10
            assert (found["rest"], found["seen"]) == ([], 4)


def test_it_goes_on_on_another_layout(tmp_path: Path) -> None:
    resumed(tmp_path, [("expert, ZeRO 2", "tensor")])


@pytest.mark.full
def test_it_goes_on_from_either_form_on_more_layouts(tmp_path: Path) -> None:
    resumed(
        tmp_path, [("TED", "plain, ZeRO 0"), ("plain, ZeRO 0", "TED"), ("tensor", "one"), ("one", "expert, ZeRO 2")]
    )


def alone(**options: Any) -> tuple[Fabric, Any, Any]:
    fabric = Fabric(accelerator="cpu", devices=1, strategy=TexMoEStrategy(**options))
    fabric.launch()
    net = Net()
    return fabric, *fabric.setup(net, adamw(net))


def trainers(folder: Path) -> None:
    trained = fit({}, 1, 1, save=f"{folder}/trainer.ckpt", epoch_steps=2)["weights"]
    fabric, model, optimizer = alone()
    rest = fabric.load(f"{folder}/trainer.ckpt", {"model": model, "optimizer": optimizer})
    assert rest["global_step"] == 2
    for name, value in whole(model.module, fabric.strategy).items():
        assert torch.equal(value, trained[name])
    fabric.save(f"{folder}/loop.ckpt", {"model": model, "optimizer": optimizer, "note": 3})
    ours, theirs = (consolidated(folder / f"{name}.ckpt") for name in ("loop", "trainer"))
    assert ours["note"] == 3
    torch.testing.assert_close(ours["state_dict"], theirs["state_dict"])
    torch.testing.assert_close(ours["optimizer_states"], theirs["optimizer_states"])


def test_a_trainers_checkpoint_and_a_loops_are_alike(tmp_path: Path) -> None:
    on_ranks(1, trainers, tmp_path)


def refusals(folder: Path) -> None:
    fabric, model, optimizer = alone()
    with pytest.raises(RuntimeError, match="another module is sharded already"):
        fabric.setup(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="a parameter is in an optimizer that has been set up already"):
        fabric.setup_optimizers(torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match="the state has no module"):
        fabric.save(folder / "none.ckpt", {"optimizer": optimizer})
    with pytest.raises(ValueError, match="a checkpoint's state has other"):
        fabric.save(folder / "none.ckpt", {"model": model, "other": nn.Linear(2, 2)})
    with pytest.raises(TypeError, match=r"fabric.save\(filter=..\) is not supported"):
        fabric.save(folder / "none.ckpt", {"model": model}, filter={"model": lambda *_: True})
    with pytest.raises(ValueError, match=r"norm_type=1\); legal: 2.0"):
        fabric.clip_gradients(model, optimizer, max_norm=1.0, norm_type=1)
    fabric.save(folder / "model.ckpt", {"model": model})
    with pytest.raises(KeyError, match="has no 'step'"):
        fabric.load(folder / "model.ckpt", {"model": model, "step": 0})
    assert fabric.load(folder / "model.ckpt", {"model": model, "step": 0}, strict=False) == {}
    with pytest.raises(ValueError, match="max_skipped_steps=0"):
        TexMoEStrategy(max_skipped_steps=0)


def test_what_does_not_go_is_refused(tmp_path: Path) -> None:
    on_ranks(1, refusals, tmp_path)


def not_finite() -> None:
    fabric, model, optimizer = alone()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.zeros(2, 6, dtype=torch.int64)
    fabric.backward(model(ids, ids) * torch.inf)
    with pytest.raises(RuntimeError, match="the norm of the gradients is nan"):
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
    fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False)
    optimizer.step()
    assert optimizer.skipped.total == 1
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_step_that_is_not_finite_is_left_out() -> None:
    on_ranks(1, not_finite)


def batches_of_ranks() -> list[int]:
    fabric = Fabric(accelerator="cpu", devices=4, strategy=TexMoEStrategy(tensor_parallel_size=2))
    fabric.launch()
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(torch.arange(8)), batch_size=2))
    fabric.setup(Net())
    seen = [int(row) for (rows,) in loader for row in rows]
    mean = fabric.all_reduce(torch.tensor(float(seen[0])))
    assert float(mean) == 0.5 and fabric.all_gather(torch.tensor(seen[0])).tolist() == [0, 1]
    return seen


def test_data_are_split_over_data_and_alike_over_tensor() -> None:
    first, second, third, fourth = on_ranks(4, batches_of_ranks)
    assert first == second == [0, 2, 4, 6] and third == fourth == [1, 3, 5, 7]


def under_way(layout: dict[str, Any]) -> tuple[int, bool]:
    """Buffers that are gathered beside what follows a step, and whether a forward then has what all ranks agree on."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy=TexMoEStrategy(**layout))
    fabric.launch()
    net = Net()
    model, optimizer = fabric.setup(net, adamw(net))
    batch = own_batch(fabric.strategy, 0)
    fabric.backward(model(*batch))
    optimizer.step()
    gathering = optimizer.buffers.gathering
    begun = len(gathering.under_way)
    model(*batch)
    return begun, not gathering.under_way


def test_parameters_arrive_while_the_next_forward_runs() -> None:
    assert all(begun > 0 and arrived for begun, arrived in on_ranks(2, under_way, {"expert_parallel_size": 2}))


def recipe(folder: Path) -> str:
    os.chdir(folder)
    sys.argv = ["fabric_loop.py", "--steps", "20", "--save", "last.ckpt"]
    said = io.StringIO()
    with redirect_stdout(said):
        runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "fabric_loop.py"), run_name="__main__")
    return said.getvalue()


@pytest.mark.full
def test_the_recipe_learns_and_saves(tmp_path: Path) -> None:
    (said,) = on_ranks(1, recipe, tmp_path)
    first, second = (float(line.split()[-1]) for line in said.splitlines() if line.startswith("step"))
    assert second < 0.8 * first
    assert consolidated(tmp_path / "last.ckpt")["step"] == 20
