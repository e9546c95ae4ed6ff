"""Measuring a recipe where it runs: ``lightning-tex bench``."""

from lightning_tex.bench.command import main

__all__ = ["main"]
