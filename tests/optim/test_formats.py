"""State formats: what they keep, how exactly, in how many bytes."""

import copy
import gc

import pytest
import torch
from helpers.optimizer_alone import COMPACT, SignDescent, adamw, network, set_gradients, tiled
from torch import nn

from lightning_tex.optim.compact import SplitMaster
from lightning_tex.optim.moments import BLOCK
from lightning_tex.optim.walk import Walk


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
        with states.window(i, Walk()) as window:
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
            p.grad = torch.ones_like(p)
        optimizer.step()
    counts = [window.state["count"] for shard in optimizer.shards for window in shard.states.windows]
    assert {count.dtype for count in counts} == {torch.int32} and max(int(count.max()) for count in counts) == 3
