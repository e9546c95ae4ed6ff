"""State formats: what they keep, how exactly, in how many bytes."""

import copy
import gc
from functools import partial

import pytest
import torch
from helpers.optimizer_alone import SignDescent, network, tiled
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_tex.bench.memory import peak_bytes
from lightning_tex.optim.compact import SplitMaster
from lightning_tex.optim.flat import Entry
from lightning_tex.optim.flat_sizes import BUDGET_BYTES, most_elements
from lightning_tex.optim.formats import PlainStates
from lightning_tex.optim.moments import BLOCK, Int8Moments
from lightning_tex.optim.probe import Allocations, temporary_bytes
from lightning_tex.optim.rounding import Rounding, RoundingSeed, global_index, round_stochastically
from lightning_tex.parallel.extent import Extent
from lightning_tex.parallel.sharding import Box, ParameterSharding
from lightning_tex.parallel.topology import Axis, Topology

COMPACT = ("split", "int8", "stochastic")


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **options)


def set_gradients(model, step, factor=1.0):
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        gradient = torch.randn(p.shape, generator=generator) * factor
        p.grad = gradient.to(p.dtype) if p.grad is None else p.grad.copy_(gradient)


def any_bits(count=1 << 16):
    generator = torch.Generator().manual_seed(3)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator, dtype=torch.int64).to(torch.int32)
    ties = torch.arange(-200, 200, dtype=torch.int32) * 65536 + 0x8000
    values = torch.cat([bits, ties, torch.tensor([0, -(2**31), 1, -1, 0x7F7FFFFF], dtype=torch.int32)])
    values = values.view(torch.float32)
    return values[torch.isfinite(values)][: count // BLOCK * BLOCK]


# --- split


def test_a_split_master_is_exact_to_the_bit_and_its_parameter_the_nearest():
    values = any_bits()
    master = SplitMaster(torch.zeros_like(values, dtype=torch.bfloat16))
    master.write(slice(0, len(values)), values.clone())
    assert torch.equal(master.read(slice(0, len(values))).view(torch.int32), values.view(torch.int32))
    nearest = values.bfloat16()
    tie = (values.view(torch.int32) & 0xFFFF) == 0x8000
    assert tie.any() and torch.equal(master.own[~tie], nearest[~tie])
    assert (master.own[tie].float().abs() >= values[tie].abs()).all(), "ties go up in magnitude"


@pytest.mark.parametrize("tile_size", [64, None])
def test_split_has_the_masters_of_fp32_bit_for_bit(tile_size):
    masters = []
    for optimizer_state_format in ("fp32", "split"):
        model = network(torch.bfloat16)
        optimizer = tiled(model, adamw(model), tile_size, optimizer_state_format=optimizer_state_format)
        for step in range(200):
            set_gradients(model, step)
            optimizer.step()
        found = [window.tile.detach().clone() for states in all_states(optimizer) for window in windows(states)]
        masters.append(torch.cat(found))
        assert masters[0].dtype == torch.float32
    assert torch.equal(*masters)


def all_states(optimizer):
    return [shard.states for shard in optimizer.shards]


def windows(states):
    for i in range(len(states.spans)):
        with states.window(i) as window:
            yield window


def test_weights_loaded_into_a_split_master_leave_no_remainder():
    model = network(torch.bfloat16)
    optimizer = tiled(model, torch.optim.SGD(model.parameters(), lr=1.0), optimizer_state_format="split")
    set_gradients(model, 0, 1e-3)
    optimizer.step()
    model.load_state_dict({name: torch.randn_like(t) for name, t in model.state_dict().items()})
    loaded = copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(t, loaded[name]) for name, t in model.state_dict().items())


# --- stochastic


def test_stochastic_rounding_is_right_on_average_and_gives_neighbours():
    values = torch.tensor([1.0, 1.001, -1.001, 3e-5, -7.77, 0.0]).repeat(20000)
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 1 << 16, values.shape, generator=generator, dtype=torch.int32)
    out = torch.empty_like(values, dtype=torch.bfloat16)
    round_stochastically(values.clone(), bits, out)
    rounded, exact = out.double().view(-1, 6), values.double().view(-1, 6)[0]
    spacing = 2.0 ** (exact.abs().clamp(min=1e-30).log2().floor() - 7)
    assert ((rounded - exact).abs() < spacing).all()
    assert ((rounded.mean(0) - exact).abs() <= 0.02 * spacing).all()
    assert (rounded[:, 0] == 1.0).all() and (rounded[:, 5] == 0.0).all()


