"""What a LoRA run trains."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from lightning_tex.parallel.errors import UserValueError

ATTENTION = ("query", "key", "value", "out")


@dataclass(frozen=True)
class LoRAConfig:
    """Which matrices get adapters, and of which kind.

    Args:
        rank: r, of every adapter.
        alpha: what an adapter gives is scaled by alpha / r.
        dropout: probability with which elements of an adapter's input are zeroed in training. Experts' adapters have no
            input of their own and take none.
        targets: patterns of names, such as ``query``, ``attention.*``, ``blocks.0.mlp.up`` or ``experts.*``: each is
            held, with the shell's wildcards, to a name and to every end of it that follows a dot. A linear layer's name
            is the module's, that of the experts' stacked matrices ``..experts.gate``, ``..experts.up`` and
            ``..experts.down``.

    Raises:
        ValueError: a number that is not legal, or no targets.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ATTENTION

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1:
            raise UserValueError(f"lora.rank={self.rank}; legal: 1 and more")
        if not 0 <= self.dropout < 1:
            raise UserValueError(f"lora.dropout={self.dropout}; legal: 0 and more, less than 1")
        if not self.targets:
            raise UserValueError("lora.targets is empty; legal: patterns of names, such as 'attention.*', 'experts.*'")

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    def takes(self, name: str) -> bool:
        """Whether a matrix of this name gets an adapter."""
        return any(matches(pattern, name) for pattern in self.targets)


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern is that of a name, or of an end of it that follows a dot."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
