"""LoRA of a published model: the adapters of PEFT, checkpoints of adapters alone, what is refused, what is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.published_folders import Rows, loaded, publish, require_equal_tensors, tensors, token_ids
from helpers.ranks import together
from helpers.trainers import quiet
from torch import nn
from torch.utils.data import DataLoader

from lightning_tex import LanguageModel, TexMoEStrategy
from lightning_tex.layers import ParallelMLP
from lightning_tex.lora import LoRAConfig, apply_lora
from lightning_tex.lora.apply import adapted
from lightning_tex.models import DecoderConfig
from lightning_tex.models.exporting import export
from lightning_tex.parallel.errors import UserValueError

DENSE = LoRAConfig(rank=2, alpha=3, targets=("attention.*", "mlp.*"))
SPARSE = LoRAConfig(rank=2, alpha=3, targets=("query", "out", "experts.*"))
TED: dict[str, Any] = {"tensor_parallel_size": 2, "expert_parallel_size": 2}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return publish("llama, biases", tmp_path_factory.mktemp("published") / "llama")


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    return publish("qwen3-moe", tmp_path_factory.mktemp("published") / "qwen3")


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers so
def test_adapters_are_those_of_peft(dense, tmp_path):
    peft = pytest.importorskip("peft")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    ours = LanguageModel.from_pretrained(dense, lora=DENSE)
    ours.configure_model()
    theirs = peft.get_peft_model(loaded(dense), peft.LoraConfig(r=2, lora_alpha=3, target_modules=names))
    ours.save_adapters(tmp_path / "first")
    peft.set_peft_model_state_dict(theirs, peft.utils.load_peft_weights(tmp_path / "first", "cpu"))
    ids = token_ids(4)
    with torch.no_grad():
        before = ours(ids[:, :-1])
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            logits = model(ids[:, :-1])
            logits = logits if isinstance(logits, torch.Tensor) else logits.logits
            nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        mine, expected = ours(ids[:, :-1]), theirs(ids[:, :-1]).logits
        assert difference(mine, expected) < 1e-5 < 1e-2 < difference(before, expected)
        ours.save_adapters(tmp_path / "adapters")
        again = peft.PeftModel.from_pretrained(loaded(dense), tmp_path / "adapters")
        assert difference(again(ids[:, :-1]).logits, mine) < 1e-6
        ours.save_pretrained(tmp_path / "merged")
        assert difference(loaded(tmp_path / "merged")(ids[:, :-1]).logits, mine) < 1e-5


# --- runs on ranks


class _Steps(LanguageModel):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


def fit(folder: Path, out: Path, name: str, epochs: int, begun: str | None, options: dict[str, Any]) -> None:
    options = dict(options)
    torch.manual_seed(0)  # of the adapters that are drawn
    model = _Steps.from_pretrained(folder, lora=SPARSE, load_balance_coefficient=0.0)
    precision = options.pop("precision", "32-true")
    trainer = quiet(devices=4, strategy=TexMoEStrategy(**options), max_epochs=epochs, precision=precision)
    rows = DataLoader(Rows(token_ids(8)), batch_size=options["tensor_parallel_size"])
    trainer.fit(model, rows, ckpt_path=None if begun is None else out / f"{begun}.ckpt")
    trainer.save_checkpoint(out / f"{name}.ckpt")
    model.save_pretrained(out / name)


@pytest.fixture(scope="module")
def runs(sparse, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    spread = {"tensor_parallel_size": 1, "expert_parallel_size": 4, "save_distributed_checkpoint": False}
    half = {**TED, "sequence_parallel": True, "precision": "bf16-mixed"}
    together(4, {
        "two": (fit, sparse, out, "two", 1, None, TED),
        "four": (fit, sparse, out, "four", 2, None, TED),
        "resumed": (fit, sparse, out, "resumed", 2, "two", TED),
        "half": (fit, sparse, out, "half", 1, None, half),
        "spread": (fit, sparse, out, "spread", 2, "two", spread),
    })  # fmt: skip
    return out


def test_only_adapted_matrices_change(sparse, runs):
    before, after = tensors(sparse), tensors(runs / "two")
    assert before.keys() == after.keys()
    for name in before:
        trained = any(part in name for part in ("q_proj", "o_proj", ".experts."))
        assert torch.equal(before[name], after[name]) != trained, name


def test_a_base_of_sixteen_bits_is_kept_as_it_was_read(sparse, runs):
    before, after = tensors(sparse), tensors(runs / "half")
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"].bfloat16().float())
    assert not torch.equal(after["model.layers.0.self_attn.q_proj.weight"],
                           before["model.layers.0.self_attn.q_proj.weight"].bfloat16().float())  # fmt: skip


def test_a_resumed_run_is_the_same_to_the_bit_and_on_another_layout_within_rounding(runs):
    require_equal_tensors(runs / "four", runs / "resumed")
    four, spread = tensors(runs / "four"), tensors(runs / "spread")
    assert all(difference(spread[name], four[name]) < 1e-5 for name in four)


def test_checkpoints_hold_adapters_alone(sparse, runs):
    content = torch.load(runs / "spread.ckpt", weights_only=True)
    assert content["state_dict"] and all(".adapter" in name for name in content["state_dict"])
    assert len(content["optimizer_states"][0]["state"]) == len(content["state_dict"])
    model = LanguageModel.from_pretrained(sparse, lora=SPARSE)
    model.configure_model()
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = sum(file.stat().st_size for file in (runs / "two.ckpt").glob("*.safetensors*"))
    assert sum(t.numel() for t in content["state_dict"].values()) == adapters
    assert size < 4 * 4 * adapters


@pytest.mark.parametrize(("checkpoint", "folder"), [("four.ckpt", "four"), ("spread.ckpt", "spread")])
def test_a_checkpoint_of_adapters_is_exported_as_the_module_is(checkpoint, folder, runs, tmp_path):
    with pytest.warns(UserWarning, match="no tokenizer goes to"):
        export(runs / checkpoint, tmp_path / "out")
    exported, saved = tensors(tmp_path / "out"), tensors(runs / folder)
    assert exported.keys() == saved.keys()
    assert all(difference(exported[name], saved[name]) < 1e-6 for name in saved)


def test_other_adapters_or_another_base_are_refused(dense, sparse, runs, tmp_path):
    torch.manual_seed(0)
    for arguments, words in (
        ({"config": None, "pretrained": str(sparse)}, None),
        ({}, "pretrained=none, which is another one"),
        ({"lora": None}, r"lora.rank=2 \(the model's: None\)"),
        ({"lora": LoRAConfig(4, 3, targets=SPARSE.targets)}, r"lora.rank=2 \(the model's: 4\)"),
        ({"config": None, "pretrained": str(publish("qwen3-moe", tmp_path / "other", initializer_range=0.1))}, "other"),
    ):
        if words is None:
            with pytest.warns(UserWarning, match="not in the checkpoint"):  # Lightning's, of what the folder has
                model = load(runs / "spread.ckpt", **arguments)
            model.save_pretrained(tmp_path / "again")
            require_equal_tensors(tmp_path / "again", runs / "spread")
        else:
            with pytest.raises(UserValueError, match=words):
                load(runs / "spread.ckpt", **arguments)


def load(path: Path, **arguments: Any) -> LanguageModel:
    return LanguageModel.load_from_checkpoint(path, **arguments)


def test_an_export_without_its_base_is_refused(sparse, runs, tmp_path):
    content = torch.load(runs / "spread.ckpt", weights_only=True)
    content["lora"]["folder"] = str(tmp_path / "nowhere")
    torch.save(content, tmp_path / "moved.ckpt")
    with pytest.raises(UserValueError, match="not there any more"):
        export(tmp_path / "moved.ckpt", tmp_path / "out")
    content["lora"] = {**content["lora"], "folder": str(sparse), "fingerprint": "another"}
    torch.save(content, tmp_path / "changed.ckpt")
    with pytest.raises(UserValueError, match="have changed since"):
        export(tmp_path / "changed.ckpt", tmp_path / "out")


def test_without_a_published_model_checkpoints_hold_all_weights(tmp_path):
    config = DecoderConfig(61, 24, 2, 4, num_experts=4, hidden_dim=20)
    model = LanguageModel(config, lora=SPARSE)
    trainer = quiet(strategy="auto")
    trainer.predict(model, DataLoader(Rows(token_ids(4) % 61), batch_size=2))
    trainer.save_checkpoint(tmp_path / "all.ckpt")
    again = load(tmp_path / "all.ckpt")
    assert again.lora == SPARSE
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- any module


class _Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.plain = ParallelMLP(6, 8), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.plain(self.mlp(x))


def test_any_module_of_layers_takes_adapters_that_add_nothing_at_first():
    model, x = _Own(), torch.randn(3, 6)
    before = model(x)
    names = apply_lora(model, LoRAConfig(rank=2, dropout=0.5, targets=("mlp.*", "plain")))
    assert names == ["mlp.up", "mlp.down", "plain"]
    assert torch.equal(model(x), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{one.prefix}.{factor}" for one in adapted(model) for factor in ("a", "b")}
    nn.init.ones_(model.mlp.up.adapter.b)
    assert not torch.equal(model(x), model(x))  # dropout draws anew
    model.eval()
    assert torch.equal(model(x), model(x)) and not torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"targets": ("q_proj",)}, "'q_proj' is no matrix's name; legal are patterns of attention.query, "),
        ({"targets": ("experts.*",), "dropout": 0.1}, "legal: dropout=0, or targets without experts"),
        ({"rank": 0}, "lora.rank=0; legal: 1 and more"),
        ({"dropout": 1.0}, "lora.dropout=1.0"),
        ({"targets": ()}, "lora.targets is empty"),
    ],
)
def test_what_is_not_legal_is_refused_by_name(change, words, sparse):
    with pytest.raises(UserValueError, match=words):
        LanguageModel.from_pretrained(sparse, lora=LoRAConfig(**change)).configure_model()


def test_peft_has_no_form_for_experts(sparse, tmp_path):
    model = LanguageModel.from_pretrained(sparse, lora=SPARSE)
    model.configure_model()
    with pytest.raises(UserValueError, match=r"experts\.gate is no linear layer's weight"):
        model.save_adapters(tmp_path / "out")
