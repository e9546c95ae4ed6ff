"""A LightningModule that holds a decoder: of random or published weights, with adapters or without."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any, Self

import torch
from lightning import LightningModule

from lightning_tex.lora import LoRAConfig, adapter_names, apply_lora
from lightning_tex.models.adapter_checkpoints import LORA, lora_entry, require_same_lora
from lightning_tex.models.config import DecoderConfig
from lightning_tex.models.decoder import Decoder
from lightning_tex.models.exporting import SHARD_SIZE, Exported, save_module
from lightning_tex.models.peft_form import save_adapters
from lightning_tex.models.pretrained_model import ORIGIN, Origin, PretrainedModel, fill_whole, require_own_tokens
from lightning_tex.optim import train_only
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.pretrained.reading import PretrainedWeights
from lightning_tex.saving.model_state import checkpointed


class DecoderModule(LightningModule):
    """What :class:`lightning_tex.LanguageModel` is apart from its training; arguments and errors are described there.

    Attributes:
        decoder: exists from ``configure_model`` on.
        pretrained: the weights of a published model that a new run begins with.
        origin: what a model must be written as, to be what it was read from.
    """

    def __init__(
        self,
        config: DecoderConfig | None,
        pretrained: str | None,
        revision: str | None,
        overrides: dict[str, Any] | None,
        lora: LoRAConfig | None,
        trainable: list[str] | None,
        frozen: list[str] | None,
        lr_scale: dict[str, float] | None,
    ) -> None:
        super().__init__()
        if (config is None) == (pretrained is None):
            raise UserValueError(
                f"{type(self).__name__} takes its decoder from config or from pretrained; legal: one of them "
                "(with pretrained, single values by overrides)"
            )
        self.pretrained: PretrainedWeights | None = None
        self.origin: Origin | None = None
        if pretrained is not None:
            model = PretrainedModel(pretrained, revision, overrides)
            config, self.pretrained, self.origin = model.config, model.weights, model.origin
        elif isinstance(config, Mapping):  # from a checkpoint's hyper-parameters
            config = DecoderConfig(**config)
        assert config is not None
        lora = LoRAConfig(**lora) if isinstance(lora, Mapping) else lora  # from a checkpoint's hyper-parameters
        given = {"trainable": trainable, "frozen": frozen, "lr_scale": lr_scale}
        given["lora"] = None if lora is None else asdict(lora)
        given = {name: value for name, value in given.items() if value is not None}
        self.save_hyperparameters({"config": asdict(config), **given})
        self.config, self.lora = config, lora
        self.trainable, self.frozen, self.lr_scale = trainable, frozen, lr_scale
        if self.saves_adapters_alone:
            self.strict_loading = False
        self.decoder: Decoder | None = None

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], revision: str | None = None, **overrides: Any) -> Self:
        """A model that begins with the weights of a published one, which ``configure_model`` or a Trainer reads.

        Args:
            folder: a folder, or a repository of the Hugging Face hub, ``owner/name``.
            revision: of a repository: a branch, tag or commit.
            overrides: arguments of :class:`DecoderConfig` that take precedence over those of the published model; all
                others go to the class.

        Raises:
            ValueError: files that are damaged, do not fit, or are of a family that is not known.
            FileNotFoundError: there is no such folder or repository.
        """
        of_decoder = {name: value for name, value in overrides.items() if name in DecoderConfig.__dataclass_fields__}
        others = {name: value for name, value in overrides.items() if name not in of_decoder}
        return cls(pretrained=os.fspath(folder), revision=revision, overrides=of_decoder or None, **others)

    def configure_model(self) -> None:
        if self.decoder is None:
            require_own_tokens(self)  # of a module that has callbacks of its own
            self.build_on_meta()
            if self._device_mesh is None:  # no strategy that draws meta parameters
                fill_whole(self)

    def build_on_meta(self) -> None:
        """Make the decoder without values, with its adapters, and with what is frozen."""
        with torch.device("meta"):
            self.decoder = Decoder(self.config)
            if self.lora is not None:
                apply_lora(self.decoder, self.lora)
        if self.trainable is not None or self.frozen:
            trainable = list(self.trainable or ()) if self.lora is not None else self.trainable
            train_only(self, trainable, self.frozen or (), beside=adapter_names(self))

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        dtype: str | None = None,
        max_shard_size: str | int = SHARD_SIZE,
        tokenizer: str | os.PathLike[str] | None = None,
    ) -> None:
        """Write a folder that ``transformers.AutoModelForCausalLM.from_pretrained`` loads, complete or not at all.

        All ranks call it, also after a fit; it needs no Trainer. Every rank writes its part of the safetensors files to
        ``folder``, which all ranks must see. Configuration, generation configuration, tokenizer and a model card go
        along.

        Args:
            folder: is made.
            dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; ``None``: as in the published model that this began
                from, or as the parameters are.
            max_shard_size: of one file.
            tokenizer: a folder or file whose tokenizer goes along; ``None``: that of the published model, or of the
                Trainer's :class:`lightning_tex.TextDataModule`.

        Raises:
            ValueError: no known family has such a decoder, with the reasons.
            RuntimeError: a rank cannot write.
        """
        data = None if self._trainer is None else self._trainer.datamodule  # type: ignore[attr-defined]
        save_module(self, folder, Exported(self.config, self.origin, dtype, max_shard_size, tokenizer, data))

    def save_adapters(self, folder: str | os.PathLike[str]) -> None:
        """Write the adapters alone as PEFT does, for ``peft.PeftModel.from_pretrained(model, folder)``; collective.

        Args:
            folder: is made.

        Raises:
            ValueError: there are none, or of matrices that are no linear layers in transformers, such as experts'.
            RuntimeError: a rank cannot write.
        """
        if self.lora is None:
            raise UserValueError("the model has no adapters; legal: LanguageModel(lora=..), or save_pretrained")
        adapters = adapter_names(self)
        if more := [name for name, p in self.named_parameters() if p.requires_grad and name not in adapters]:
            raise UserValueError(
                f"besides its adapters the model trains {', '.join(more[:4])}, which PEFT's form does not have; legal: "
                "save_pretrained, which merges adapters"
            )
        save_adapters(self, folder, self.lora, self.config, self.origin)

    def initial_weights(self) -> PretrainedWeights | None:
        """What a strategy fills parameters from that it would otherwise draw."""
        return self.pretrained

    def alike_on_all_ranks(self) -> dict[str, Any]:
        """What all ranks must have alike besides options."""
        return {} if self.pretrained is None else {"the pretrained weights": self.pretrained.folder.fingerprint}

    @property
    def saves_adapters_alone(self) -> bool:
        """Whether checkpoints hold adapters and what is trained: all else is in the folder of a published model."""
        return self.lora is not None and self.pretrained is not None

    def checkpointed_names(self) -> Collection[str] | None:
        """What of the state checkpoints hold; ``None``: all."""
        if not self.saves_adapters_alone:
            return None
        trained = {name for name, p in self.named_parameters(remove_duplicate=False) if p.requires_grad}
        return adapter_names(self) | trained

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.origin is not None:
            checkpoint[ORIGIN] = asdict(self.origin)
        if self.lora is not None:
            checkpoint["state_dict"] = checkpointed(self, checkpoint["state_dict"])
            checkpoint[LORA] = lora_entry(self.lora, self.pretrained)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        require_same_lora(checkpoint.get(LORA), self.lora, self.pretrained)
        if ORIGIN in checkpoint:
            self.origin = Origin(**checkpoint[ORIGIN])
