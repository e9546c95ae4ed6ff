"""The command line: every command, its options, tables and plots."""

from lightning_tex.cli.main import main

__all__ = ["main"]
