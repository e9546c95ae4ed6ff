"""Recompute activations in the backward; replay communication instead of repeating it, and decide nothing twice.

Communication-aware checkpointing (paper section 5.2): a tape records what each collective of a block gave in the first
forward and gives it again in the recomputation, so that two of three passes communicate instead of three of three. What
a block decides by values, such as the routing, is on its tape in every mode: it is never decided twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, get_args
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_tex.parallel.errors import UserRuntimeError, UserValueError
from lightning_tex.parallel.replay import Tape, outside_replay, running_tapes
from lightning_tex.parallel.sharding import TexModule

# Values of the strategy's option of this name.
Recomputation = Literal["full", "communication_aware"]
ActivationCheckpointing = Recomputation | None
ACTIVATION_CHECKPOINTING: tuple[ActivationCheckpointing, ...] = (None, *get_args(Recomputation))


@contextmanager
def first_forward_only() -> Iterator[None]:
    """What is done inside is done in the first forward only: what it saves is kept, its collectives are on no tape."""
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with outside_replay(), hooks:
        yield


class BlockTape(Tape):
    """What was decided in one forward of one block, and what its collectives gave, in order.

    Args:
        replay: give recorded results in the recomputation. False is full recomputation, which communicates again.
    """

    def __init__(self, replay: bool) -> None:
        self.replay = replay
        self._entries: list[tuple[str, Tensor, int]] = []
        self._decisions: list[tuple[str, Any]] = []
        self._cursor = self._decision = 0

    @property
    def stash(self) -> list[Tensor]:
        """The recorded results."""
        return [tensor for _, tensor, _ in self._entries]

    @property
    def stash_bytes(self) -> int:
        """Bytes of the recorded results."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.stash)

    def keep(self, name: str, decision: Any) -> None:
        self._decisions.append((name, decision))

    def kept(self, name: str) -> Any:
        self._decision += 1
        known, decision = self._decisions[self._decision - 1] if self._decision <= len(self._decisions) else ("", None)
        if known != name:
            first = f"the first forward decided on {known}" if known else "the first forward decided on nothing more"
            raise UserRuntimeError(f"recomputation decides on {name} where {first}: {self._must}; use None for it")
        return decision

    def record(self, key: str, result: Tensor) -> None:
        if self.replay:
            # Detached: a result that knows its graph would keep it alive when no backward follows.
            result = result.detach()
            self._entries.append((key, result, result._version))

    def next(self, key: str) -> Tensor:
        if self._cursor >= len(self._entries):
            raise UserRuntimeError(f"recomputation asks for {key}, which the first forward did not do: {self._advice}")
        recorded, result, version = self._entries[self._cursor]
        self._cursor += 1
        if recorded != key:
            raise UserRuntimeError(
                f"recomputation asks for {key} where the first forward did {recorded}: {self._advice}"
            )
        if result._version != version:
            raise UserRuntimeError(f"the result of {key} was changed in place after the first forward: {self._advice}")
        return result.detach()

    _must = "a block under activation_checkpointing must do the same in both passes"
    _advice = (
        "a block under activation_checkpointing='communication_aware' must do the same in both passes; "
        "use activation_checkpointing='full' or None for it"
    )

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For the first forward and for the recomputation; the second may be entered again (retain_graph)."""
        return _Entered(self, replaying=False), _Entered(self, replaying=True)


class _Entered(AbstractContextManager[None]):
    def __init__(self, tape: BlockTape, replaying: bool) -> None:
        self.tape, self.replaying = tape, replaying

    def __enter__(self) -> None:
        self.tape.recomputing = self.replaying
        self.tape.replaying = self.replaying and self.tape.replay
        self.tape._cursor = self.tape._decision = 0
        self._token = running_tapes.set((*running_tapes.get(), self.tape))

    def __exit__(self, *_: object) -> None:
        # Early stop leaves by an exception with records unread: what follows the last saved tensor is not needed.
        running_tapes.reset(self._token)
        self.tape.recomputing = self.tape.replaying = False


class Recomputed:
    """A module's forward whose activations are recomputed in the backward (non-reentrant, random state kept)."""

    def __init__(self, forward: Callable[..., Any], mode: ActivationCheckpointing) -> None:
        self.forward, self.mode = forward, mode
        self.stash_bytes = 0
        self.tapes: WeakSet[BlockTape] = WeakSet()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        tape = BlockTape(replay=self.mode == "communication_aware")

        def forward(*values: Any) -> Any:
            named = dict(zip(kwargs, values[len(args) :], strict=True))
            return self.forward(*values[: len(args)], **named)

        # By place: torch keeps the random state of those GPUs only that these arguments lie on.
        result = checkpoint(forward, *args, *kwargs.values(), use_reentrant=False, context_fn=tape.contexts)
        self.stash_bytes = tape.stash_bytes
        self.tapes.add(tape)
        return result


