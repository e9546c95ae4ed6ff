"""What stands in the place of the user's optimizer: it goes by that one's name, and refuses what needs all states."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from types import new_class
from typing import Any, NamedTuple, NoReturn, Self

from torch.optim import Optimizer

from lightning_tex.parallel.errors import UserRuntimeError

# Python's own, of a class rather than of its instances.
_OF_EVERY_CLASS = {
    "__abstractmethods__", "__annotate_func__", "__annotations__", "__annotations_cache__", "__dict__", "__doc__",
    "__firstlineno__", "__module__", "__orig_bases__", "__parameters__", "__slots__", "__static_attributes__",
    "__weakref__", "_abc_impl",
}  # fmt: skip


class WholeStates(NamedTuple):
    """How all states of an optimizer are had in torch's own form, and taken over."""

    get: Callable[[], dict[str, Any]]
    put: Callable[[dict[str, Any]], None]


class StandIn(Optimizer):
    """The user's optimizer to schedulers, monitors and hooks, though its states are sharded over ranks.

    The class of an instance is a subclass of the user's class, too, and goes by its name, because monitors and messages
    name an optimizer by its class, and callbacks ask for it: ``TiledOptimizer(AdamW(..), ..)`` logs ``lr-AdamW`` and is
    an instance of ``AdamW``. It has nothing else of that class, whose methods would find states that are not whole.

    Args:
        optimizer: the user's, whose groups and hooks are this one's.
    """

    def __new__(cls, optimizer: Optimizer, *arguments: Any, **options: Any) -> Self:
        return object.__new__(_standing_for(type(optimizer), cls) if cls.__base__ is StandIn else cls)  # type: ignore[arg-type]

    def __init__(self, optimizer: Optimizer) -> None:
        self.inner = optimizer
        self.whole_states: WholeStates | None = None
        Optimizer.__init__(self, optimizer.param_groups, optimizer.defaults)  # not the user's, which comes before it
        self.param_groups = optimizer.param_groups
        for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            setattr(self, hooks, getattr(optimizer, hooks))

    def tell_schedulers(self) -> None:
        """A step was taken, or left out: schedulers look here, to warn about being stepped before the optimizer."""
        self.inner._opt_called = self._opt_called = True  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """In torch's own form; refused where this rank has a part of the states: a checkpoint has them all.

        Raises:
            RuntimeError: on several ranks, saying what to call.
        """
        if self.whole_states is not None:
            return self.whole_states.get()
        raise UserRuntimeError(
            "the states of this optimizer are sharded over ranks; trainer.save_checkpoint(..) saves all of them, and "
            "TexMoEStrategy(save_distributed_checkpoint=False) in torch's own form"
        )

    def load_state_dict(self, state_dict: Any) -> None:
        """Take over what :meth:`state_dict` gives; refused where that is.

        Raises:
            RuntimeError: on several ranks, saying what to call.
        """
        if self.whole_states is not None:
            self.whole_states.put(state_dict)
            return
        raise UserRuntimeError("the states of this optimizer are sharded over ranks; give the Trainer a ckpt_path")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refused: a copy would have neither the states nor the buffers that parameters are views of.

        Raises:
            RuntimeError: always, saying what to do.
        """
        raise UserRuntimeError(
            "the tiled optimizer holds this rank's part of the states and can be neither copied nor pickled; "
            "trainer.save_checkpoint(..) saves all of them"
        )


def users_own(optimizer: Optimizer) -> Optimizer:
    """The optimizer that the user made, which a scheduler of an earlier fit knows by its stand-in."""
    return optimizer.inner if isinstance(optimizer, StandIn) else optimizer


@cache
def _standing_for(users: type[Optimizer], stand_in: type[StandIn]) -> type[Any]:
    """The class of the stand-ins for instances of a class: that one's name and bases, and the stand-in's members."""
    theirs = {name for base in users.__mro__ if base not in Optimizer.__mro__ for name in vars(base)} - _OF_EVERY_CLASS
    members = {name: inspect.getattr_static(stand_in, name, _Missing(name)) for name in theirs} | {
        "__module__": stand_in.__module__,
        "__doc__": stand_in.__doc__,
        # As that of a local class: command lines that look for optimizers by name must find the user's alone.
        "__qualname__": f"{_standing_for.__name__}.<locals>.{users.__name__}",
    }
    return new_class(users.__name__, (stand_in, users), exec_body=lambda namespace: namespace.update(members))


class _Missing:
    """An attribute of the user's class that stand-ins have not."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> NoReturn:
        raise AttributeError(
            f"{owner.__name__}.{self.name}: the Trainer's optimizer holds a part of the states and has no more methods "
            "than torch.optim.Optimizer; the optimizer that configure_optimizers made is its attribute `inner`"
        )
