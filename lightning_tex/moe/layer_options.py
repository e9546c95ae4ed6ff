"""Options of the layer that contradict each other."""

from __future__ import annotations

from lightning_tex.parallel.errors import UserValueError


def require_together(
    capacity_factor: float | None,
    round_factor: float | None,
    bias: bool,
    own_experts: bool,
    shared_hidden_dim: int | None,
    residual_hidden_dim: int | None,
) -> None:
    """Refuse options that cannot be had together.

    Args:
        own_experts: whether there is an ``expert_module``; all others are the layer's.

    Raises:
        ValueError: naming them, and what is legal.
    """
    if round_factor is not None and (round_factor < 1 or capacity_factor is not None):
        raise UserValueError(
            f"round_factor={round_factor} with capacity_factor={capacity_factor}; legal: at least 1, with "
            "capacity_factor=None, or round_factor=None"
        )
    if bias and capacity_factor is not None:
        raise UserValueError(
            f"bias=True with capacity_factor={capacity_factor}: biases are added whichever choices overflow; "
            "legal: capacity_factor=None (dropless)"
        )
    if own_experts and (bias or round_factor is not None):
        raise UserValueError(
            f"expert_module with bias={bias}, round_factor={round_factor}, which are of the stacked MLPs; legal: "
            "bias=False, round_factor=None"
        )
    if shared_hidden_dim is not None and residual_hidden_dim is not None:
        raise UserValueError(
            f"shared_hidden_dim={shared_hidden_dim} with residual_hidden_dim={residual_hidden_dim}; legal: one of "
            "them, or neither"
        )
