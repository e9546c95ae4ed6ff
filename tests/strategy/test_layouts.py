"""Every layout trains as one process does: losses, gradient norms, gradients and parameters over 20 optimizer steps.

By default each of the 40 layouts runs twice (each of the 22 on eight ranks once) with options that together cover all
pairs; ``-m full`` runs all pairs of layout and option in fp32 and fp64, and then every layout with every option.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from layout_grid import Case, Options, Sizes, all_options, layouts, legal, option_pairs, pairs_of_layouts, pairwise
from layout_runs import (
    SAMPLES,
    STEPS,
    Record,
    Recorded,
    SlicedData,
    decoder_config,
    errors,
    kinds,
    quiet,
    reference_of,
    train_case,
    train_cases,
    train_references,
    trainer,
)
from ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\).*")

TOLERANCE = {"32-true": 1e-5, "64-true": 1e-10}
PAIRWISE = pairwise()
EVERYTHING = [(case, precision) for case in PAIRWISE for precision in TOLERANCE]
CHUNK = 32  # option sets of one layout that `-m full` runs in one forked world

worst: dict[tuple[str, str], float] = {}
_records: dict[tuple[Case, str], Record] = {}
_references: dict[tuple[object, ...], Record] = {}


def default_selection() -> list[tuple[Case, str]]:
    """Of each layout's two cases one in fp64, one in fp32; on eight ranks, which are slow here, one of the two."""
    chosen = []
    for index, sizes in enumerate(layouts()):
        first, *more = [case for case in PAIRWISE if case.sizes == sizes]
        if sizes.world < 8:
            chosen += [(first, "64-true"), *((case, "32-true") for case in more)]
        else:
            chosen.append(((first, *more)[index % 2], "64-true" if index % 3 else "32-true"))
    return chosen


DEFAULT = default_selection()


def name(run: tuple[Case, str]) -> str:
    return f"{run[0]}-fp{run[1][:2]}"


def find_references(runs: list[tuple[Case, str]]) -> None:
    wanted = [r for r in dict.fromkeys(reference_of(*run) for run in runs) if r not in _references]
    if wanted:
        first, second = run_ranks(2, train_references, wanted, timeout=600)
        _references.update(zip(wanted[0::2], first, strict=True))
        _references.update(zip(wanted[1::2], second, strict=True))


def run_layout(runs: list[tuple[Case, str]]) -> list[list[Record]]:
    """All runs of one layout in one forked world: by rank, then by run."""
    return run_ranks(runs[0][0].sizes.world, train_cases, runs, timeout=900)


def compare(run: tuple[Case, str], by_rank: list[Record]) -> None:
    case, precision = run
    reference = _references[reference_of(*run)]
    assert len(reference.losses) == STEPS
    assert sum(reference.losses[-2:]) < sum(reference.losses[:2]), "the reference does not learn"
    if case.options.capacity:
        assert reference.overflowed > 0, "nothing overflows"
    for rank, record in enumerate(by_rank):
        found = errors(record, reference, kinds(case))
        for key, error in found.items():
            worst[precision, key] = max(worst.get((precision, key), 0.0), error)
        if rank == 0:
            print(name(run), {key: f"{error:.1e}" for key, error in found.items()})
        wrong = {key: error for key, error in found.items() if not error <= TOLERANCE[precision]}
        assert not wrong, f"{name(run)}, rank {rank}: {wrong}"


@cache
def layout_records(sizes: Sizes, runs: tuple[tuple[Case, str], ...]) -> dict[tuple[Case, str], list[Record]]:
    by_rank = run_layout(list(runs))
    return {run: [records[i] for records in by_rank] for i, run in enumerate(runs)}


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    for (precision, key), error in sorted(worst.items()):
        print(f"worst {precision} {key}: {error:.1e}")


def check(run: tuple[Case, str], among: list[tuple[Case, str]]) -> None:
    sizes = run[0].sizes
    find_references(among)
    runs = tuple(other for other in among if other[0].sizes == sizes)
    compare(run, layout_records(sizes, runs)[run])


