"""What keeps a run trustworthy: ranks that agree, signals that lose nothing, failures that are named."""

from lightning_tex.resilience.signals import exit_code

__all__ = ["exit_code"]
