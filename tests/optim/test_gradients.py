"""ZeRO stages 0, 1 and 2 on four ranks against a plain optimizer on the whole model in one process."""

import pytest
import torch
from helpers.backwards import announced_backward
from helpers.cases import case, in_full
from helpers.optimizer_on_ranks import KINDS, LAYOUTS, Pair, made
from helpers.ranks import together
from torch import nn

from lightning_tex.optim.gradients import FullGradients
from lightning_tex.optim.sharded_gradients import ShardedGradients
from lightning_tex.testing.ranks import run_ranks

SGD = KINDS[1]


def backward(pair, step, micro):
    """A backward whose gradients are those of ``Pair``: of a loss linear in the parameters."""
    loss = 0
    for name, p in pair.parted.named_parameters():
        at = pair.shardings[name]
        loss = loss + (p * at.box.shard(made(name, at.replicas.rank, 10 * step + micro, at.box.full)).to(p.dtype)).sum()
    announced_backward(pair.optimizer, loss, undisturbed=True)


def plain_gradients(pair, step, micros):
    for name, p in pair.whole.named_parameters():
        at = pair.shardings[name]
        total = sum(
            made(name, replica, 10 * step + micro, at.box.full)
            for replica in range(at.replicas.size)
            for micro in range(micros)
        )
        p.grad = (total / pair.topology.data.size).to(p.dtype)


def accumulating_steps(stage):
    for layout in LAYOUTS:
        for number, kind in enumerate(KINDS):
            with case(layout, kind=number):
                pair = Pair(layout, kind, zero_stage=stage)
                for step in range(3):
                    pair.optimizer.zero_grad()
                    for micro in range(2):
                        backward(pair, step, micro)
                    plain_gradients(pair, step, 2)
                    if step:
                        norm = pair.optimizer.clip_by_norm(1.0)
                        expected = nn.utils.clip_grad_norm_(pair.whole.parameters(), 1.0)
                        torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
                    if step == 2:
                        pair.optimizer.clip_by_value(0.01)
                        nn.utils.clip_grad_value_(pair.whole.parameters(), 0.01)
                    pair.optimizer.step()
                    pair.plain.step()
                pair.compare()


@pytest.mark.parametrize("stage", in_full([0, 1, 2], [2]))
def test_every_stage_steps_as_one_process_does(stage):
    run_ranks(4, accumulating_steps, stage)


def whole_gradients(stage):
    for layout in LAYOUTS[:3]:
        with case(layout):
            pair = Pair(layout, SGD, zero_stage=stage)
            pair.optimizer.zero_grad()
            backward(pair, 0, 0)
            plain_gradients(pair, 0, 1)
            pair.optimizer.reduce_gradients(whole=True)
            for (name, p), q in zip(pair.parted.named_parameters(), pair.whole.parameters(), strict=True):
                torch.testing.assert_close(pair.shardings[name].gather(p.grad), q.grad, rtol=1e-12, atol=1e-12)
                p.grad.mul_(0.5)  # as a hook might
                q.grad.mul_(0.5)
            pair.optimizer.step()
            pair.plain.step()
            pair.compare()


def test_whole_gradients_can_be_looked_at_and_changed_before_the_step():
    together(4, {stage: (whole_gradients, stage) for stage in (0, 1, 2)})


def looked_at(limit):
    """Two steps of bf16 parameters; gradients shown, which are bf16, or not."""
    steps = []
    for whole in (False, True):
        pair = Pair((1, 2, 1), SGD, torch.bfloat16, zero_stage=2)
        for step in range(2):
            pair.optimizer.zero_grad()
            for micro in range(3):
                backward(pair, step, micro)
            pair.optimizer.reduce_gradients(whole=whole)
            if limit is not None:
                pair.optimizer.clip_by_value(limit)
            pair.optimizer.step()
        steps.append([shard.states.values.clone() for shard in pair.optimizer.shards])
    return all(torch.equal(p, q) for p, q in zip(*steps, strict=True))


