"""What acts once for an optimizer step: biases that move, counts that are forgotten."""

from __future__ import annotations

from torch import nn


class ActsAfterStep:
    """Of a module that sees training forwards and acts when the optimizer's step is over."""

    def step_is_over(self, taken: bool) -> None:
        """Act on what was seen for an optimizer step, or forget it where the step was left out.

        Collective over the data axis.
        """


def step_is_over(module: nn.Module, taken: bool = True) -> None:
    """Let the routers and MoE layers of a module act after an optimizer step; collective over the data axis.

    Under ``strategy="tex_moe"`` and for :class:`lightning_tex.LanguageModel` that happens by itself.

    Args:
        module: holds the routers.
        taken: whether the step was taken. One that a GPU left out by itself, for numbers that are not finite, counts.
    """
    for each in module.modules():
        if isinstance(each, ActsAfterStep):
            each.step_is_over(taken)