def test_updates_too_small_to_see_add_up():
    model = nn.Linear(64, 64, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = tiled(model, torch.optim.SGD(model.parameters(), lr=1e-4), optimizer_state_format="stochastic")
    for _ in range(100):
        model.weight.grad.fill_(1.0)
        optimizer.step()
    assert abs(float(model.weight.detach().double().mean()) - 0.99) < 5e-4
    assert model.weight.unique().numel() > 1


def bits_of(box, name="weight", seed=1, step=0, key="master"):
    stored = nn.Parameter(torch.zeros(box.stored, dtype=torch.bfloat16))
    placed = ParameterSharding.of(name, box, {}, Topology.single())
    entry = Entry(stored, placed, Extent.run(0, stored.numel()))
    rounding = Rounding(RoundingSeed(seed, step), [entry], 0, stored.device)
    return rounding.bits(slice(0, stored.numel()), key).view(box.stored)


@st.composite
def boxes(draw):
    whole = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    dims = draw(st.lists(st.integers(0, len(whole) - 1), unique=True))
    sizes = [draw(st.integers(1, 3)) for _ in dims]
    return whole, [
        (Axis("a", size, draw(st.integers(0, size - 1))), dim) for size, dim in zip(sizes, dims, strict=True)
    ]


@given(boxes())
def test_global_indices_are_those_of_the_whole_tensor(case):
    whole, cuts = case
    box = Box.of(whole, cuts)
    count = torch.Size(box.stored).numel()
    index = global_index(box, 0, count, torch.device("cpu")).view(box.stored)
    expected = torch.arange(torch.Size(whole).numel()).view(whole)
    assert torch.equal(box.unpadded(index), expected[box.extent.slices])
    assert torch.equal(global_index(box, count // 2, count, torch.device("cpu")), index.flatten()[count // 2 :])


def test_random_bits_are_even_and_change_with_everything_they_depend_on():
    box = Box.of((256, 256), [])
    bits = bits_of(box)
    assert bits.min() >= 0 and bits.max() < 1 << 16
    ones = torch.stack([(bits >> i & 1).double().mean() for i in range(16)])
    assert ((ones - 0.5).abs() < 0.01).all()
    neighbours = (bits[:, 1:] ^ bits[:, :-1]).double()
    assert 0.45 < float(neighbours.mean() / (1 << 16)) < 0.55
    for other in (bits_of(box, seed=2), bits_of(box, step=1), bits_of(box, name="bias"), bits_of(box, key="exp_avg")):
        assert float((other != bits).double().mean()) > 0.99
    part = Box.of((256, 256), [(Axis("tensor", 2, 1), 1)])
    assert torch.equal(bits_of(part), bits[:, 128:])


# --- int8


def moments(count, nonnegative=frozenset({"v"})):
    own = torch.zeros(count, dtype=torch.bfloat16)
    kept = Int8Moments(own, nonnegative, Rounding(RoundingSeed(), [], 0, own.device))
    for key in ("m", "v"):
        kept.make(key)
    return kept


def test_eight_bit_states_are_near_and_what_was_kept_once_is_kept_exactly():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(BLOCK * 50, generator=generator) * torch.logspace(-6, 3, 50).repeat_interleave(BLOCK)
    kept, every = moments(len(values)), slice(0, len(values))
    for key, exact in (("m", values), ("v", values.square())):
        kept.write(key, every, exact.clone(), exact=True)
        read = kept.read(key, every)
        largest = exact.view(-1, BLOCK).abs().amax(1, keepdim=True)
        relative = ((read - exact).abs() / exact.abs()).view(-1, BLOCK)
        near_top = exact.view(-1, BLOCK).abs() > 1e-3 * largest
        assert relative[near_top].max() < 0.1 and relative[near_top].mean() < 0.03
        assert torch.equal(read.view(-1, BLOCK).abs().amax(1), largest[:, 0]), "a block's largest value is exact"
        kept.write(key, every, read.clone(), exact=True)
        assert torch.equal(kept.read(key, every), read)


def test_a_square_above_zero_never_becomes_zero_and_zero_stays():
    values = torch.full((BLOCK,), 1e-30)
    values[0], values[1] = 1.0, 0.0
    kept = moments(BLOCK)
    kept.write("v", slice(0, BLOCK), values.clone())
    read = kept.read("v", slice(0, BLOCK))
    assert read[0] == 1 and read[1] == 0 and (read[2:] > 0).all()


def test_the_largest_value_of_every_block_is_kept_exactly():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2000, BLOCK, generator=generator) * 10 ** torch.linspace(-36, 36, 2000)[:, None]
    for key, whole in (("m", values), ("v", values.abs())):
        kept = moments(values.numel())
        kept.write(key, slice(0, values.numel()), whole.flatten().clone())
        read = kept.read(key, slice(0, values.numel())).view(-1, BLOCK)
        at = whole.abs().argmax(1, keepdim=True)
        assert torch.equal(read.gather(1, at), whole.gather(1, at)), key


def test_a_slow_average_is_not_stuck_at_a_code():
    count, steps = BLOCK * 8, 3000
    weight = nn.Parameter(torch.zeros(count, dtype=torch.bfloat16))
    placed = ParameterSharding.of("weight", Box.of(weight.shape, []), {}, Topology.single())
    entry = Entry(weight, placed, Extent.run(0, count))
    every, rounding = slice(0, count), Rounding(RoundingSeed(), [entry], 0, weight.device)
    kept = Int8Moments(weight.detach(), frozenset({"v"}), rounding)
    kept.make("v")
    start = torch.full((count,), 0.2)
    start.view(-1, BLOCK)[:, 0] = 1.0
    kept.write("v", every, start, exact=True)
    for step in range(steps):
        rounding.rounding_seed.step = step
        values = kept.read("v", every)
        values.view(-1, BLOCK)[:, 1:].lerp_(torch.tensor(0.25), 1e-3)
        kept.write("v", every, values)
    rest = kept.read("v", every).view(-1, BLOCK)[:, 1:]
    assert abs(float(rest.mean()) - (0.25 - 0.05 * 0.999**steps)) < 0.005


# --- all of them


@pytest.mark.parametrize("optimizer_state_format", COMPACT)
@pytest.mark.parametrize(
    "kind", [adamw, lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-3), lambda m: SignDescent(m.parameters())]
)
def test_formats_follow_fp32(kind, optimizer_state_format):
    found = {}
    for name in ("fp32", optimizer_state_format):
        model = network(torch.bfloat16)
        optimizer = tiled(model, kind(model), 64, optimizer_state_format=name)
        start = torch.cat([p.detach().float().flatten() for p in model.parameters()])
        for step in range(20):
            set_gradients(model, step % 3)
            optimizer.step()
        found[name] = torch.cat([p.detach().float().flatten() for p in model.parameters()]) - start
    error = (found[optimizer_state_format] - found["fp32"]).norm() / found["fp32"].norm()
    assert error < (0.02 if optimizer_state_format == "split" else 0.2), error


@pytest.mark.parametrize("optimizer_state_format", COMPACT)
def test_tiles_change_no_bit_of_any_format(optimizer_state_format):
    results = []
    for tile_size in (64, 192, None):
        model = network(torch.bfloat16)
        optimizer = tiled(model, adamw(model), tile_size, optimizer_state_format=optimizer_state_format)
        for step in range(5):
            set_gradients(model, step)
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("optimizer_state_format", "most"), [("fp32", 16), ("split", 14), ("int8", 8.5), ("stochastic", 8)]
)
def test_bytes_per_parameter(optimizer_state_format, most):
    elements = 1 << 20
    model = nn.Linear(1 << 10, 1 << 10, bias=False).bfloat16()
    optimizer = tiled(model, adamw(model), None, optimizer_state_format=optimizer_state_format)
    set_gradients(model, 0)
    optimizer.step()
    gc.collect()
    held = {}
    for shard in optimizer.shards:
        for tensor in every_tensor([shard.buffer.__dict__, shard.gradients.__dict__, shard.states.__dict__]):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    assert most - 0.5 < sum(held.values()) / elements <= most + 1e-3


