"""Where 0.1 had ``LanguageModel``: configurations that it saved name this path. Import it from ``lightning_tex``."""

from lightning_tex.models.language_model import LanguageModel

__all__ = ["LanguageModel"]
