"""Activations of a decoder by declared formulas: the instants of its forward and backward that may be fullest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from lightning_tex.planner.activations import Activations, width
from lightning_tex.planner.instants import Instant
from lightning_tex.planner.layers import Attention, Embedding, Head, Layer, LinearCrossEntropy, Mlp, Moe
from lightning_tex.planner.layouts import ActivationSource, Candidate, Job
from lightning_tex.planner.micro_step import MicroStep


class DeclaredFormulas(ActivationSource):
    """What each layer's code is known to keep, for a decoder whose blocks are this package's."""

    name = "declared formulas"

    def instants(self, job: Job, candidate: Candidate, device: str) -> Iterator[Instant]:
        model, at = job.model, Activations(MicroStep(job, candidate), device)
        embedding, head = (
            next(layer for layer in model.outside_blocks if isinstance(layer, kind)) for kind in (Embedding, Head)
        )
        assert isinstance(embedding, Embedding) and isinstance(head, Head)
        costs, kinds = [_BlockCosts.of(at, layers, device) for layers in model.blocks.kinds], model.blocks.order
        attention = next(layer for layer in model.blocks.kinds[0] if isinstance(layer, Attention))
        kept = list(accumulate((costs[kind].kept for kind in kinds), initial=at.rotary(attention)))[1:]
        stash = list(accumulate(costs[kind].stash for kind in kinds))
        forward = kept[-1] + at.block(model.outside_blocks)
        if LinearCrossEntropy() in model.outside_blocks:
            yield Instant("loss", forward, stash[-1], at.linear_loss(head, device))
            yield Instant("head", forward, stash[-1], at.linear_loss_backward(head, device))
        else:
            yield Instant("logits", forward, stash[-1], at.logits(head))
            yield Instant("head", forward, stash[-1], at.head_backward(head))
        # Of a shared matrix, the head's gradient waits for the embedding's.
        tied = at.vocabulary(head) if model.tied else 0
        # An earlier block of the same kind holds less, unless gradients gather on the way to it.
        last_of_kind = {kind: block for block, kind in enumerate(kinds)}
        blocks = range(len(kinds)) if candidate.zero_stage == 2 else sorted(last_of_kind.values())
        for block in reversed(blocks):
            cost, after = costs[kinds[block]], model.first_after_block[block]
            yield Instant(f"block {block}", kept[block], stash[block], tied + cost.backward, reached=after)
            if cost.first_gradients:
                # All gradients of experts come at once. Their last matrix is the block's last parameter.
                first = tied + cost.first_gradients
                yield Instant(f"experts of block {block}", kept[block], stash[block], first, reached=after - 1)
        yield Instant("embedding", working=tied + at.embedding_backward(embedding), reached=0)


@dataclass(frozen=True)
class _BlockCosts:
    """Bytes of one block.

    Args:
        kept: between its forward and its backward, without the stash.
        stash: likewise, of its collectives' results.
        backward: the most that its backward takes beside what forwards kept: a bound over its instants.
        first_gradients: the same when its experts' gradients are given to their buffers; 0 without experts.
    """

    kept: int
    stash: int
    backward: int
    first_gradients: int

    @classmethod
    def of(cls, at: Activations, layers: tuple[Layer, ...], device: str) -> _BlockCosts:
        again, stream = _recomputed(at, layers), at.stream(width(layers))
        flows = [_mlp_flow(at, layer) for layer in layers if isinstance(layer, Mlp)]
        experts = [layer for layer in layers if isinstance(layer, Moe)]
        flows += [_moe_flow(at, layer, device) for layer in experts]
        first = [_first_gradients(at, layer, device) for layer in experts]
        first_gradients = again + stream + max(first) if first else 0
        return cls(at.kept(layers), at.stash(layers), again + stream + max(flows), first_gradients)


def _recomputed(at: Activations, layers: tuple[Layer, ...]) -> int:
    """What a recomputation makes anew: the block's activations, but its input and what is on the tape."""
    mode = at.step.candidate.activation_checkpointing
    if mode is None:
        return 0
    made = at.block(layers) - at.stream(width(layers))
    made -= sum(at.routing_losses(layer) + at.decisions(layer) for layer in layers)
    if mode == "communication_aware":
        moved = [layer for layer in layers if isinstance(layer, Moe) and at.step.moved(layer)]
        made -= sum(at.row_weights(layer) + at.arrived(layer) for layer in moved)
    return made


