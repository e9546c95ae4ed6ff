"""Folders that are damaged or do not fit are refused by name before anything is read, and nothing is written."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.published_folders import Rows, changed_config, publish, tensors, token_ids
from helpers.ranks import on_ranks
from helpers.trainers import quiet
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from lightning_tex import LanguageModel, TexMoEStrategy
from lightning_tex.data.tokenizer import train_bpe
from lightning_tex.parallel.errors import UserError
from lightning_tex.pretrained.folder import INDEX
from lightning_tex.pretrained.tensor_file import read_table


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return publish("mixtral", tmp_path_factory.mktemp("published") / "mixtral")


@pytest.fixture
def folder(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "mixtral"))


def shard(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def rewritten(path: Path, change) -> None:
    content = load_file(path)
    change(content)
    save_file(content, path, {"format": "pt"})


NORM = "model.norm.weight"


def missing_shard(folder):
    shard(folder, NORM).unlink()


def truncated(folder):
    file = shard(folder, NORM)
    file.write_bytes(file.read_bytes()[:-8])


def longer(folder):
    file = shard(folder, NORM)
    file.write_bytes(file.read_bytes() + b"12345678")


def empty_file(folder):
    shard(folder, NORM).write_bytes(b"")


def table_of_nothing(folder):
    shard(folder, NORM).write_bytes((5).to_bytes(8, "little") + b"[1,2]")


def surplus(folder):
    rewritten(shard(folder, NORM), lambda content: content.update(extra=torch.zeros(3)))
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["extra"] = shard(folder, NORM).name
    (folder / INDEX).write_text(json.dumps(index))


def unknown_to_the_index(folder):
    rewritten(shard(folder, NORM), lambda content: content.update(extra=torch.zeros(3)))


def missing_tensor(folder):
    file = shard(folder, NORM)
    rewritten(file, lambda content: content.pop(NORM))


def twice(folder):
    other = next(f for f in sorted(folder.glob("*.safetensors")) if f != shard(folder, NORM))
    rewritten(other, lambda content: content.update({NORM: torch.zeros(48)}))


def other_shape(folder):
    rewritten(shard(folder, NORM), lambda content: content.update({NORM: torch.zeros(47)}))


def other_family(folder):
    changed_config(folder, lambda config: config.update(model_type="llama"))


def unknown_family(folder):
    changed_config(folder, lambda config: config.update(model_type="bert"))


def other_sizes(folder):
    changed_config(folder, lambda config: config.update(hidden_size=64, head_dim=8))


def other_experts(folder):
    changed_config(folder, lambda config: config.update(num_local_experts=3))


def window(folder):
    changed_config(folder, lambda config: config.update(hidden_act="gelu"))


def no_size(folder):
    changed_config(folder, lambda config: config.pop("hidden_size"))


def pickled(folder):
    for file in (*folder.glob("*.safetensors"), folder / INDEX):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb()))


def quantised(folder):
    rewritten(shard(folder, NORM), lambda content: content.update({NORM: torch.zeros(48, dtype=torch.float8_e4m3fn)}))


def outside(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][NORM] = "../other.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def no_config(folder):
    (folder / "config.json").unlink()


def config_of_nothing(folder):
    (folder / "config.json").write_text("{")


class _Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


WRONG = {
    missing_shard: r"model-\d{5}-of-\d{5}.safetensors is missing",
    truncated: r"model-\S+ is damaged: its table needs \d+ bytes, the file has \d+",
    longer: r"model-\S+ is damaged: its table needs \d+ bytes, the file has \d+",
    empty_file: r"model-\S+ is cut short or no safetensors file: 0 bytes",
    table_of_nothing: r"model-\S+ has a damaged table of tensors",
    surplus: r"extra of shape \[3\] is no part of the model",
    unknown_to_the_index: r"model-\S+ has extra, which model.safetensors.index.json does not know",
    missing_tensor: r"model.norm.weight is not in model-\S+, where model.safetensors.index.json says it is",
    twice: r"model.norm.weight is in model-\S+ and in model-\S+",
    other_shape: r"model.norm.weight has shape \[47\], by mixtral/config.json and the options it is \[48\]",
    other_family: r"model.layers.0.mlp.gate_proj.weight is missing; .* and \d+ more",
    unknown_family: r"config.json is of model_type='bert'; known families: llama, .*mixtral",
    other_sizes: r"model.embed_tokens.weight has shape \[101, 48\], .* it is \[101, 64\]",
    other_experts: r"model.layers.0.block_sparse_moe.experts.3.w1.weight of shape \[36, 48\] is no part of the model",
    window: r"mixtral with hidden_act='gelu' is not expressed here; legal: 'silu'",
    no_size: r"a config.json of mixtral needs hidden_size",
    pickled: r"has its weights in pytorch_model.bin: a pickle, .*; legal: model.safetensors",
    quantised: r"1 tensors are quantised, such as model.norm.weight \(float8_e4m3fn\)",
    outside: r"index.json names no safetensors files of its folder",
    no_config: r"there is no \S+/config.json",
    config_of_nothing: r"config.json is no JSON file",
}


@pytest.mark.parametrize("spoil", WRONG, ids=lambda spoil: spoil.__name__)
def test_a_wrong_folder_is_refused_by_name(spoil, folder):
    spoil(folder)
    with pytest.raises(UserError, match=WRONG[spoil]):
        LanguageModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "spoil", [pytest.param(spoil, marks=[] if spoil is pickled else pytest.mark.full) for spoil in WRONG],
    ids=lambda spoil: spoil.__name__,
)  # fmt: skip
def test_the_command_line_tells_it_in_one_line_and_writes_nothing(spoil, folder, fit_in):
    spoil(folder)
    told = fit_in(folder.parent, "--model.init_args.pretrained", str(folder), "--data.tokenizer", "null")
    assert re.search(WRONG[spoil], told)


def test_a_vocabulary_that_is_not_the_models_is_refused_before_anything_is_written(tmp_path, fit_in):
    (tmp_path / "text.txt").write_text("some words of a text, " * 400)
    for name in ("own", "other"):
        train_bpe([f"{name} words, " * 50], 280).save(str(tmp_path / f"{name}.json"))
    for size, tokenizer, strategy, told in (
        (101, "other.json", "auto", r"the data's tokenizer has 290 tokens, and the model 101; legal: data.tokenizer="),
        (300, "other.json", "tex_moe", r"the data's tokenizer is not that of \S*model: \d+ tokens differ"),
        (300, "null", "auto", r"the data trains a tokenizer of its own \(tokenizer=None\), and the model has that of"),
    ):
        publish("mixtral", tmp_path / "model", vocab_size=size)
        shutil.copy(tmp_path / "own.json", tmp_path / "model" / "tokenizer.json")
        data = ["--data.path", "text.txt", "--data.tokenizer", tokenizer, "--data.cache_dir", "cache"]
        words = ["--trainer.devices", "1", "--model.init_args.pretrained", "model", "--data.vocab_size", "290", *data]
        assert re.search(told, fit_in(tmp_path, "--trainer.strategy", strategy, *words))


def test_no_folder_a_revision_of_one_and_a_repository_that_is_not_there(folder, tmp_path):
    for name, revision, told in (
        (tmp_path / "nothing", None, "is no folder here, and no repository's name, owner/name"),
        (folder, "main", "revision='main' is of a repository, and .* is a folder"),
        ("owner/name", "v1", "the Hugging Face hub gives nothing of that name and revision v1"),
    ):
        with pytest.raises(UserError, match=told):
            LanguageModel.from_pretrained(name, revision=revision)


def test_a_table_with_gaps_overlaps_or_wrong_sizes_is_damage(tmp_path):
    for entries in (
        {name: {"dtype": "F32", "shape": [1], "data_offsets": [at, at + 4]} for name, at in (("a", 0), ("b", 2))},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
        {"a": {"dtype": "X", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"shape": [2], "data_offsets": [0, 8]}},
    ):  # fmt: skip
        text = json.dumps(entries).encode()
        (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
        with pytest.raises(UserError, match=r"x\.safetensors"):
            read_table(tmp_path / "x.safetensors")


def test_all_ranks_refuse_a_file_that_is_cut_short_after_it_was_checked(folder, tmp_path):
    messages = on_ranks(2, _cut_between, folder, tmp_path)
    assert all("been cut short" in message or "another rank" in message for message in messages)
    assert any("been cut short while lm_head.weight was read" in message for message in messages)
    assert not (tmp_path / "run").exists()


def _cut_between(folder: Path, tmp_path: Path) -> str:
    model = _Cut.from_pretrained(folder)
    trainer = quiet(devices=2, strategy=TexMoEStrategy(), default_root_dir=tmp_path / "run", max_steps=1)
    try:
        trainer.fit(model, DataLoader(Rows(token_ids(2)), batch_size=1))
    except Exception as error:
        return str(error)
    return "trained"


class _Cut(LanguageModel):
    """Whose folder is damaged after it was checked and before it is read."""

    def configure_model(self):
        super().configure_model()
        stored = self.pretrained.folder.tensors["lm_head.weight"]
        with stored.file.open("r+b") as file:
            file.truncate(stored.start + 4)


def test_a_tied_head_that_is_there_again_must_be_the_embedding(tmp_path):
    folder = publish("llama, tied head", tmp_path / "llama", shard="1GB")
    file = folder / "model.safetensors"
    rewritten(file, lambda content: content.update({"lm_head.weight": content["model.embed_tokens.weight"].clone()}))
    LanguageModel.from_pretrained(folder).configure_model()
    rewritten(file, lambda content: content["lm_head.weight"][3].neg_())
    model = LanguageModel.from_pretrained(folder)
    with pytest.raises(UserError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        model.configure_model()


def test_stacked_experts_are_read_as_well(original, folder):
    """As transformers holds them, and early versions of its fifth wrote them."""
    content, layers = tensors(folder), range(3)
    fused = {name: value for name, value in content.items() if "block_sparse_moe" not in name}
    for layer in layers:
        prefix = f"model.layers.{layer}"
        each = [
            [content[f"{prefix}.block_sparse_moe.experts.{e}.{name}.weight"] for e in range(4)]
            for name in ("w1", "w3", "w2")
        ]
        gate, up, down = map(torch.stack, each)
        fused[f"{prefix}.mlp.experts.gate_up_proj"] = torch.cat([gate, up], 1)
        fused[f"{prefix}.mlp.experts.down_proj"] = down
        fused[f"{prefix}.mlp.gate.weight"] = content[f"{prefix}.block_sparse_moe.gate.weight"]
    for file in (*folder.glob("*.safetensors"), folder / INDEX):
        file.unlink()
    save_file({name: value.contiguous() for name, value in fused.items()}, folder / "model.safetensors")
    ours, theirs = (LanguageModel.from_pretrained(place) for place in (folder, original))
    for model in (ours, theirs):
        model.configure_model()
    for (name, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(one, other), name
