"""Rules: whatever they put together, parts of parameters are read from and written to their own elements of files."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_tex.parallel.box import Box
from lightning_tex.parallel.extent import Extent
from lightning_tex.parallel.topology import Axis
from lightning_tex.pretrained.folder import PretrainedFolder
from lightning_tex.pretrained.reading import PretrainedWeights
from lightning_tex.pretrained.rules import Bindings, Either, Rule, chosen
from lightning_tex.pretrained.tensor_file import SLAB_BYTES, StoredTensor, TensorFiles, runs, slabs
from lightning_tex.pretrained.writing import Weights, write_folder
from lightning_tex.saving.global_tensor import GlobalTensor, stored_part

EXPERTS, HIDDEN, DIM, HEADS = 4, 6, 10, 2

# By name: rules, and what the file must hold of the parameters g, u [E, H, D], d [E, D, H] and k, v [H, D].
PER_EXPERT = [Rule(f"{name}.{e}", (name,), expert=e) for name in "gud" for e in range(EXPERTS)]
DENSE = [Rule("k", ("k",)), Rule("v", ("v",))]
LAYOUTS = {
    "as they are": ([Rule(name, (name,)) for name in "gudkv"], lambda p: p),
    "an expert each": (
        [*PER_EXPERT, *DENSE],
        lambda p: {f"{n}.{e}": p[n][e] for n in "gud" for e in range(EXPERTS)} | {n: p[n] for n in "kv"},
    ),
    "gate and up joined": (
        [Rule("gu", ("g", "u"), dim=1), Rule("d", ("d",)), *DENSE],
        lambda p: {"gu": torch.cat([p["g"], p["u"]], 1), "d": p["d"], "k": p["k"], "v": p["v"]},
    ),
    "gate and up joined by expert": (
        [*(Rule(f"gu.{e}", ("g", "u"), expert=e) for e in range(EXPERTS)), Rule("d", ("d",)), *DENSE],
        lambda p: {f"gu.{e}": torch.cat([p["g"][e], p["u"][e]]) for e in range(EXPERTS)} | {n: p[n] for n in "dkv"},
    ),
    "transposed, gate and up in turn": (
        [Rule("gu", ("g", "u"), dim=1, interleaved=True, transposed=True), Rule("d", ("d",), transposed=True), *DENSE],
        lambda p: {"gu": torch.stack([p["g"], p["u"]], 2).flatten(1, 2).mT, "d": p["d"].mT, "k": p["k"], "v": p["v"]},
    ),
    "keys and values by head": (
        [*(Rule(name, (name,)) for name in "gud"), Rule("kv", ("k", "v"), blocks=HEADS)],
        lambda p: {n: p[n] for n in "gud"}
        | {"kv": torch.cat([p[n].unflatten(0, (HEADS, -1)) for n in "kv"], 1).flatten(0, 1)},
    ),
}  # fmt: skip

SHARD_DIMS = {"g": ("expert", 0), "u": ("expert", 0), "d": ("expert", 0), "k": ("tensor", 0), "v": ("tensor", 1)}


def parameters() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"g": (EXPERTS, HIDDEN, DIM), "u": (EXPERTS, HIDDEN, DIM), "d": (EXPERTS, DIM, HIDDEN)}
    shapes |= {"k": (HIDDEN, DIM), "v": (HIDDEN, DIM)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def parts_of(rank: int, size: int, fold: bool) -> dict[str, Box]:
    """What a rank of some holds: experts or rows, and with ``fold`` columns of its experts, too."""
    boxes = {}
    for name, whole in parameters().items():
        axis, dim = SHARD_DIMS[name]
        cuts = [(Axis(axis, size, rank), dim)]
        if fold and axis == "expert":
            cuts = [(Axis("expert_tensor", size, rank), 2 if name == "d" else 1)]
        boxes[name] = Box.of(whole.shape, cuts)
    return boxes


def held(boxes: dict[str, Box], values: dict[str, Tensor]) -> dict[str, GlobalTensor]:
    return {
        name: GlobalTensor(box.full, torch.float32, [stored_part(box, values[name])]) for name, box in boxes.items()
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_parts_are_written_to_their_place_and_read_from_it(name, tmp_path):
    rules, expected = LAYOUTS[name]
    whole = parameters()
    shapes = {name: tuple(value.shape) for name, value in whole.items()}
    bindings = Bindings.of(rules, shapes)
    boxes = parts_of(0, 1, False)
    weights = Weights(bindings, held(boxes, {n: box.shard(whole[n]) for n, box in boxes.items()}), torch.float32, 400)
    write_folder(tmp_path / "out", weights, {"config.json": b"{}"}, Axis("world"), lambda obj: obj)
    folder = PretrainedFolder(tmp_path / "out")
    with TensorFiles() as files:
        for stored, wanted in expected(whole).items():
            entry = folder.tensors[stored]
            assert torch.equal(files.read(entry, Extent.whole(entry.shape)), wanted), stored
    source = PretrainedWeights(folder, bindings, shapes)
    for size, fold in product((1, 2), (False, True)):
        for rank in range(size):
            boxes = parts_of(rank, size, fold)
            read = {name: torch.full(box.stored, float("nan")) for name, box in boxes.items()}
            source.fill({("model", name): tensor for name, tensor in held(boxes, read).items()})
            for parameter, box in boxes.items():
                assert torch.equal(read[parameter], box.shard(whole[parameter])), (rank, size, fold, parameter)


def test_a_rank_reads_its_own_bytes_and_no_others(tmp_path):
    rules, _ = LAYOUTS["gate and up joined by expert"]
    whole = parameters()
    shapes = {name: tuple(value.shape) for name, value in whole.items()}
    bindings, boxes = Bindings.of(rules, shapes), parts_of(0, 1, False)
    weights = Weights(bindings, held(boxes, {n: box.shard(whole[n]) for n, box in boxes.items()}), torch.float32, 400)
    write_folder(tmp_path / "out", weights, {"config.json": b"{}"}, Axis("world"), lambda obj: obj)
    source = PretrainedWeights(PretrainedFolder(tmp_path / "out"), bindings, shapes)
    boxes = parts_of(1, 2, True)
    source.fill({("model", n): t for n, t in held(boxes, {n: torch.empty(b.stored) for n, b in boxes.items()}).items()})
    assert source.read_bytes == sum(4 * box.extent.numel for box in boxes.values())


def test_rules_that_leave_something_empty_or_fill_it_twice_are_a_bug():
    shapes = {"a": (2, 3), "b": (2, 3)}
    for rules in ([Rule("a", ("a",))], [Rule("a", ("a",)), Rule("b", ("a", "b"))], [Rule("b", ("b",), expert=0)]):
        with pytest.raises(AssertionError, match="is filled by"):
            Bindings.of(rules, shapes)


def test_of_several_layouts_the_one_that_is_there_is_read_and_the_first_is_written():
    one, other = (Rule("a.0", ("a",)),), (Rule("a", ("a",)),)
    rules = [Either((one, other)), Rule("b", ("a",), copy=True)]
    assert list(chosen(rules)) == [*one]
    assert list(chosen(rules, {"a"})) == [*other]
    assert list(chosen(rules, {"a.0", "b"})) == [*one, rules[1]]
    assert list(chosen(rules, {"c"})) == [*one]


@settings(max_examples=60)
@given(st.data())
def test_runs_are_the_bytes_of_an_extent_and_slabs_cover_it(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), max_size=3)))
    offsets = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    sizes = tuple(data.draw(st.integers(0, n - o)) for n, o in zip(shape, offsets, strict=True))
    whole, extent = torch.arange(Extent.whole(shape).numel, dtype=torch.int16).view(shape), Extent(offsets, sizes)
    stored = StoredTensor("x", torch.int16, shape, Path("x"), 6)
    numbers = [(place - 6) // 2 + i for place, (begin, end) in runs(stored, extent) for i in range((end - begin) // 2)]
    assert numbers == whole[extent.slices].flatten().tolist()
    parts = list(slabs(extent, 2, most=data.draw(st.sampled_from([2, 8, SLAB_BYTES]))))
    assert [n for part in parts for n in whole[part.slices].flatten().tolist()] == numbers
