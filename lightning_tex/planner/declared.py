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
        model, at = job.model, Activations(MicroStep(job, candidate))
        embedding, head = (
            next(layer for layer in model.outside_blocks if isinstance(layer, kind)) for kind in (Embedding, Head)
        )
        assert isinstance(embedding, Embedding) and isinstance(head, Head)
        costs, kinds = [_BlockCosts.of(at, layers) for layers in model.blocks.kinds], model.blocks.order
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
                # The experts' last matrix is the block's last parameter.
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
        first_gradients: the same when its experts' first gradient is given to its buffer; 0 without experts.
    """

    kept: int
    stash: int
    backward: int
    first_gradients: int

    @classmethod
    def of(cls, at: Activations, layers: tuple[Layer, ...]) -> _BlockCosts:
        again, stream = _recomputed(at, layers), at.stream(width(layers))
        flows = [_mlp_flow(at, layer) for layer in layers if isinstance(layer, Mlp)]
        experts = [layer for layer in layers if isinstance(layer, Moe)]
        flows += [_moe_flow(at, layer) for layer in experts]
        first = [_expert_matrix(at, layer) - _given_back(at, layer) for layer in experts]
        first_gradients = again + stream + max(first) if first else 0
        return cls(at.kept(layers), at.stash(layers), again + stream + max(flows), first_gradients)


def _recomputed(at: Activations, layers: tuple[Layer, ...]) -> int:
    """What a recomputation makes anew: the block's activations, but its input and what is on the tape."""
    mode = at.step.candidate.activation_checkpointing
    if mode is None:
        return 0
    made = at.block(layers) - at.stream(width(layers))
    if mode == "communication_aware":
        made -= sum(at.arrived(layer) + at.home(layer) for layer in layers if isinstance(layer, Moe))
    return made


def _mlp_flow(at: Activations, layer: Mlp) -> int:
    """The gradients of what goes into the last product, and of its matrix."""
    hidden = layer.hidden // at.step.layout.tensor
    return (at.step.tokens + layer.dim) * hidden * at.step.element_bytes


def _moe_flow(at: Activations, layer: Moe) -> int:
    """Of the instants of a MoE layer's backward the one that takes most.

    The weighted sum: gradients of rows and weights in the weights' precision. The way to the experts: gradients at
    home, picked, the own part of them, and at the experts. The last product: gradients of its result, its input and its
    matrix, when what came home is given back (unless it is on a tape). The end of a recomputed forward.
    """
    step, arrived, home, given_back = at.step, at.arrived(layer), at.home(layer), _given_back(at, layer)
    instants = [
        2 * home // step.element_bytes * step.score_bytes,
        2 * home + arrived + (arrived // step.gather if step.gather > 1 else 0) - given_back,
        arrived + _expert_matrix(at, layer) + at.hidden(layer) - given_back,
    ]
    if step.candidate.activation_checkpointing == "full":
        instants += [3 * arrived, _brought_back(at, layer)]
    return max(instants)


def _brought_back(at: Activations, layer: Moe) -> int:
    """What the way back from the experts makes, beside its result.

    What the experts gave; that by sender; the own part of it; and with the row of zeros that overflowed choices pick
    the own part, or the whole buffer, which takes as much once more while it is gathered.
    """
    step, arrived = at.step, at.arrived(layer)
    own = arrived // step.gather
    moved = arrived + own if step.gather * step.layout.expert > 1 else 0
    return arrived + moved + (2 * own * step.split if step.static(layer) and step.split > 1 else own)


def _expert_matrix(at: Activations, layer: Moe) -> int:
    experts, hidden = layer.num_experts // at.step.layout.expert, layer.hidden // at.step.layout.expert_tensor
    return experts * hidden * layer.dim * at.step.element_bytes


def _given_back(at: Activations, layer: Moe) -> int:
    return 0 if at.step.candidate.activation_checkpointing == "communication_aware" else at.home(layer)
