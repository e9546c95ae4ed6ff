"""A recipe, that is, configuration files and options, made into model, data and Trainer. A LightningCLI."""

from lightning_tex.recipe.lightning_cli import DEFAULTS, TexCLI, cli_of
from lightning_tex.recipe.recipe import BARE_TRAINER, Recipe, quiet

__all__ = ["BARE_TRAINER", "DEFAULTS", "Recipe", "TexCLI", "cli_of", "quiet"]
