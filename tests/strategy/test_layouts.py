"""Every layout trains as one process does: losses, gradient norms, gradients and parameters over optimizer steps.

By default each layout of one rank runs twice, each of two and four ranks once, and of the 22 on eight ranks those of
``ON_EIGHT`` once, with options that together cover all pairs; several ranks over four steps.
``-m full`` runs twenty steps everywhere, the other layouts of eight ranks and the other cases of two and
four, the rest of the cases that cover all pairs of layout and option, in fp32 and fp64, and the grid: every layout with
every combination of routing by capacity, duplicates not split, AdamW, accumulation and clipping, 960 cases in fp64,
over which the other six options rotate. It takes about an hour and a half on two cores; with ``-s`` it ends with the
worst errors.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from helpers.cases import in_full
from helpers.layout_errors import Record, distances, errors
from helpers.layout_grid import (
    NAMES,
    Case,
    Options,
    Sizes,
    all_options,
    grid,
    layouts,
    legal,
    option_pairs,
    pairs_of_layouts,
    pairwise,
)
from helpers.layout_runs import (
    FEWER_STEPS,
    SAMPLES,
    STEPS,
    Recorded,
    Run,
    SlicedData,
    decoder_config,
    errors_of_run,
    kinds,
    reference_of,
    train_case,
    train_references,
    trainer,
)
from helpers.ranks import on_ranks, together

TOLERANCE = {"32-true": 1e-5, "64-true": 1e-10}
PAIRWISE = pairwise()
GRID = [Run(case, "64-true") for case in grid()]

worst: dict[tuple[str, str], float] = {}
_references: dict[tuple[object, ...], Record] = {}


# All axes larger than one at once, which takes eight ranks: unfolded and folded; and one axis over all ranks.
ON_EIGHT = (Sizes(8, 2, 2, 2), Sizes(8, 4, 4, 1), Sizes(8, 1, 8, 1))


def selection() -> list[Run]:
    """Of each layout's two cases one in fp64, one in fp32; on eight ranks, which are slow here, one of the two."""
    chosen = []
    for index, sizes in enumerate(layouts()):
        first, *more = [case for case in PAIRWISE if case.sizes == sizes]
        if sizes.world < 8:
            chosen += [Run(first, "64-true"), *(Run(case, "32-true") for case in more)]
        else:
            chosen.append(Run((first, *more)[index % 2], "64-true" if index % 3 else "32-true"))
    return chosen


def by_default(run: Run) -> bool:
    """On two and four ranks, layouts take turns between their case in fp64 and that in fp32."""
    sizes = run.case.sizes
    if sizes.world in (2, 4):
        return run.precision == ("32-true" if layouts().index(sizes) % 2 else "64-true")
    return sizes.world == 1 or sizes in ON_EIGHT


SELECTED = selection()
DEFAULT = [run if run.case.sizes.world == 1 else run._replace(steps=FEWER_STEPS) for run in SELECTED if by_default(run)]
MORE = [run for run in SELECTED if run not in DEFAULT]
PAIRS = [run for case in PAIRWISE for precision in TOLERANCE if (run := Run(case, precision)) not in SELECTED]


def find_references(runs: list[Run]) -> None:
    wanted = [r for r in dict.fromkeys(reference_of(run) for run in runs) if r not in _references]
    if wanted:
        first, second = on_ranks(2, train_references, wanted, timeout=120 + 30 * len(wanted))
        _references.update(zip(wanted[0::2], first, strict=True))
        _references.update(zip(wanted[1::2], second, strict=True))


@cache
def errors_on_layout(sizes: Sizes, runs: tuple[Run, ...]) -> dict[Run, list[dict[str, float]]] | AssertionError:
    """All runs of one layout in one forked world, which is tried once: by run, then by rank."""
    compared = {run: (errors_of_run, run, _references[reference_of(run)]) for run in runs}
    try:
        return together(sizes.world, compared, timeout=120 + 60 * len(runs))
    except AssertionError as failure:
        return failure


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    for (precision, key), error in sorted(worst.items()):
        print(f"worst {precision} {key}: {error:.1e}")


def check(run: Run, among: list[Run]) -> None:
    """``run`` equals one process; all runs of its layout among some are trained together."""
    case, precision, steps = run
    find_references(among)
    reference = _references[reference_of(run)]
    assert len(reference.losses) == steps
    assert sum(reference.losses[-2:]) < sum(reference.losses[:2]), "the reference does not learn"
    assert not case.options.capacity or reference.overflowed > 0, "nothing overflows"
    found = errors_on_layout(case.sizes, tuple(other for other in among if other.case.sizes == case.sizes))
    if isinstance(found, AssertionError):
        raise found
    assert len(found[run]) == case.sizes.world
    for rank, by_kind in enumerate(found[run]):
        for key, error in by_kind.items():
            worst[precision, key] = max(worst.get((precision, key), 0.0), error)
        wrong = {key: error for key, error in by_kind.items() if not error <= TOLERANCE[precision]}
        assert not wrong, f"{run}, rank {rank}: {wrong}"


@pytest.mark.parametrize("run", DEFAULT, ids=str)
def test_layout_equals_one_process(run: Run) -> None:
    check(run, DEFAULT)


@pytest.mark.full
@pytest.mark.parametrize("run", MORE, ids=str)
def test_more_of_two_four_and_eight_ranks_equal_one_process(run: Run) -> None:
    check(run, MORE)


@pytest.mark.full
@pytest.mark.parametrize("run", PAIRS, ids=str)
def test_pairwise_layout_equals_one_process(run: Run) -> None:
    check(run, PAIRS)