def every_tensor(value, seen=None):
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
        return
    parts = (
        value.items()
        if isinstance(value, dict)
        else [(None, v) for v in value]
        if isinstance(value, (list, tuple))
        else []
    )
    if not parts and hasattr(value, "__dict__") and type(value).__module__.startswith("lightning_tex.optim"):
        parts = vars(value).items()
    for _, part in parts:
        yield from every_tensor(part, seen)


# --- temporaries


def test_allocations_are_counted_as_long_as_they_live():
    x = torch.randn(1000)

    def peak(run):
        allocations = Allocations()
        with allocations:
            run()
        assert allocations.bytes == 0
        return allocations.peak_bytes / 4000

    assert peak(lambda: x.exp()) == 1
    assert peak(lambda: x.exp().mul(2)) == 2
    assert peak(lambda: (x + 1) * (x + 2)) == 3
    assert peak(lambda: x.mul_(1)) == 0
    assert peak(lambda: [x + i for i in range(5)]) == 5
    assert peak(lambda: [float((x + i).sum()) for i in range(5)]) < 1.01


TEMPORARIES = {
    "fused AdamW": (lambda p: torch.optim.AdamW(p), 0),
    "AdamW in a loop": (lambda p: torch.optim.AdamW(p, fused=False, foreach=False), 2),
    "foreach AdamW": (lambda p: torch.optim.AdamW(p, foreach=True), 1),
    "SGD": (lambda p: torch.optim.SGD(p, momentum=0.9), 0),
    "Adadelta": (lambda p: torch.optim.Adadelta(p), 2),
}


