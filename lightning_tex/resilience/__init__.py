"""What keeps a run of many processes honest: ranks that agree, signals that lose nothing, failures that are named.

Knows no Lightning.
"""

from lightning_tex.resilience.signals import exit_code

__all__ = ["exit_code"]
