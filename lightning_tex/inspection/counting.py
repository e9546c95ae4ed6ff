"""A callback that counts, while a model is validated, what its routers choose."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_tex.callbacks.experts import labelled
from lightning_tex.inspection.origins import Origins, ids_of, is_padding
from lightning_tex.inspection.usage import LayerUsage
from lightning_tex.moe import MoE, Route
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.parallel.sharding import tex_modules

# Bytes of all tables of choices by token; of more layers, some evenly spaced ones have one.
_TOKEN_BYTES = 1 << 30


class UsageCounter(Callback):
    """Counts every MoE layer's choices in one pass of validation, whatever the layout; nothing waits for a device.

    Args:
        origins: of the data that is passed; ``None`` where nothing is known of it.
        vocabulary: of its tokens; 0: they are not told apart.

    Attributes:
        layers: afterwards, sums over all ranks, by the block's number or the layer's name.
        top_k: choices of a token in each of them.
        tokens: that were passed.

    Raises:
        ValueError: the model has no MoE layer.
    """

    def __init__(self, origins: Origins, vocabulary: int) -> None:
        self.origins, self.vocabulary = origins, vocabulary
        self.layers: dict[str, LayerUsage] = {}
        self.top_k: dict[str, int] = {}
        self.tokens = 0
        self._modules: dict[str, MoE] = {}
        self._chosen: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = {name: layer for name, layer in tex_modules(pl_module) if isinstance(layer, MoE)}
        if not found:
            raise UserValueError(f"{type(pl_module).__name__} has no MoE layer; legal: a model with experts")
        self._modules = labelled(found)  # type: ignore[assignment, arg-type]
        device, before = pl_module.device, 0
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        with_tokens = self._layers_with_tokens()
        for label, layer in self._modules.items():
            experts = layer.router.num_experts
            vocabulary = self.vocabulary if label in with_tokens else 0
            sizes = len(self.origins.sources), len(self.origins.documents)
            self.layers[label] = LayerUsage(experts, vocabulary, *sizes, before, device)
            self.top_k[label], before = layer.top_k, experts
            self._hooks.append(layer.router.register_forward_hook(partial(self._see, label)))

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._chosen = {}

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        whole, before = ids_of(batch), None
        for label, indices in self._chosen.items():
            if whole is None:
                sources = indices.new_zeros(len(indices))
                self.layers[label].add(
                    indices, None, sources, torch.full_like(sources, len(self.origins.documents)), before
                )
            else:
                ids, padding, sources, documents = self._own(label, whole, len(indices), batch)
                indices = indices.masked_fill(padding[:, None], self._modules[label].router.num_experts)
                self.layers[label].add(indices, ids, sources, documents, before)
                if before is None:
                    self._count += (~padding).sum()
            before = indices

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for hook in self._hooks:
            hook.remove()
        layout = next(iter(self._modules.values())).activation_layout

        def total(table: Tensor) -> Tensor:
            reduced = trainer.strategy.reduce(layout.total(table), reduce_op="sum")
            assert isinstance(reduced, Tensor)
            return reduced

        self.layers = {label: usage.reduced(total) for label, usage in self.layers.items()}
        self.tokens = int(total(self._count))

    def _see(self, label: str, _: Any, __: Any, route: Route) -> None:
        # A rank without batches repeats its last one, which counts once.
        self._chosen.setdefault(label, route.indices)

    def _own(self, label: str, ids: Tensor, tokens: int, batch: Any) -> tuple[Tensor, ...]:
        """Of the tokens that this rank holds between layers: ids, whether padding, source and document. [T] each"""
        layer = self._modules[label]
        like = ids.new_empty(len(ids), tokens // max(len(ids), 1), 1)
        all_of_them = ids, is_padding(batch, ids), *self.origins.of(batch, ids)
        return tuple(layer.activation_layout.shard_mask(one, like).reshape(-1) for one in all_of_them)

    def _layers_with_tokens(self) -> set[str]:
        """Those whose choices are counted by token."""
        labels, left = list(self._modules), _TOKEN_BYTES
        sizes = [4 * self.vocabulary * layer.router.num_experts for layer in self._modules.values()]
        most = max(1, left // max(max(sizes), 1))
        if len(labels) <= most:
            return set(labels)
        return {labels[round(i * (len(labels) - 1) / max(most - 1, 1))] for i in range(most)}