@pytest.mark.parametrize("run", DEFAULT, ids=name)
def test_layout_equals_one_process(run: tuple[Case, str]) -> None:
    check(run, DEFAULT)


@pytest.mark.full
@pytest.mark.parametrize("run", [run for run in EVERYTHING if run not in DEFAULT], ids=name)
def test_pairwise_layout_equals_one_process(run: tuple[Case, str]) -> None:
    check(run, [other for other in EVERYTHING if other not in DEFAULT])


@pytest.mark.full
@pytest.mark.parametrize("chunk", range(len(all_options()) // CHUNK))
@pytest.mark.parametrize("sizes", layouts(), ids=str)
def test_every_option_on_every_layout(sizes: Sizes, chunk: int) -> None:
    options = all_options()[chunk * CHUNK : (chunk + 1) * CHUNK]
    runs = [(case, "64-true") for o in options if legal(case := Case(sizes, o))]
    if not runs:
        pytest.skip("folding always splits duplicates")
    find_references(runs)
    by_rank = run_layout(runs)
    for i, run in enumerate(runs):
        compare(run, [records[i] for records in by_rank])


def test_selection_covers_every_layout_and_every_pair_of_options() -> None:
    assert len(layouts()) == 40
    assert {case.sizes for case, _ in DEFAULT} == set(layouts())
    every_pair = set().union(*map(option_pairs, all_options()))
    assert set().union(*(option_pairs(case.options) for case, _ in DEFAULT)) == every_pair
    assert set().union(*(pairs_of_layouts(c) for c in PAIRWISE)) == set().union(
        *(pairs_of_layouts(c) for s in layouts() for o in all_options() if legal(c := Case(s, o)))
    )


# --- DESIGN's literal reference: one process that accumulates the ranks' micro-batches


LITERAL = Case(
    Sizes(4, 2, 2, 2), Options(capacity=True, top_2=True, accumulate=True, swiglu=True, clip=True, tied=True)
)


def train_literal(case: Case, precision: str, parts: int) -> Record:
    """One process on micro-batches of what one data rank sees, accumulating over the ranks; ``parts=0``: the case."""
    quiet()
    options = case.options
    import layout_runs

    layout_runs.decoder_config = without_balance(layout_runs.decoder_config)
    if not parts:
        return train_case(case, precision)
    module = Recorded(layout_runs.decoder_config(options), options.adamw, collect=True)
    fit = trainer(options, precision, 1, "auto", accumulate_grad_batches=parts * 2)
    fit.fit(module, SlicedData(STEPS * 2 * parts, SAMPLES // parts))
    return module.record


def without_balance(config):
    return lambda options, **changes: config(options, load_balance_coefficient=0.0, **changes)


@pytest.mark.parametrize("precision", TOLERANCE)
def test_equals_one_process_that_accumulates_the_ranks_micro_batches(precision: str) -> None:
    (reference,) = run_ranks(1, train_literal, LITERAL, precision, LITERAL.sizes.data)
    assert reference.overflowed > 0
    for record in run_ranks(4, train_literal, LITERAL, precision, 0):
        found = errors(record, reference, kinds(LITERAL))
        assert max(found.values()) <= TOLERANCE[precision], found


def test_reference_decides_overflow_per_slice() -> None:
    """The test's own dispatcher does what ranks with fewer tokens do, and not what one big batch does."""
    from layout_runs import decide_overflow_as

    from lightning_tex.moe import MoE

    torch.manual_seed(0)
    layer = MoE(8, 8, 4, top_k=2, capacity_factor=0.75).double()
    x = torch.randn(24, 8, dtype=torch.float64)
    whole, parts = layer(x), torch.cat([layer(part) for part in x.chunk(3)])
    decide_overflow_as(layer, 3)
    torch.testing.assert_close(layer(x), parts)
    assert not torch.allclose(whole, parts)
    assert decoder_config(LITERAL.options).capacity_factor == 0.75