def _mlp_flow(at: Activations, layer: Mlp) -> int:
    """The gradients of what goes into the last product, and of its matrix."""
    hidden = layer.hidden // at.step.layout.tensor
    return (at.step.tokens + layer.dim) * hidden * at.step.element_bytes


def _moe_flow(at: Activations, layer: Moe, device: str) -> int:
    """Of the instants of a MoE layer's backward the one that takes most.

    Gradients of the rows on their way to the experts. What is between the experts' products and the gradients of all of
    it, beside the gradients of rows; then the gradient of the last matrix in place of what was made on the way. All
    matrices' gradients and, of the first products, theirs, beside what becomes the input's. The way back.
    """
    step, arrived, hidden, matrices = at.step, at.arrived(layer), at.hidden(layer), _matrices(at, layer)
    if device == "cpu" and not step.moved(layer):
        return _by_expert(at, layer)
    if step.chunks > 1:
        return _chunked(at, layer, device)
    there = _rows_to_experts(at, layer)
    products, made = (2, 6) if layer.gated else (1, 4)
    # A sum of two grouped products is made of both.
    summed = arrived * (1 + (layer.gated and device == "cuda"))
    picked = 0 if step.moved(layer) else arrived
    return max(
        there,
        arrived + made * hidden,
        arrived + (products + 2) * hidden + matrices // (products + 1),
        max(summed, picked) + products * hidden + matrices,
        there + at.home(layer) - at.given_back(layer),
    )


def _rows_to_experts(at: Activations, layer: Moe) -> int:
    """Rows on their way to the experts: a rank's own ones, what has come of others, and what is made of both there."""
    step, arrived = at.step, at.arrived(layer)
    own = arrived // step.gather
    return own * (1 + (step.layout.expert > 1)) + arrived * ((step.gather > 1) + _regrouped(at, layer))


def _first_gradients(at: Activations, layer: Moe, device: str) -> int:
    """When a MoE layer's matrices are given their gradients: those of the rows are there, too, where rows travel."""
    rows = _rows_to_experts(at, layer) if at.step.moved(layer) and at.step.chunks == 1 else 0
    return _matrices(at, layer) + rows + at.home(layer) - at.given_back(layer)


def _chunked(at: Activations, layer: Moe, device: str) -> int:
    """The same where rows come in chunks: of the last one, when the matrices' gradients of others are there.

    Beside it the chunk before is on its way home, what came home of those before that has been summed, and of more than
    two the next one is on its way.
    """
    step, matrices = at.step, _matrices(at, layer)
    largest = max(step.sent_rows(layer)) / sum(step.sent_rows(layer))
    arrived, hidden = at.arrived(layer) * largest, at.hidden(layer) * largest
    own = arrived / step.gather
    home = own + own * (step.gather > 1) + arrived * _regrouped(at, layer)
    beside = home + at.home(layer) * (1 - largest) + (2 * own if step.chunks > 2 else 0)
    products, made = (2, 6) if layer.gated else (1, 4)
    # A product is added to what is there when all of it is, but on a CPU one expert's after the other.
    apart = matrices / (products + 1) if device == "cuda" else 0
    summed = arrived * (1 + (layer.gated and device == "cuda"))
    return int(
        matrices
        + beside
        + max(arrived + made * hidden, arrived + (products + 2) * hidden + apart, summed + products * hidden + apart)
    )


def _by_expert(at: Activations, layer: Moe) -> int:
    """The same where rows are picked and summed one expert after the other."""
    step = at.step
    total = step.tokens * layer.dim * step.score_bytes
    hidden, rows = at.hidden(layer) // layer.num_experts, at.arrived(layer) // layer.num_experts
    summed = rows // step.element_bytes * step.score_bytes if step.element_bytes < step.score_bytes else 0
    return _matrices(at, layer) + total + max(2 * rows + (6 if layer.gated else 4) * hidden, 3 * rows + summed)


def _regrouped(at: Activations, layer: Moe) -> bool:
    """Whether rows lie otherwise at the experts than they arrive."""
    senders, here = at.step.layout.expert * at.step.gather, layer.num_experts // at.step.layout.expert
    return senders > 1 and here > 1


def _matrices(at: Activations, layer: Moe) -> int:
    """Gradients of the experts' matrices held here."""
    experts, hidden = layer.num_experts // at.step.layout.expert, layer.hidden // at.step.layout.expert_tensor
    return (3 if layer.gated else 2) * experts * hidden * layer.dim * at.step.element_bytes
