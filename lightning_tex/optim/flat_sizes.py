"""How many elements flat buffers and tiles have: what the optimizer does and the planner foresees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

# Fused CPU kernels give bit-equal results only on windows that start at a multiple of this many elements.
ALIGNMENT = 64
# Elements of a buffer. Gradients are reduced buffer by buffer: several, to begin early; not too small, to be fast.
BUCKETS, SMALLEST_BUCKET, LARGEST_BUCKET = 8, 1 << 18, 1 << 24
# Buffers on their way to their owners at once, where a buffer is freed as soon as it has arrived (ZeRO 2).
BUFFERS_UNDER_WAY = 2
# What a step may allocate besides what it keeps, in bytes, by device. That of the CPU is measured (docs/optimizer.md),
# that of GPUs is not.
BUDGET_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
SCALARS_BYTES = 4096  # of the budget, for what does not grow with the tile
UNBOUNDED = 1 << 62  # elements


def aligned(length: int) -> int:
    """The next multiple of :data:`ALIGNMENT`."""
    return -(-length // ALIGNMENT) * ALIGNMENT


def bucketed(lengths: Sequence[int], replicas: int) -> Iterator[slice]:
    """Which consecutive parameters make up a buffer; all in one where there is nothing to communicate.

    Args:
        lengths: elements of each parameter.
        replicas: ranks that hold copies.
    """
    if replicas == 1:
        yield slice(0, len(lengths))
        return
    limit = min(max(sum(lengths) // BUCKETS, SMALLEST_BUCKET), LARGEST_BUCKET)
    start = size = 0
    for i, length in enumerate(lengths):
        if i > start and size + length > limit:
            yield slice(start, i)
            start, size = i, 0
        size += length
    yield slice(start, len(lengths))


def batched(windows: Sequence[int], tile: int) -> Iterator[slice]:
    """Which consecutive windows are stepped in one call: many small ones, or one.

    Args:
        windows: elements of each.
        tile: elements that one window may have, and all of one call together.
    """
    start = size = 0
    for i, length in enumerate(windows):
        if i > start and size + length > tile:
            yield slice(start, i)
            start, size = i, 0
        size += length
    yield slice(start, len(windows))


def part_length(lengths: Sequence[int], owners: int) -> int:
    """Elements of one owner's part of a buffer of parameters; the buffer has ``owners`` times as many."""
    return aligned(-(-sum(map(aligned, lengths)) // owners))


def most_elements(temporary_bytes: float, device: str) -> int:
    """Elements of a tile whose step, at so many bytes of temporaries per element, keeps to the device's budget."""
    if not temporary_bytes:
        return UNBOUNDED
    budget = BUDGET_BYTES.get(device, BUDGET_BYTES["cuda"]) - SCALARS_BYTES
    return int(budget / temporary_bytes) // ALIGNMENT * ALIGNMENT