def test_gradients_that_are_shown_keep_their_precision_under_zero_2():
    for limit, same in together(4, {limit: (looked_at, limit) for limit in (None, 1e-2)}).items():
        assert same == [True] * 4, limit


def what_is_held(stage):
    pair = Pair((1, 2, 1), KINDS[0], torch.bfloat16, zero_stage=stage)
    pair.optimizer.zero_grad()
    backward(pair, 0, 0)
    backward(pair, 0, 1)
    kept = [p.grad is not None for p in pair.parted.parameters()]
    pair.optimizer.step()
    parameters = states = 0
    for shard in pair.optimizer.shards:
        assert type(shard.gradients) is (ShardedGradients if stage == 2 else FullGradients)
        parameters += len(shard.buffer.parameters)
        states += len(shard.states.own)
        size = 1 if stage == 0 else shard.buffer.replicas.size
        assert len(shard.states.own) * size == len(shard.buffer.parameters)
    gradients = {
        tensor.dtype: tensor.numel()
        for shard in pair.optimizer.shards
        for tensor in vars(shard.gradients).values()
        if isinstance(tensor, torch.Tensor)
    }
    return kept, gradients, states / parameters


def test_what_each_stage_keeps():
    for stage, ranks in together(4, {stage: (what_is_held, stage) for stage in (0, 1, 2)}).items():
        with case(stage=stage):
            for kept, gradients, share in ranks:
                assert set(kept) == {stage < 2}
                assert set(gradients) == {torch.float32 if stage == 2 else torch.bfloat16}, "accumulated in"
                assert share == 1 if stage == 0 else share <= 0.5


def dtypes_of_accumulation(stage):
    """Many small gradients after a large one: lost in bf16, kept in fp32."""
    pair = Pair((1, 1, 1), SGD, torch.bfloat16, zero_stage=stage)
    pair.optimizer.zero_grad()
    for micro in range(33):
        loss = sum(p.sum() for p in pair.parted.parameters()) * (1.0 if micro == 0 else 2**-9)
        announced_backward(pair.optimizer, loss, undisturbed=True)
    pair.optimizer.reduce_gradients()
    own = [(s.gradients.own, s.gradients.divisor, s) for s in pair.optimizer.shards]
    return [float(g.max()) / divisor for g, divisor, shard in own if shard.buffer.replicas.name == "data"]


def test_micro_batches_accumulate_in_the_parameters_dtype_or_under_zero_2_in_fp32():
    expected = {0: 1.0, 1: 1.0, 2: 1 + 32 * 2**-9}
    for stage, ranks in together(4, {stage: (dtypes_of_accumulation, stage) for stage in expected}).items():
        assert [max(found) for found in ranks] == [expected[stage]] * 4, stage


def raw_backward_after_a_reduced_one():
    pair = Pair((1, 1, 1), SGD, zero_stage=2)
    pair.optimizer.zero_grad()
    backward(pair, 0, 0)
    sum(p.sum() for p in pair.parted.parameters()).backward()
    with pytest.raises(RuntimeError, match=r"zero_stage=2 had reduced .*manual_backward"):
        pair.optimizer.step()


def test_a_gradient_that_would_be_lost_is_an_error():
    run_ranks(2, raw_backward_after_a_reduced_one)


def without_hooks(stage):
    pair = Pair((2, 2, 2), SGD, zero_stage=stage)
    for step in range(2):
        pair.set_gradients(step)
        pair.optimizer.step()
        pair.plain.step()
        pair.compare()
    return True


def test_gradients_set_by_hand():
    together(4, {stage: (without_hooks, stage) for stage in (0, 1)})


# --- formats on every layout


