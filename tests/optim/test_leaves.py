"""What formats do to windows, compiled and eager: to the bit."""

import pytest
import torch

from lightning_tex.optim.compact import joined, split
from lightning_tex.optim.moments import BLOCK, decoded, encode
from lightning_tex.optim.rounding import fold, mix, round_stochastically, table_of, whole_index
from lightning_tex.parallel.box import Box
from lightning_tex.parallel.compiled import compile_leaves
from lightning_tex.parallel.topology import Axis

BLOCKS = 1000


@pytest.fixture(autouse=True)
def _auto():
    yield
    compile_leaves("auto")


def results():
    values = torch.randn(BLOCK * BLOCKS, generator=torch.Generator().manual_seed(1))
    values *= torch.logspace(-6, 3, BLOCKS).repeat_interleave(BLOCK)
    bits = torch.randint(0, 1 << 16, values.shape, generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    for dtype, random, skip in (
        (torch.int8, None, None),
        (torch.uint8, None, None),
        (torch.uint8, bits, None),
        (torch.uint8, bits, torch.zeros(())),
        (torch.uint8, bits, torch.ones(())),
    ):
        codes, scales = torch.zeros_like(values, dtype=dtype), torch.zeros(BLOCKS)
        encode((values if dtype == torch.int8 else values.square()).clone(), codes, scales, random, skip)
        yield from (codes, scales, decoded(codes, scales))
    upper, remainder = torch.zeros_like(values, dtype=torch.bfloat16), torch.zeros_like(values, dtype=torch.int16)
    split(values.clone(), upper, remainder)
    yield from (upper, remainder, joined(upper, remainder))
    rounded = torch.zeros_like(upper)
    round_stochastically(values.clone(), bits.clone(), rounded)
    yield rounded
    hashed = bits.clone()
    mix(hashed)
    yield hashed
    box = Box.of((4, 300, 70), [(Axis("expert", 2, 1), 0), (Axis("tensor", 2, 1), 2)])
    yield whole_index(torch.arange(100, 4000, dtype=torch.int32), table=table_of(box, values.device))
    yield fold(torch.arange(2**40, 2**40 + 1000))


@pytest.mark.full  # a compiler takes its seconds
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # of torch itself, while it loads the compiler
def test_compiled_leaves_change_no_bit():
    eager = list(results())
    compile_leaves(True)
    with torch.no_grad():
        compiled = list(results())
    different = [i for i, pair in enumerate(zip(eager, compiled, strict=True)) if not torch.equal(*pair)]
    assert not different
