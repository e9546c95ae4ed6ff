"""Tensor x expert x data parallel training of mixture-of-experts models, as a PyTorch Lightning strategy."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_tex.data import FineTuningDataModule, MixtureDataModule, TextDataModule
from lightning_tex.models import LanguageModel
from lightning_tex.saving import load_from_checkpoint
from lightning_tex.saving.loading import let_lightning_read_directories
from lightning_tex.strategy import TexMoEStrategy

__version__ = "0.1.0"

let_lightning_read_directories()

if TexMoEStrategy.strategy_name not in StrategyRegistry:
    StrategyRegistry.register(
        TexMoEStrategy.strategy_name,
        TexMoEStrategy,
        description="Tensor x expert x data parallelism for mixture-of-experts models (TED, arXiv 2303.06318)",
    )

__all__ = [
    "FineTuningDataModule",
    "LanguageModel",
    "MixtureDataModule",
    "TexMoEStrategy",
    "TextDataModule",
    "load_from_checkpoint",
]
