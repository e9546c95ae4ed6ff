"""Token ids that a vocabulary does not have: refused by name while a batch is still in host memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_tex.parallel.errors import UserIndexError

IGNORE_INDEX = -100  # the label of a position that predicts nothing


def require_token_ids(
    batch: Mapping[str, Any], vocab_size: int, ignore_index: int = IGNORE_INDEX, where: str = "a batch"
) -> None:
    """Refuse a batch whose ``input_ids`` or ``labels`` are not in the vocabulary.

    What lies on a GPU already is not looked at, as that would wait for it: call this before the transfer, in the hook
    ``on_before_batch_transfer`` of a LightningDataModule, or of a LightningModule that has none.

    Args:
        batch: with ``input_ids`` and ``labels``; either may be missing.
        vocab_size: legal ids are below it.
        ignore_index: is legal as a label, too.
        where: the batch is from, for the message.

    Raises:
        IndexError: naming the first such id and its place.
    """
    for name, ignored in (("input_ids", None), ("labels", ignore_index)):
        ids = batch.get(name)
        if isinstance(ids, Tensor) and ids.device.type == "cpu" and not ids.is_floating_point() and ids.numel():
            _require(name, ids, vocab_size, ignored, batch.get("sample"), where)


def _require(name: str, ids: Tensor, vocab_size: int, ignored: int | None, samples: Any, where: str) -> None:
    least, most = torch.aminmax(ids)
    # Most batches have no label to ignore, or no other one below zero: two numbers tell.
    if most < vocab_size and (least >= 0 or least == ignored == -1):
        return
    illegal = (ids < 0) | (ids >= vocab_size)
    if ignored is not None:
        illegal &= ids != ignored
    if not bool(illegal.any()):
        return
    place = illegal.nonzero()[0].tolist()
    sample = f" (sample {int(samples[place[0]])})" if isinstance(samples, Tensor) and samples.dim() == 1 else ""
    legal = f"0 to {vocab_size - 1}" + ("" if ignored is None else f", or {ignored} where nothing is predicted")
    raise UserIndexError(
        f"{where}: {name}{place}{sample} is {int(ids[tuple(place)])}, and the vocabulary has {vocab_size} tokens; "
        f"legal: {legal}. Was the data made with another tokenizer? ({int(illegal.sum())} such ids in this batch)"
    )
