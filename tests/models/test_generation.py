"""Text that goes on: transformers' tokens, the same on every layout and beside any other prompts."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.published_folders import CASES, VOCABULARY, loaded, publish
from helpers.ranks import on_ranks, together
from helpers.trainers import quiet
from torch import Tensor

from lightning_tex import LanguageModel, TexMoEStrategy
from lightning_tex.models import DecoderConfig
from lightning_tex.models.generation import GeneratingRanks, Writing, cache_bytes, continued
from lightning_tex.models.sampling import Sampling

NEW, LENGTHS = 10, (12, 7, 10, 3)
# On 4 ranks; experts are spread over as many as the layout allows.
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor 2 x expert 2": {"tensor_parallel_size": 2},
    "sequence parallelism": {"tensor_parallel_size": 2, "sequence_parallel": True},
    "folding": {"tensor_parallel_size": 2, "expert_tensor_parallel_size": 1},
    "expert 4": {},
}


def batch(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    """Prompts padded on the left, and which places are tokens."""
    ids = torch.randint(1, VOCABULARY, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(5))
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return ids * mask, mask


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("published")
    return {case: publish(case, folder / case) for case in CASES}


def theirs(folder: Path) -> Tensor:
    """What transformers takes to be most likely, token by token: [B, NEW]."""
    ids, mask = batch()
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return loaded(folder).generate(input_ids=ids, attention_mask=mask.long(), **options)[:, ids.shape[1] :]


def of_folder(folder: Path) -> LanguageModel:
    module = LanguageModel.from_pretrained(folder)
    module.configure_model()
    return module


@pytest.mark.parametrize("case", CASES)
def test_the_most_likely_tokens_are_those_of_transformers(case: str, published: dict[str, Path]) -> None:
    ids, mask = batch()
    new = of_folder(published[case]).generate(ids, NEW, temperature=0, attention_mask=mask)[:, ids.shape[1] :]
    assert torch.equal(new, theirs(published[case]))


def on_a_layout(folder: Path, layout: dict[str, Any]) -> Any:
    """What each data rank writes of its own prompts, with options of its own, and what all write of the same."""
    module = LanguageModel.from_pretrained(folder)
    trainer = quiet(devices=4, strategy=TexMoEStrategy(**layout), limit_predict_batches=0)
    trainer.predict(module, torch.utils.data.DataLoader([0]))
    ids, mask = batch()
    data = trainer.strategy.topology.data
    own = slice(data.rank, 3, data.size)  # with 4 data ranks the last has none
    kept = mask[own].any(0)
    options = {"attention_mask": mask[own][:, kept], "stop_tokens": () if data.rank else STOP}
    alone = module.generate(ids[own][:, kept], NEW - data.rank, temperature=0, **options)
    drawn = module.generate(ids, NEW, seed=3, attention_mask=mask, top_k=20, top_p=0.9)
    return alone[:, kept.sum() :], drawn[:, ids.shape[1] :], data.rank


STOP = (4, 7, 9, 11)
_CHOSEN = {
    ("mixtral", "sequence parallelism"),
    ("deepseek-v3", "folding"),
    ("gpt-oss", "sequence parallelism"),
    ("qwen2-moe", "tensor 2 x expert 2"),
    ("olmoe", "expert 4"),
}


@pytest.fixture(scope="module")
def written(published: dict[str, Path], request: pytest.FixtureRequest) -> Any:
    wanted = {tuple(item.callspec.params[name] for name in ("case", "layout"))
              for item in request.session.items if "layout" in getattr(getattr(item, "callspec", None), "params", {})
              and item.path == request.path}  # fmt: skip
    runs = {(case, layout): (on_a_layout, published[case], LAYOUTS[layout]) for case, layout in sorted(wanted)}
    return together(4, runs, timeout=300)


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        pytest.param(case, layout, marks=[] if (case, layout) in _CHOSEN else pytest.mark.full)
        for case in CASES
        for layout in LAYOUTS
    ],
)
def test_a_layout_writes_what_one_process_does(
    case: str, layout: str, published: dict[str, Path], written: Any
) -> None:
    ids, mask = batch()
    module = of_folder(published[case])
    drawn = module.generate(ids, NEW, seed=3, attention_mask=mask, top_k=20, top_p=0.9)[:, ids.shape[1] :]
    likely = theirs(published[case])
    size = 4 // LAYOUTS[layout].get("tensor_parallel_size", 1)
    for own, shared, rank in written[case, layout]:
        assert torch.equal(shared, drawn)
        rows = range(rank, 3, size)
        expected = [likely[row][: NEW - rank] if rank else until_a_stop(likely[row]) for row in rows]
        assert own.shape == (len(expected), max((len(row) for row in expected), default=0))
        for row, wanted in zip(own, expected, strict=True):
            assert torch.equal(row[: len(wanted)], wanted) and bool((row[len(wanted) :] == STOP[0]).all())


def until_a_stop(row: Tensor) -> Tensor:
    ends = torch.isin(row, torch.tensor(STOP)).nonzero()
    return row[: int(ends[0]) + 1] if len(ends) else row


# --- what a cache remembers, in one process

SMALL = {"dim": 24, "num_layers": 3, "num_heads": 6, "num_kv_heads": 2, "hidden_dim": 20, "max_sequence_length": 40}
LATENT = {"kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "num_kv_heads": None}
SOME_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
KINDS: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "capacity": {"num_experts": 4, "top_k": 2, "moe_every": 1, "capacity_factor": 0.5},
    "windows": {"sliding_window": 4, "layer_types": SOME_WINDOWS},
    "windows, sinks, soft caps": {
        "sliding_window": 3, "attention_sinks": True, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
    },
    "latent": LATENT,
    "longrope, from short to long": {
        "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0],
                         "original_max_position_embeddings": 12, "factor": 4.0},
    },
    "dynamic": {
        "rope_scaling": {"rope_type": "dynamic", "factor": 3.0, "original_max_position_embeddings": 40},
    },
}  # fmt: skip


def small(**options: Any) -> LanguageModel:
    torch.manual_seed(2)
    module = LanguageModel(DecoderConfig(VOCABULARY, **{**SMALL, **options}))
    module.configure_model()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.eval()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_by_the_cache_are_those_of_the_whole_sequence(kind: str) -> None:
    module = small(**KINDS[kind])
    whole = small(**{**KINDS[kind], "capacity_factor": None})  # in generation a capacity serves all choices
    decoder, prompts = whole.decoder, [torch.arange(n) * 7 % VOCABULARY for n in (9, 4)]
    if kind == "capacity":
        ids = torch.stack([prompt[:4] for prompt in prompts])
        assert torch.equal(module.generate(ids, 6, 0.0), whole.generate(ids, 6, 0.0))
        assert module.decoder.blocks[0].mlp.dispatcher.capacity.factor == 0.5
    writing, chosen = Writing(decoder, prompts, 8), []
    for step in range(8):
        logits = writing.logits(chosen, None)
        chosen.append(torch.tensor([step * 5 + 1, step * 3 + 2]))
        # A batch is stretched by its longest sequence.
        longest = max(map(len, prompts)) + step
        for row, prompt in enumerate(prompts):
            so_far = torch.cat([prompt, *(tokens[row : row + 1] for tokens in chosen[:-1])])
            mask = torch.arange(longest) < len(so_far)
            padded = torch.nn.functional.pad(so_far, (0, longest - len(so_far)))
            expected = decoder(padded[None], token_mask=mask[None])[0, len(so_far) - 1]
            torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["grouped heads", "windows", "latent"])
def test_memory_of_the_cache_is_counted(kind: str) -> None:
    module = small(**KINDS[kind])
    writing = Writing(module.decoder, [torch.arange(5), torch.arange(9)], 6)
    writing.logits([], None)
    assert writing.cache_bytes == cache_bytes(module.config, 2, 9 + 6 - 1, 4) > 0


def test_each_step_computes_new_tokens_alone() -> None:
    module = small(num_experts=4)
    seen: list[int] = []
    module.decoder.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    ids, mask = batch()
    module.generate(ids, 5, attention_mask=mask)
    assert seen == [sum(LENGTHS), *[len(LENGTHS)] * 4]


def test_a_prompt_goes_on_alike_beside_any_other_and_with_padding_on_either_side() -> None:
    module = small(num_experts=4, top_k=2, capacity_factor=0.5)
    ids, mask = batch()
    together_ = module.generate(ids, NEW, temperature=0, attention_mask=mask)[:, ids.shape[1] :]
    for row, length in enumerate(LENGTHS):
        prompt = ids[row : row + 1, -length:]
        assert torch.equal(module.generate(prompt, NEW, temperature=0)[0, length:], together_[row])
        padded, real = torch.nn.functional.pad(prompt, (0, 3)), torch.arange(length + 3)[None] < length
        right = module.generate(padded, NEW, temperature=0, attention_mask=real)
        assert torch.equal(right[0, length + 3 :], together_[row])


def test_modes_inference_mode_and_what_training_has_are_as_before() -> None:
    module = small(num_experts=4, capacity_factor=1.0).train()
    module.decoder.norm.eval()
    modes = [each.training for each in module.modules()]
    dispatcher = module.decoder.blocks[1].mlp.dispatcher
    with torch.inference_mode():
        first = module.generate(torch.arange(6)[None], 4)
    assert torch.equal(first, module.generate(torch.arange(6)[None], 4))
    assert [each.training for each in module.modules()] == modes
    assert module.decoder.blocks[1].mlp.dispatcher is dispatcher
    assert all(parameter.grad is None and parameter.requires_grad for parameter in module.parameters())


# --- how tokens are chosen


def shares(logits: Tensor, **options: Any) -> Tensor:
    """How often each token is drawn: [V]."""
    drawn = Sampling(**options).choose(logits.expand(20_000, -1), 5)
    return drawn.bincount(minlength=logits.shape[-1]) / len(drawn)


LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.5, 0.0, -3.0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(-1)
    assert torch.allclose(shares(LOGITS, temperature=temperature, seed=1), expected, atol=0.012)  # 3.4 deviations


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 1}, [0]),
        ({"top_k": 3}, [0, 2, 3]),
        ({"top_p": 0.3}, [0]),
        ({"top_p": 0.79}, [0, 3]),
        ({"top_p": 0.85}, [0, 2, 3]),
        ({"top_k": 2, "top_p": 0.99}, [0, 3]),
        ({"top_k": 9, "top_p": 1.0}, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_only_the_most_likely_are_drawn(options: dict[str, Any], kept: list[int]) -> None:
    expected = torch.full_like(LOGITS, float("-inf")).index_copy(0, torch.tensor(kept), LOGITS[kept]).softmax(-1)
    assert torch.allclose(shares(LOGITS, **options), expected, atol=0.012)
    assert bool((shares(LOGITS, **options)[expected == 0] == 0).all())


def test_seeds_steps_and_sequences_differ() -> None:
    even = torch.zeros(4, 1000)
    draws = [Sampling(seed=seed).choose(even, step) for seed, step in itertools.product((0, 1), (0, 1))]
    assert len(torch.cat(draws).unique()) == 16
    assert torch.equal(Sampling(seed=1).choose(even[:2], 1), draws[3][:2])


def test_a_sequence_is_over_after_a_stop_token() -> None:
    module, prompt = small(), torch.arange(6)[None].expand(2, -1)
    free = module.generate(prompt, 12, seed=1)
    stop = int(free[0, 8])
    assert stop not in free[0, 6:8]
    ended = module.generate(prompt, 12, seed=1, stop_tokens=stop, pad_token=VOCABULARY + 5)
    assert torch.equal(ended[0, :9], free[0, :9]) and bool((ended[0, 9:] == VOCABULARY + 5).all())
    ends = (free[1, 6:] == stop).nonzero()
    last = int(ends[0]) + 1 if len(ends) else 12
    assert ended.shape[1] == 6 + max(3, last) and torch.equal(ended[1, : 6 + last], free[1, : 6 + last])
    assert torch.equal(module.generate(prompt[:1], 12, seed=1, stop_tokens=[stop]), free[:1, :9])


def test_nothing_to_do() -> None:
    module = small()
    assert module.generate(torch.zeros(0, 3, dtype=torch.int64), 4).shape == (0, 3)
    assert torch.equal(module.generate(torch.arange(3)[None], 0), torch.arange(3)[None])


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((torch.arange(30)[None], 11), {}, "30 tokens .*new_tokens=11 are 41 .*_length=40; legal: .* 10$"),
        ((torch.zeros(1, 40, dtype=torch.int64), 1), {}, "legal: prompts of less than 40 tokens"),
        ((torch.arange(3)[None], 1), {"temperature": -1.0}, "temperature=-1.0; legal: 0"),
        ((torch.arange(3)[None], 1), {"top_k": 0}, "top_k=0; legal: at least 1"),
        ((torch.arange(3)[None], 1), {"top_p": 1.5}, "top_p=1.5; legal: above 0, at most 1"),
        ((torch.arange(3), 1), {}, r"shape \[3\]; legal: integers of shape \[B, S\]"),
        ((torch.arange(3)[None], 1), {"attention_mask": torch.zeros(1, 3).long()}, "rows 0 have no token"),
        ((torch.arange(3)[None], 1), {"attention_mask": torch.ones(1, 2).long()}, "attention_mask is .* legal"),
        ((torch.arange(3)[None], 1), {"segments": torch.ones(1, 2).long()}, r"segments are of shape \[1, 2\]"),
        ((torch.full((1, 3), VOCABULARY), 1), {}, r"prompt 0: input_ids\[0\] is 101, and the vocabulary has 101"),
    ],
)  # fmt: skip
def test_refused_by_name(arguments: Any, options: Any, words: str) -> None:
    with pytest.raises((ValueError, IndexError), match=words):
        small().generate(*arguments, **options)


@pytest.mark.parametrize(
    ("router", "kind"), [("forced_balance", "ForcedBalanceRouter"), ("expert_choice", "ExpertChoiceRouter")]
)
def test_a_router_that_needs_a_batch_is_refused_by_name(router: str, kind: str) -> None:
    module = small(num_experts=4, router=router)
    with pytest.raises(ValueError, match=rf"blocks.1.mlp.router is a {kind}.* legal: .*'softmax'"):
        module.generate(torch.arange(3)[None], 1)


def _different_prompts() -> str:
    module = LanguageModel(DecoderConfig(VOCABULARY, **SMALL))
    trainer = quiet(devices=2, strategy=TexMoEStrategy(tensor_parallel_size=2), limit_predict_batches=0)
    trainer.predict(module, torch.utils.data.DataLoader([0]))
    try:
        module.generate(torch.arange(3 + trainer.global_rank)[None], 1)
    except ValueError as error:
        return str(error)
    return "nothing is refused"


def test_different_prompts_within_a_tensor_group_are_refused_on_all_its_ranks() -> None:
    for said in on_ranks(2, _different_prompts):
        assert "ranks 0, 1 share" in said and "tensor_parallel_size=2" in said and "legal: the same" in said


def test_tokens_are_not_looked_at_where_nothing_stops_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a look would wait for it."""
    decoder = small().decoder
    looks: list[Any] = []
    for name in ("__bool__", "item", "tolist", "cpu"):
        look = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, *a, look=look, name=name: looks.append(name) or look(self, *a))
    prompts = [torch.arange(5), torch.arange(3)]
    continued(decoder, GeneratingRanks(), prompts, 2, Sampling())
    before = len(looks)
    looks.clear()
    continued(decoder, GeneratingRanks(), prompts, 9, Sampling())
    assert len(looks) == before
