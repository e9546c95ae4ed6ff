"""Tokens on disk: files that are mapped and never loaded, ours and others', and processes that write them together."""

from lightning_tex.data.tokens.store import TokenFile, Tokens

__all__ = ["TokenFile", "Tokens"]