def require_legal(mode: ActivationCheckpointing, policy: set[type[nn.Module]] | None) -> None:
    """Refuse options of :func:`recompute_blocks` that are not legal, or have no effect.

    Raises:
        ValueError: naming the option and what is legal.
    """
    if mode not in ACTIVATION_CHECKPOINTING:
        legal = ", ".join(map(repr, ACTIVATION_CHECKPOINTING))
        raise UserValueError(f"activation_checkpointing={mode!r}; legal: {legal}")
    if mode is None and policy is not None:
        legal = ", ".join(repr(mode) for mode in ACTIVATION_CHECKPOINTING if mode is not None)
        raise UserValueError(
            f"activation_checkpointing_policy has no effect with activation_checkpointing=None; legal with it: {legal}"
        )


def recompute_blocks(
    root: nn.Module, mode: ActivationCheckpointing, policy: set[type[nn.Module]] | None = None
) -> list[str]:
    """Recompute the blocks of a model in every backward. Idempotent; ``None`` takes it back.

    Args:
        root: the model.
        mode: ``"full"`` repeats the blocks' collectives, ``"communication_aware"`` replays them.
        policy: classes of the blocks; ``None``: elements of ``nn.ModuleList`` that hold TEX layers.

    Returns:
        the names of the blocks.

    Raises:
        ValueError: no module is of these classes.
    """
    for module in root.modules():
        if isinstance(module.__dict__.get("forward"), Recomputed):
            del module.forward
    if mode is None:
        return []
    blocks = dict(checkpointed_blocks(root, policy))
    if not blocks:
        wanted = "elements of nn.ModuleLists that hold TEX layers" if policy is None else [c.__name__ for c in policy]
        raise UserValueError(
            f"activation_checkpointing={mode!r} finds nothing to recompute in {type(root).__name__}: looked for "
            f"{wanted}; name your block's classes in activation_checkpointing_policy"
        )
    for block in blocks.values():
        block.forward = Recomputed(block.forward, mode)
    return list(blocks)


def checkpointed_blocks(root: nn.Module, policy: set[type[nn.Module]] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """The blocks that :func:`recompute_blocks` recomputes, with their names."""
    if policy is not None:
        for name, module in root.named_modules():
            if type(module) in policy:
                yield name, module
        return
    for name, module in root.named_modules():
        if isinstance(module, nn.ModuleList):
            for child, block in module.named_children():
                if any(isinstance(part, TexModule) for part in block.modules()):
                    yield f"{name}.{child}", block


def stash_bytes(root: nn.Module) -> dict[str, int]:
    """Bytes that the tape of each recomputed block kept in its last forward, by block name."""
    return {name: forward.stash_bytes for name, forward in _recomputed(root)}


def stash(root: nn.Module) -> Iterator[Tensor]:
    """What the tapes hold whose backward is still to come, or has not let go of them yet."""
    for _, forward in _recomputed(root):
        for tape in forward.tapes:
            yield from tape.stash


def _recomputed(root: nn.Module) -> Iterator[tuple[str, Recomputed]]:
    for name, module in root.named_modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, Recomputed):
            yield name, forward