@pytest.mark.full
@pytest.mark.parametrize("run", GRID, ids=str)
def test_every_layout_with_every_combination_equals_one_process(run: Run) -> None:
    check(run, GRID)


def test_selection_covers_every_layout_and_every_pair_of_options() -> None:
    assert len(layouts()) == 40
    assert {run.case.sizes for run in MORE} == {sizes for sizes in layouts() if sizes.world > 1}
    assert {run.case.sizes for run in DEFAULT} == {s for s in layouts() if s.world < 8} | set(ON_EIGHT)
    on_eight = [run.case.options for run in DEFAULT if run.case.sizes in ON_EIGHT]
    assert {o.capacity for o in on_eight} == {o.accumulate for o in on_eight} == {False, True}
    every_pair = set().union(*map(option_pairs, all_options()))
    assert set().union(*(option_pairs(run.case.options) for run in DEFAULT)) == every_pair
    one_by_one = [replace(Options(), **{name: value}) for name in NAMES for value in (False, True)]
    assert set().union(*(pairs_of_layouts(c) for c in PAIRWISE)) == set().union(
        *(pairs_of_layouts(c) for s in layouts() for o in one_by_one if legal(c := Case(s, o)))
    )


def test_grid_covers_every_combination_and_on_every_layout_every_pair_of_options() -> None:
    for folded, combinations in ((False, 32), (True, 16)):
        some = next(sizes for sizes in layouts() if sizes.folded == folded)
        every_pair = set().union(*(option_pairs(o) for o in all_options() if legal(Case(some, o))))
        for sizes in layouts():
            if sizes.folded == folded:
                options = [run.case.options for run in GRID if run.case.sizes == sizes]
                five = {(o.capacity, o.duplicate_token_dropping, o.adamw, o.accumulate, o.clip) for o in options}
                assert len(options) == len(five) == combinations
                assert set().union(*map(option_pairs, options)) == every_pair


def test_errors_show_what_is_wrong_and_where() -> None:
    def record(**wrong: tuple[int, float]) -> Record:
        values = {}
        for field in ("losses", "norms", "gradients", "parameters"):
            tensor = torch.linspace(1, 2, STEPS, dtype=torch.float64)
            step, value = wrong.get(field, (0, 1.0))
            tensor[step] *= value
            values[field] = tensor
        by_name = {key: {"a": values[key].expand(3, -1)} for key in ("gradients", "parameters")}
        return Record(values["losses"].tolist(), values["norms"].tolist(), **by_name)

    kind_of = {"a": "dense"}
    assert set(errors(record(), record(), kind_of).values()) == {0.0}
    where = {"losses": "loss", "norms": "norm", "gradients": "dense gradients", "parameters": "dense parameters"}
    for field, key in where.items():
        for step in (0, 9, STEPS - 1):
            for value in (1.01, float("nan")):
                found = errors(record(**{field: (step, value)}), record(), kind_of)
                assert not found.pop(key) <= 1e-3, (field, step, value)
                assert set(found.values()) == {0.0}
    assert distances(torch.tensor([[3.0], [4.0]]), torch.zeros(2, 1)).tolist() == [5.0]


# --- DESIGN's literal reference: one process that accumulates the ranks' micro-batches


LITERAL = Case(
    Sizes(4, 2, 2, 2), Options(capacity=True, top_2=True, accumulate=True, swiglu=True, clip=True, tied=True)
)


def train_literal(case: Case, precision: str, steps: int, parts: int) -> Record:
    """One process on micro-batches of what one data rank sees, accumulating over the ranks; ``parts=0``: the case."""
    options = case.options
    from helpers import layout_runs

    layout_runs.decoder_config = without_balance(layout_runs.decoder_config)
    if not parts:
        return train_case(Run(case, precision, steps))
    module = Recorded(layout_runs.decoder_config(options), options.adamw, collect=True)
    fit = trainer(options, precision, 1, "auto", accumulate_grad_batches=parts * 2)
    fit.fit(module, SlicedData(steps * 2 * parts, SAMPLES // parts))
    return module.record


def without_balance(config):
    return lambda options, **changes: config(options, load_balance_coefficient=0.0, **changes)


@pytest.mark.parametrize("steps", in_full([FEWER_STEPS, STEPS], {FEWER_STEPS}))
@pytest.mark.parametrize("precision", in_full(TOLERANCE, {"64-true"}))
def test_equals_one_process_that_accumulates_the_ranks_micro_batches(precision: str, steps: int) -> None:
    (reference,) = on_ranks(1, train_literal, LITERAL, precision, steps, LITERAL.sizes.data)
    assert reference.overflowed > 0
    for record in on_ranks(4, train_literal, LITERAL, precision, steps, 0):
        found = errors(record, reference, kinds(LITERAL))
        assert all(error <= TOLERANCE[precision] for error in found.values()), found


def test_reference_decides_overflow_per_slice() -> None:
    """The reference's dispatcher does what ranks with fewer tokens do, and not what one big batch does."""
    from lightning_tex.moe import MoE
    from lightning_tex.testing.sliced_capacity import decide_overflow_as

    torch.manual_seed(0)
    layer = MoE(8, 8, 4, top_k=2, capacity_factor=0.75).double()
    x = torch.randn(24, 8, dtype=torch.float64)
    whole, parts = layer(x), torch.cat([layer(part) for part in x.chunk(3)])
    decide_overflow_as(layer, 3)
    torch.testing.assert_close(layer(x), parts)
    assert not torch.allclose(whole, parts)
    assert decoder_config(LITERAL.options).capacity_factor == 0.75
