"""Muon of matrices and of stacks of them, and with AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from lightning_tex.optim.closure import loss_of


class Muon(torch.optim.Muon):
    """``torch.optim.Muon``, of stacks of matrices as well, such as those of experts: [.., n, m].

    Each matrix of a stack is orthogonalized alone, with the options and the arithmetic of torch's own. Source: Muon,
    https://kellerjordan.github.io/posts/muon.

    Args:
        params: parameters of two dims or more, or groups of them.
        lr: learning rate; with ``adjust_lr_fn="match_rms_adamw"`` one that suits AdamW.
        options: further ones of ``torch.optim.Muon``.

    Raises:
        ValueError: a parameter of fewer than two dims, or an option that torch refuses.
    """

    def __init__(self, params: ParamsT, lr: float = 1e-3, **options: Any) -> None:
        # torch's constructor refuses stacks, after it has looked at the options.
        defaults = torch.optim.Muon([nn.Parameter(torch.zeros(1, 1))], lr=lr, **options).defaults
        super(torch.optim.Muon, self).__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, of matrices and stacks.

        Raises:
            ValueError: a parameter of fewer than two dims.
        """
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dim() < 2:
                self.param_groups.pop()
                raise ValueError(
                    f"Muon is for matrices and stacks of them, and a parameter has shape {tuple(parameter.shape)}; "
                    "legal: other parameters in AdamW (lightning_tex.optim.CombinedOptimizer makes one of two)"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every matrix."""
        loss = loss_of(closure)
        own_groups, own_state = self.param_groups, self.state
        matrices: dict[Tensor, dict[str, Tensor]] = {}
        groups = []
        for group in own_groups:
            parted = dict(self._matrices(group["params"], own_state))
            matrices.update(parted)
            groups.append({**group, "params": list(parted)})
        self.param_groups, self.state = groups, matrices  # type: ignore[assignment]
        try:
            _torchs_step(self)
        finally:
            self.param_groups, self.state = own_groups, own_state
        return loss

    @staticmethod
    def _matrices(parameters: Iterable[Tensor], state: Any) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """The matrices of parameters that have a gradient, as views, each with its state."""
        for parameter in parameters:
            if parameter.grad is None:
                continue
            own = state[parameter]
            if "momentum_buffer" not in own:
                own["momentum_buffer"] = torch.zeros_like(parameter.grad)
            views = [_stacked(x) for x in (parameter.detach(), parameter.grad, own["momentum_buffer"])]
            for values, gradient, momentum in zip(*views, strict=True):
                matrix = nn.Parameter(values, requires_grad=False)
                matrix.grad = gradient
                yield matrix, {"momentum_buffer": momentum}


def _stacked(x: Tensor) -> Tensor:
    return x.view(-1, *x.shape[-2:])


def _torchs_step(optimizer: Muon) -> None:
    """torch's own step, without the hooks of a whole step that it is wrapped in."""
    step = torch.optim.Muon.step
    getattr(step, "__wrapped__", step)(optimizer)
