"""The sharded, tiled optimizer on four ranks against a plain optimizer on the whole model in one process.

Gradients are made by hand: the ranks along a parameter's replica axis hold different ones, others the same.
"""

import torch
import torch.distributed as dist
from helpers.cases import case
from helpers.optimizer_on_ranks import KINDS, LAYOUTS, Pair, SixteenBits

from lightning_tex.parallel.collectives import all_reduce
from lightning_tex.testing.ranks import run_ranks


def steps():
    for layout in LAYOUTS:
        for number, kind in enumerate(KINDS):
            with case(layout, kind=number):
                pair = Pair(layout, kind)
                pair.take_steps()
                pair.compare()


def test_steps_on_every_layout_are_those_of_one_process():
    run_ranks(4, steps)


def norms_and_clipping():
    norms = []
    for layout in LAYOUTS:
        with case(layout):
            pair = Pair(layout, lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
            pair.set_gradients(0)
            norm = pair.optimizer.gradient_norm()
            gradients = [p.grad.flatten() for p in pair.whole.parameters()]
            torch.testing.assert_close(norm, torch.cat(gradients).norm(), rtol=1e-12, atol=0)
            norms.append(norm.item())

            pair.optimizer.clip_by_norm(1.0)
            torch.nn.utils.clip_grad_norm_(pair.whole.parameters(), 1.0)
            pair.optimizer.step()
            pair.plain.step()
            pair.compare()

            pair.set_gradients(1)
            pair.optimizer.clip_by_value(0.3)
            torch.nn.utils.clip_grad_value_(pair.whole.parameters(), 0.3)
            pair.optimizer.step()
            pair.plain.step()
            pair.compare()
    return norms


def test_the_norm_counts_every_parameter_once_and_clipping_is_the_plain_one():
    results = run_ranks(4, norms_and_clipping)
    assert all(norms == results[0] for norms in results)


def whole_gradients():
    for layout in LAYOUTS:
        with case(layout):
            pair = Pair(layout, lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
            pair.set_gradients(0)
            pair.optimizer.reduce_gradients(whole=True)
            pair.optimizer.reduce_gradients(whole=True)  # a second call must change nothing
            for (name, p), q in zip(pair.parted.named_parameters(), pair.whole.parameters(), strict=True):
                torch.testing.assert_close(pair.shardings[name].gather(p.grad), q.grad, rtol=1e-12, atol=1e-12)
            pair.optimizer.step()
            pair.plain.step()
            pair.compare()


def test_whole_gradients_can_be_looked_at_before_the_step():
    run_ranks(4, whole_gradients)


def low_precision():
    for layout in LAYOUTS[:3]:
        with case(layout):
            pair = SixteenBits(layout, lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2))
            for step in range(2):
                pair.set_gradients(step)
                pair.optimizer.step()
                pair.plain.step()
                pair.compare()


def test_bf16_parameters_follow_their_fp32_masters():
    run_ranks(4, low_precision)


def loading():
    for dtype in (torch.float64, torch.bfloat16):
        with case(dtype):
            pair = Pair((2, 2, 2), lambda m: torch.optim.SGD(m.parameters(), lr=0.5), dtype)
            pair.set_gradients(0)
            pair.optimizer.step()
            loaded = pair.load(7)
            pair.optimizer.zero_grad()
            pair.optimizer.step()  # gradient zero
            for name, p in pair.parted.named_parameters():
                assert torch.equal(p, loaded[name]), name


def test_weights_loaded_between_steps_are_taken_up():
    run_ranks(4, loading)


def states_are_sharded():
    elements = []
    for layout in LAYOUTS:
        with case(layout):
            pair = Pair(layout, lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2), tile_size=128)
            pair.set_gradients(0)
            pair.optimizer.step()
            covered = {name: torch.zeros(at.box.stored).flatten() for name, at in pair.shardings.items()}
            for piece in pair.optimizer.pieces():
                covered[piece.sharding.name][piece.stored.slices] += 1
                state = piece.shard.states.saved_states(piece.window)
                span = piece.shard.states.spans[piece.window]
                assert state["exp_avg"].read().shape == (span.stop - span.start,)
            for name, at in pair.shardings.items():
                assert torch.equal(all_reduce(covered[name], at.replicas), torch.ones_like(covered[name])), name
            held = sum(len(shard.states.own) for shard in pair.optimizer.shards)
            stored = sum(p.numel() / pair.shardings[n].replicas.size for n, p in pair.parted.named_parameters())
            elements.append((held, stored))
    return elements


def test_each_state_element_lives_on_exactly_one_replica():
    for elements in run_ranks(4, states_are_sharded):
        for held, stored in elements:
            # Parameters and shards are padded to 64 elements each; the model has 13 parameters in 2 buffers.
            assert stored <= held <= stored + 64 * (13 + 2)


def order_of_ranks():
    pair = Pair((2, 2, 2), KINDS[0])
    return dist.get_rank(), [shard.buffer.replicas.name for shard in pair.optimizer.shards]


def test_buffers_stand_in_one_order_on_all_ranks():
    orders = [order for _, order in run_ranks(4, order_of_ranks)]
    assert all(order == orders[0] and set(order) == {"data", "expert_data"} for order in orders)
