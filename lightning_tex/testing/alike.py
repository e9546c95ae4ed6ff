"""Whether a LightningModule trains on every layout as it does in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lightning import LightningModule

from lightning_tex.parallel.errors import UserValueError
from lightning_tex.testing.comparison import Comparison
from lightning_tex.testing.layouts import Run, legal_layouts
from lightning_tex.testing.runs import BuildOptimizer, Job, sgd
from lightning_tex.testing.verdict import Verdict, complaint

# Relative 2-norm per tensor that rounding alone does not reach in a few steps, by the Trainer's precision.
TOLERANCES = {"64-true": 1e-8, "32-true": 1e-4}


def assert_trains_alike(
    module: LightningModule | Callable[[], LightningModule],
    data: Any = None,
    *,
    layouts: Iterable[Mapping[str, Any] | Run] | None = None,
    steps: int = 3,
    precision: str = "64-true",
    tolerance: float | None = None,
    optimizer: BuildOptimizer | None = sgd,
    seed: int = 0,
    timeout: float = 120,
) -> None:
    """Assert that a module trains on every layout as in one process: losses, gradient norm, gradients, parameters.

    The first batches are taken from the data once, in one process; each data rank of a layout is given its slice. The
    reference is plain Lightning, ``strategy="auto"``. All runs are on CPU, each layout on forked processes.

    Args:
        module: a LightningModule that is not sharded yet, or a function that builds one.
        data: a LightningDataModule; a DataLoader, a CombinedLoader, or a list or dict of DataLoaders; or another
            iterable of global batches. ``None``: the module's own loader.
        layouts: such as ``{"devices": 4, "tensor_parallel_size": 2}``, with any argument of TexMoEStrategy, or runs of
            :func:`legal_layouts`; ``None``: every legal layout of 1, 2 and 4 processes.
        steps: optimizer steps.
        precision: the Trainer's; in ``"64-true"`` rounding cannot be mistaken for an error.
        tolerance: relative 2-norm per tensor, which counts as at least a thousandth of that of all gradients or
            parameters; ``None``: by precision, see :data:`TOLERANCES`.
        optimizer: over the parameters; by default SGD, as Adam hides wrong scales. ``None``: ``configure_optimizers``.
        seed: of torch, NumPy and ``random``.
        timeout: seconds after which a layout counts as hanging.

    Raises:
        AssertionError: with every layout that differs: the first tensor, by how much, and the likely reason. Also for a
            layout that you name and that could not be tried, or where none could.
        UserValueError: see :func:`compare_layouts`.
    """
    verdicts = compare_layouts(
        _builder(module, data), layouts, steps=steps, precision=precision, tolerance=tolerance, optimizer=optimizer,
        seed=seed, timeout=timeout,
    )  # fmt: skip
    told = complaint(verdicts, named=layouts is not None)
    if told is not None:
        raise AssertionError(told)


def compare_layouts(
    build: Callable[[], tuple[LightningModule, Any]],
    layouts: Iterable[Mapping[str, Any] | Run] | None = None,
    *,
    devices: Sequence[int] = (1, 2, 4),
    strategy: Mapping[str, Any] | None = None,
    steps: int = 3,
    precision: str = "64-true",
    tolerance: float | None = None,
    optimizer: BuildOptimizer | None = sgd,
    seed: int = 0,
    timeout: float = 120,
    progress: Callable[[Verdict], None] = lambda verdict: None,
) -> list[Verdict]:
    """Train on every layout and in one process, and compare; see :func:`assert_trains_alike`.

    Args:
        build: makes the module and its data anew.
        layouts: ``None``: every legal one of ``devices`` processes, with the arguments ``strategy`` besides.
        progress: is told of each verdict when it is there.

    Raises:
        UserValueError: a layout without ``devices`` or with a name that TexMoEStrategy does not know, a precision that
            needs a tolerance, data without batches of tensors.
        DoesNotTrain: the module fails in one process; an AssertionError too.
    """
    if precision not in TOLERANCES and tolerance is None:
        legal = ", ".join(map(repr, TOLERANCES))
        raise UserValueError(f"precision={precision!r} needs a tolerance; legal without one: {legal}")
    limit = TOLERANCES[precision] if tolerance is None else tolerance
    named = None if layouts is None else [Run.of(layout) for layout in layouts]
    comparison = Comparison(Job(build, steps, precision, optimizer, seed), limit, timeout)
    runs = legal_layouts(comparison.module, devices, **(strategy or {})) if named is None else named
    verdicts = []
    for run in runs:
        verdicts.append(comparison.verdict(run))
        progress(verdicts[-1])
    return verdicts


def _builder(
    module: LightningModule | Callable[[], LightningModule], data: Any
) -> Callable[[], tuple[LightningModule, Any]]:
    if isinstance(module, LightningModule):
        return lambda: (module, data)
    return lambda: (module(), data)