@pytest.mark.parametrize("name", TEMPORARIES)
def test_a_tile_is_the_budget_over_the_measured_temporaries(name):
    make, tensors = TEMPORARIES[name]
    for dtype, ours in ((torch.float32, 0), (torch.bfloat16, 4)):
        model = network(dtype)
        users = make(model.parameters())
        optimizer = tiled(model, users, None)
        states = optimizer.shards[0].states
        plain = partial(PlainStates, master=dtype != torch.float32)
        needed = temporary_bytes(users, users.param_groups[0], torch.empty(0, dtype=dtype), plain)
        assert needed == 4 * tensors + ours
        assert states.tile_size == most_elements(needed, "cpu")
        assert states.tile_size * needed <= BUDGET_BYTES["cpu"]


@pytest.mark.parametrize("optimizer_state_format", ["fp32", *COMPACT])
def test_a_step_takes_no_more_however_many_elements(optimizer_state_format):
    peaks = []
    for width in (64, 256, 1024):
        model = nn.Linear(width, 256, bias=False).bfloat16()
        optimizer = tiled(model, adamw(model), 1 << 13, optimizer_state_format=optimizer_state_format)
        set_gradients(model, 0)
        optimizer.step()
        allocations = Allocations()
        with allocations:
            optimizer.step()
        peaks.append(allocations.peak_bytes)
    assert peaks[0] > 0 and max(peaks) < 1.01 * peaks[0] + 4096


@pytest.mark.parametrize("optimizer_state_format", ["fp32", *COMPACT])
def test_a_step_keeps_to_the_budget_torchs_own_temporaries_included(optimizer_state_format):
    model = nn.Linear(1 << 10, 3000, bias=False).bfloat16()
    optimizer = tiled(model, adamw(model), None, optimizer_state_format=optimizer_state_format)
    optimizer.step()
    assert len(optimizer.shards[0].states.spans) > 1
    assert 0.9 * BUDGET_BYTES["cpu"] < peak_bytes(optimizer.step, torch.device("cpu")) <= BUDGET_BYTES["cpu"]


class CountsSigns(torch.optim.SGD):
    """SGD that keeps how often each element's gradient was positive, as a whole number."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                count = self.state[p].setdefault("count", torch.zeros_like(p, dtype=torch.int32))
                count += p.grad > 0
        return super().step(closure)


@pytest.mark.parametrize("optimizer_state_format", COMPACT)
def test_a_state_of_whole_numbers_is_refused_by_name(optimizer_state_format):
    model = network(torch.bfloat16)
    said = rf"CountsSigns keeps 'count' \(torch.int32\) .*'{optimizer_state_format}' .*legal: 'fp32'"
    with pytest.raises(ValueError, match=said):
        tiled(model, CountsSigns(model.parameters(), lr=0.1), None, optimizer_state_format=optimizer_state_format)


def test_a_state_of_whole_numbers_stays_one_in_fp32():
    model = network(torch.bfloat16)
    optimizer = tiled(model, CountsSigns(model.parameters(), lr=0.1), 64, optimizer_state_format="fp32")
    for _ in range(3):
        optimizer.zero_grad()
        for p in model.parameters():
            p.grad.fill_(1.0)
        optimizer.step()
    counts = [window.state["count"] for shard in optimizer.shards for window in shard.states.windows]
    assert {count.dtype for count in counts} == {torch.int32} and max(int(count.max()) for count in counts) == 3
