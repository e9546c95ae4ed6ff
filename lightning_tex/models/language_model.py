"""A LightningModule that trains a :class:`lightning_tex.models.Decoder` on token blocks, evaluates and samples it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Callback
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_tex.callbacks import ExpertMonitor, LateProgress, SourceLosses, Throughput
from lightning_tex.data import require_token_ids
from lightning_tex.layers import VocabParallelLinearCrossEntropy
from lightning_tex.lora import LoRAConfig
from lightning_tex.models.config import DecoderConfig
from lightning_tex.models.decoder_module import DecoderModule
from lightning_tex.models.generation import GeneratingRanks, continued, evaluating, prompts_of, require_room
from lightning_tex.models.pretrained_model import require_own_tokens
from lightning_tex.models.sampling import Sampling
from lightning_tex.moe import auxiliary_loss, step_is_over
from lightning_tex.optim import scaled_groups

# B sequences, S positions


class LanguageModel(DecoderModule):
    """Next-token training of a mixture-of-experts decoder. Works under ``strategy="tex_moe"`` and any other.

    Batches are mappings with ``input_ids`` and ``labels``, both [B, S] integers; labels are the next tokens, -100
    where nothing is to be predicted. With padding they have ``attention_mask`` too, [B, S], 1 for a token, 0 for
    padding on either side: that is seen by no token, counts in no position, uses no expert and enters no loss, nor does
    a label that repeats the padding which follows. With ``segments``, [B, S], a token's document in its block (as of
    ``TextDataModule(document_mask=True)``), documents do not see each other, and positions begin anew in each; what is
    predicted at their borders the labels say.

    Logs ``train_loss``, ``val_loss``, ``val_perplexity`` (nats per token and its exponential, over the tokens of all
    ranks), and through its callbacks ``val_loss/{source}`` of a mixture, ``tokens_per_second``, ``tflops_per_device``,
    ``mfu``, ``expert_load/{layer}`` and ``expert_overflow/{layer}``.

    The decoder is built on the meta device in ``configure_model`` and drawn part by part as a function of (seed, name,
    global index): its full size never exists on a rank, and every layout starts from the same weights.

    Args:
        config: sizes of the decoder, which begins with random weights.
        pretrained: in its place a published model, whose decoder this is and whose weights a new run begins with: a
            folder of ``config.json`` and safetensors files, or a repository of the Hugging Face hub, ``owner/name``.
            Every rank reads what it holds of it. A checkpoint that is resumed from, or ``init_from``, goes before.
        revision: of a repository: a branch, tag or commit.
        overrides: arguments of :class:`DecoderConfig` that take precedence over those of the published model, such as
            ``{"capacity_factor": 1.25}``.
        lora: train low-rank adapters of some matrices, and nothing else. Checkpoints of a published model then hold the
            adapters alone, and go on with the same folder.
        trainable: patterns of names of the parameters that are trained, such as ``blocks.3`` or ``attention.*``, as of
            :func:`lightning_tex.optim.train_only`; all others are frozen. With ``lora`` they are trained beside the
            adapters, and checkpoints hold them, too. ``None``: all are trained, with ``lora`` the adapters.
        frozen: patterns of those that are not trained, of what is.
        lr_scale: by pattern, what the learning rate of parameters is multiplied with, whichever optimizer there is; of
            several patterns that are a parameter's the first counts.

    Raises:
        ValueError: neither a configuration nor a published model, or both; files that are damaged or do not fit; a
            target of ``lora`` that is no matrix; a pattern that is of no parameter, with the nearest names.
        FileNotFoundError: there is no such folder or repository.
    """

    def __init__(
        self,
        config: DecoderConfig | None = None,
        pretrained: str | None = None,
        revision: str | None = None,
        overrides: dict[str, Any] | None = None,
        lora: LoRAConfig | None = None,
        trainable: list[str] | None = None,
        frozen: list[str] | None = None,
        lr_scale: dict[str, float] | None = None,
    ) -> None:
        super().__init__(config, pretrained, revision, overrides, lora, trainable, frozen, lr_scale)
        self.cross_entropy = VocabParallelLinearCrossEntropy(reduction="sum")
        self.generating = GeneratingRanks()
        self.mean_val_loss, self.mean_test_loss = MeanMetric(), MeanMetric()

    def forward(  # [B, S] -> [B, S, V/tensor]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        assert self.decoder is not None, "configure_model() has not been called"
        return self.decoder(input_ids, segments, attention_mask)

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """Refuses ids and labels beyond the vocabulary by name, while to look at them costs no wait for a GPU."""
        # The hook of this name without the underscore would take the place of a data module's.
        batch = super()._on_before_batch_transfer(batch, dataloader_idx)
        if isinstance(batch, Mapping):
            require_token_ids(batch, self.config.vocab_size, self.cross_entropy.ignore_index, self._place())
        return batch

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        total, count = self._loss_sum(batch)
        # Ranks may hold different numbers of valid tokens: divide by the mean over ranks, not by the own number.
        mean_total, mean_count = self._mean_over_ranks(torch.stack([total.detach(), count.to(total.dtype)])).unbind()
        mean_count = mean_count.clamp(min=1e-9)
        self.log("train_loss", mean_total / mean_count)
        return total / mean_count + auxiliary_loss(self)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Logs the loss; returns its sum over the batch and the tokens it is of."""
        return self._evaluate(batch, self.mean_val_loss, "val")

    def on_validation_epoch_end(self) -> None:
        self.log("val_perplexity", self.mean_val_loss.compute().exp(), sync_dist=True)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, self.mean_test_loss, "test")

    def on_test_epoch_end(self) -> None:
        self.log("test_perplexity", self.mean_test_loss.compute().exp(), sync_dist=True)

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The most likely next token at every position: [B, S]."""
        assert self.decoder is not None
        logits = self.decoder.logits(batch["input_ids"], batch.get("segments"), batch.get("attention_mask"))
        return logits.argmax(-1)

    def configure_optimizers(self) -> Any:
        """AdamW with a weight decay of 0.1 on matrices, and rates by ``lr_scale``; ``--optimizer`` takes precedence."""
        trained = [p for p in self.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.dim() > 1]
        others = [p for p in trained if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        if self.lr_scale:
            groups = scaled_groups(self, groups, 3e-4, self.lr_scale)
        return torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self._device_mesh is None:  # tex_moe does it
            step_is_over(self)

    def configure_callbacks(self) -> list[Callback]:
        require_own_tokens(self)  # the first hook of all, before data is prepared and anything is logged
        own = [Throughput(), ExpertMonitor(), SourceLosses(), LateProgress(["train_loss"])]
        # Else the Trainer's of the same class would be left out.
        given = {type(callback) for callback in getattr(self._trainer, "callbacks", [])}
        return [callback for callback in own if type(callback) not in given]

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        new_tokens: int,
        temperature: float = 1.0,
        seed: int = 0,
        segments: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_tokens: int | Sequence[int] = (),
        pad_token: int | None = None,
    ) -> Tensor:
        """Continue prompts, each token computed alone by a cache of keys and values. Collective over all ranks.

        Ranks of the data axis may have different prompts, or none (``ids`` of shape [0, S]), and different numbers of
        new tokens; each gets its own result. Where all are asked for the same, all get the same. What comes of a prompt
        does not depend on those beside it: layers with a capacity serve all choices here. The cache, with its memory,
        is :class:`lightning_tex.layers.KVCache`; it is gone at the end.

        Args:
            ids: [B, S] prompts.
            new_tokens: tokens to add at most.
            temperature: logits are divided by it; 0 takes the most likely token.
            seed: of the sampling; for one seed tokens are the same on every layout.
            segments: [B, S], documents of the prompts, of which the last is continued.
            attention_mask: [B, S], 1 for a token, 0 for padding on either side, for prompts of different lengths.
            top_k: only so many of the most likely tokens.
            top_p: only as many of the most likely tokens as have this probability together.
            stop_tokens: after one of them a sequence is over.
            pad_token: what stands after it; ``None``: the first of ``stop_tokens``.

        Returns:
            [B, S + N], new tokens behind all prompts; N is ``new_tokens``, or where the last sequence is over.

        Raises:
            ValueError: more positions than ``max_sequence_length``, options or a mask that are not legal, a router that
                does not choose token by token, or different prompts within a tensor group.
            IndexError: a token that is not in the vocabulary.
        """
        assert self.decoder is not None, "configure_model() has not been called"
        sampling = Sampling(temperature, top_k, top_p, seed)
        stops = [stop_tokens] if isinstance(stop_tokens, int) else list(stop_tokens)
        pad_token = next(iter(stops), 0) if pad_token is None else pad_token
        prompts = prompts_of(ids, attention_mask, segments)
        for row, prompt in enumerate(prompts):
            require_token_ids({"input_ids": prompt}, self.config.vocab_size, where=f"prompt {row}")
        require_room(max(map(len, prompts), default=0), new_tokens, self.config)
        precision = nullcontext() if self._trainer is None else self._trainer.precision_plugin.forward_context()
        with evaluating(self), precision:
            new = continued(self.decoder, self.generating, prompts, new_tokens, sampling, stops, pad_token)
        return torch.cat([ids, new.to(ids)], dim=1)

    def _evaluate(self, batch: Mapping[str, Tensor], metric: MeanMetric, stage: str) -> dict[str, Tensor]:
        total, count = self._loss_sum(batch)
        metric.update(total / count.clamp(min=1), weight=count)
        self.log(f"{stage}_loss", metric, prog_bar=True, batch_size=len(batch["labels"]))
        return {"loss_sum": total, "tokens": count}

    def _loss_sum(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy over this rank's valid tokens, and their number."""
        assert self.decoder is not None, "configure_model() has not been called"
        ids, labels, mask = batch["input_ids"], batch["labels"], batch.get("attention_mask")
        hidden = self.decoder.hidden(ids, batch.get("segments"), mask)
        if mask is not None:
            labels = labels.masked_fill(predicts_nothing(ids, labels, mask.bool()), self.cross_entropy.ignore_index)
        loss = self.cross_entropy(hidden, self.decoder.head, labels)
        return loss, (labels != self.cross_entropy.ignore_index).sum()

    def _place(self) -> str:
        """What is being read, for messages."""
        trainer = self._trainer
        if trainer is None:
            return "a batch"
        loop: Any = trainer.fit_loop.epoch_loop if trainer.training else trainer.predict_loop
        if trainer.evaluating or trainer.sanity_checking:
            loop = trainer._evaluation_loop
        stage = trainer.state.stage
        assert stage is not None
        batch = f"{stage.value} batch {loop.batch_progress.current.ready} of epoch {trainer.current_epoch}"
        return f"rank {trainer.global_rank}, {batch}"

    def _mean_over_ranks(self, x: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(x, reduce_op="mean")


def predicts_nothing(ids: Tensor, labels: Tensor, token_mask: Tensor) -> Tensor:
    """Labels that count for nothing: those of padding, and those that are the padding which follows. All are [B, S].

    Not every label before padding is: where a sequence was cut into inputs and labels before it was padded on the
    right, the last label is a token that is no input.
    """
    padding = ~token_mask
    is_next = labels[:, :-1] == ids[:, 1:]
    return padding | F.pad(is_next & padding[:, 1:], (0, 1))
