"""Documents of one block train as each by itself, in one process and on layouts."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import lightning as L
import pytest
import torch
from helpers.behaviour_modules import TED, assert_equal_to_one_process, new_trainer, on_data_axis
from helpers.trainers import gathered
from torch import Tensor

from lightning_tex import LanguageModel
from lightning_tex.layers import DocumentContext, TokenContext
from lightning_tex.models import Decoder, DecoderConfig
from lightning_tex.models.decoder import token_context
from lightning_tex.moe import auxiliary_loss

VOCABULARY, LENGTH = 61, 12
# Lengths of the documents of each block: a whole one, some of one token, one behind the other.
BLOCKS = ((5, 1, 6), (12,), (1, 1, 4, 3, 3), (2, 10))


def config(**changes: Any) -> DecoderConfig:
    sizes = {"dim": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 16, "num_experts": 4}
    return DecoderConfig(VOCABULARY, **{**sizes, "top_k": 2, "load_balance_coefficient": 0.0, **changes})


def packed(seed: int = 0, blocks: tuple[tuple[int, ...], ...] = BLOCKS) -> dict[str, Tensor]:
    """Blocks of documents, in each of which all tokens but the first are predicted."""
    ids = torch.randint(1, VOCABULARY, (len(blocks), LENGTH), generator=torch.Generator().manual_seed(seed))
    segments = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in blocks])
    labels = torch.cat([ids[:, 1:], torch.full((len(blocks), 1), -100)], 1)
    ends = torch.cat([segments[:, 1:] != segments[:, :-1], torch.ones(len(blocks), 1, dtype=torch.bool)], 1)
    return {"input_ids": ids, "labels": labels.masked_fill(ends, -100), "segments": segments}


def alone(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each of the documents in a row of its own, padded on the right."""
    rows: dict[str, list[Tensor]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for ids, labels, segments in zip(*batch.values(), strict=True):
        ends = [0, *(segments.diff().nonzero().flatten() + 1).tolist(), LENGTH]
        for begin, end in pairwise(ends):
            for name, part, fill in (("input_ids", ids, 0), ("labels", labels, -100)):
                rows[name].append(torch.full((LENGTH,), fill).index_copy(0, torch.arange(end - begin), part[begin:end]))
            rows["attention_mask"].append((torch.arange(LENGTH) < end - begin).long())
    return {name: torch.stack(parts) for name, parts in rows.items()}


def with_padding(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same blocks in longer rows, with padding on either side and in the middle of documents."""
    real = torch.ones(len(BLOCKS), LENGTH + 5, dtype=torch.bool)
    real[0, :5] = real[1, -5:] = real[2, 1:11:2] = real[3, :2] = real[3, 7:10] = False
    longer = {name: torch.zeros(real.shape, dtype=torch.int64).masked_scatter(real, x) for name, x in batch.items()}
    return {**longer, "labels": longer["labels"].masked_fill(~real, -100), "attention_mask": real}


def learnt(batch: dict[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    """Loss sum, tokens, loads and all gradients of one step in this process."""
    torch.manual_seed(1)
    module = LanguageModel(config(**changes))
    module.configure_model()
    module.double()
    total, count = module._loss_sum(batch)
    (total / count + auxiliary_loss(module)).backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    loads = [layer.load.take() for _, layer in module.decoder.moe_layers()]
    return {"loss": total.detach(), "count": count, **{f"load {i}": load for i, load in enumerate(loads)}, **gradients}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        error = (got[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-12)
        assert error <= tolerance, f"{name}: {error:.1e}"


LATENT = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "num_kv_heads": None}
KINDS: dict[str, dict[str, Any]] = {
    "dropless": {},
    "dense": {"moe_layers": ()},
    "routing losses": {"load_balance_coefficient": 0.1, "z_loss_coefficient": 0.01},
    "window": {"sliding_window": 3},
    "window and sinks": {"sliding_window": 3, "attention_sinks": True},
    "sinks": {"attention_sinks": True},
    "cap": {"attn_logit_softcapping": 0.5},
    "latent": LATENT,
    "norms and rates": {"qk_norm": "head", "partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("kind", KINDS)
def test_documents_train_as_each_alone(kind: str) -> None:
    batch = packed()
    expected = learnt(alone(batch), **KINDS[kind])
    assert expected["count"] == sum(length - 1 for row in BLOCKS for length in row)
    assert_same(learnt(batch, **KINDS[kind]), expected)
    assert_same(learnt(with_padding(batch), **KINDS[kind]), expected)
    seeing_all = learnt({name: batch[name] for name in ("input_ids", "labels")}, **KINDS[kind])
    assert abs(seeing_all["loss"] - expected["loss"]) > 1e-3


def test_a_block_of_one_document_is_as_without_segments_bit_for_bit() -> None:
    batch = packed(blocks=((LENGTH,), (LENGTH,)))
    without = learnt({name: batch[name] for name in ("input_ids", "labels")})
    for name, value in learnt(batch).items():
        assert torch.equal(value, without[name]), name


def test_predictions_and_logits_of_documents() -> None:
    torch.manual_seed(1)
    module = LanguageModel(config()).eval()
    module.configure_model()
    batch = packed()
    each = alone(batch)
    predicted = module.predict_step(each, 0)[each["attention_mask"].bool()]
    assert torch.equal(module.predict_step(batch, 0).flatten(), predicted)
    logits = module(batch["input_ids"], segments=batch["segments"])
    assert torch.equal(module.decoder(batch["input_ids"], batch["segments"]), logits)


def test_a_continued_prompt_sees_its_last_document() -> None:
    torch.manual_seed(1)
    module = LanguageModel(config(max_sequence_length=LENGTH + 4))
    module.configure_model()
    batch = packed(blocks=((5, 7), (5, 7)))
    last = module.generate(batch["input_ids"][:, 5:], 4, temperature=0)
    found = module.generate(batch["input_ids"], 4, temperature=0, segments=batch["segments"])
    assert torch.equal(found[:, LENGTH:], last[:, 7:])


def test_what_a_batch_says_makes_its_context() -> None:
    ids = torch.zeros(2, 6, dtype=torch.int64)
    assert token_context(ids, None, None) is None
    assert isinstance(token_context(ids, None, torch.ones_like(ids)), TokenContext)
    assert isinstance(token_context(ids, ids, None), DocumentContext)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (
            torch.zeros(4, 13, dtype=torch.int64),
            r"shape \[4, 13\] for input_ids of shape \[4, 12\]; legal: their shape",
        ),
        (torch.zeros(4, LENGTH), r"torch.float32 of shape \[4, 12\]; legal: integers"),
    ],
    ids=["length", "floats"],
)
def test_what_are_no_segments_is_refused(segments: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoder(config())(packed()["input_ids"], segments)


# --- on layouts


class Documents(LanguageModel):
    """Takes its batch as a list, as the helpers slice it, and keeps its losses; SGD."""

    def __init__(self) -> None:
        super().__init__(config())
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        named = dict(zip(("input_ids", "labels", "segments"), batch, strict=True))
        loss = super().training_step(named, batch_idx)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def configure_callbacks(self) -> list[L.Callback]:
        return []


def fit(layout: dict[str, Any] | None) -> dict[str, Tensor]:
    """Two steps of two micro-steps; in one process each document is a row of its own."""
    L.seed_everything(3, verbose=False)
    module, trainer = Documents(), new_trainer(layout, accumulate_grad_batches=2)
    steps = [packed(seed, (*BLOCKS, (3, 9), (LENGTH,), (4, 4, 4), (1, 11))) for seed in range(4)]
    if layout is None:
        steps = [by_itself(step) for step in steps]
    trainer.fit(module, on_data_axis(trainer, [list(step.values()) for step in steps]))
    losses = trainer.strategy.reduce(torch.stack(module.losses), reduce_op="mean")
    return {"losses": losses, **gathered(module, trainer)}


def by_itself(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each document in a row of its own; what fills the row comes after it and has no labels."""
    rows = alone(batch)
    return {**{name: rows[name] for name in ("input_ids", "labels")}, "segments": torch.zeros_like(rows["labels"])}


@pytest.mark.parametrize(
    "options",
    [
        {"sequence_parallel": True, "activation_checkpointing": "communication_aware"},
        pytest.param({}, marks=pytest.mark.full),
        pytest.param({"sequence_parallel": True}, marks=pytest.mark.full),
        pytest.param({"activation_checkpointing": "full"}, marks=pytest.mark.full),
        pytest.param({"expert_tensor_parallel_size": 1, "expert_parallel_size": 4}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_layouts_equal_documents_alone_in_one_process(options: dict[str, Any]) -> None:
    assert_equal_to_one_process(fit, layout={**TED, **options})