def rounded(optimizer_state_format):
    """bf16 parameters after steps on every layout, whole."""
    results = []
    for layout in LAYOUTS:
        for stage in (0, 1, 2):
            with case(layout, stage=stage):
                pair = Pair(layout, lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2), torch.bfloat16,
                            optimizer_state_format=optimizer_state_format, zero_stage=stage)  # fmt: skip
                for step in range(3):
                    pair.optimizer.zero_grad()
                    for name, p in pair.parted.named_parameters():
                        at = pair.shardings[name]
                        # Alike on all replicas, and divided by a power of two: no rounding on the way.
                        factor = at.divisor / at.replicas.size
                        p.grad = at.box.shard(made(name, 0, step, at.box.full) * factor).bfloat16()
                    pair.optimizer.step()
                results.append({n: pair.shardings[n].gather(p.detach()) for n, p in pair.parted.named_parameters()})
                pair.assert_replicas_equal()
    return results


@pytest.mark.parametrize("optimizer_state_format", in_full(["fp32", "split", "stochastic"], ["split", "stochastic"]))
def test_no_layout_changes_what_is_rounded(optimizer_state_format):
    for results in run_ranks(4, rounded, optimizer_state_format):
        for other in results[1:]:
            assert all(torch.equal(other[name], value) for name, value in results[0].items())


# --- fp16


def large_fp16_gradients(stage):
    """Gradients whose sum over three ranks is above 65504, and their average is not: whether all is as it is."""
    pair = Pair((1, 1, 1), SGD, torch.float16, zero_stage=stage, tile_size=None)
    pair.optimizer.zero_grad()
    rank = pair.topology.world.rank
    for p in pair.parted.parameters():
        gradient = torch.full_like(p, 30000.0 + 2000 * rank)
        p.grad = gradient
    average = 30000 + 1000 * (pair.topology.world.size - 1)
    pair.optimizer.reduce_gradients()
    for shard in pair.optimizer.shards:
        for entry in shard.buffer.entries:
            own = shard.gradients.own[shard.gradients._within_own(entry)].double() / shard.gradients.divisor
            torch.testing.assert_close(own, torch.full_like(own, average), rtol=1e-3, atol=0)
    norm = pair.optimizer.gradient_norm()
    numel = sum(p.numel() for p in pair.parted.parameters())
    torch.testing.assert_close(norm, torch.tensor(average * numel**0.5, dtype=torch.float64), rtol=1e-3, atol=0)
    pair.optimizer.unscale(2.0**-10)
    pair.optimizer.step()
    return all(bool(p.isfinite().all()) for p in pair.parted.parameters())


def test_fp16_gradients_are_averaged_where_their_sum_is_no_fp16_number():
    finite = together(3, {stage: (large_fp16_gradients, stage) for stage in (0, 1, 2)})
    assert finite == {stage: [True] * 3 for stage in (0, 1, 2)}


# --- what is not finite


def bad_gradient(where, guard):
    pair = Pair((2, 2, 2), SGD, max_skipped_steps=guard)
    world = pair.topology.world
    before = [p.detach().clone() for p in pair.parted.parameters()]
    skipped = []
    for step in range(3):
        pair.set_gradients(step)
        if world.rank == 2 and step < 2:
            dict(pair.parted.named_parameters())[where].grad.view(-1)[0] = [float("nan"), float("inf")][step]
        if step == 1:
            pair.optimizer.clip_by_norm(1.0)
            pair.optimizer.clip_by_value(1.0)
        try:
            pair.optimizer.step()
        except RuntimeError as error:
            return str(error)
        same = all(torch.equal(p, q) for p, q in zip(pair.parted.parameters(), before, strict=True))
        skipped.append((same, pair.optimizer.skipped.total, pair.optimizer.skipped.in_a_row))
    return skipped


def test_a_gradient_that_is_not_finite_skips_the_step_on_all_ranks():
    places = "norm.weight", "moe.experts.up", "embedding.weight"
    for where, ranks in together(4, {where: (bad_gradient, where, 3) for where in places}).items():
        assert ranks == [[(True, 1, 1), (True, 2, 2), (False, 2, 0)]] * 4, where


def test_too_many_in_a_row_are_an_error_that_names_the_parameter():
    places = "norm.weight", "moe.experts.up"
    for where, messages in together(4, {where: (bad_gradient, where, 2) for where in places}).items():
        assert len(set(messages)) == 1
        assert f"the gradient of {where} (rank " in messages[0] and "last 2 steps" in messages[0]
