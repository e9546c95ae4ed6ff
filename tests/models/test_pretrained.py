"""A run that begins from a published model: what goes before what, what ranks agree on, and what is written of it."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.published_folders import VOCABULARY, Rows, publish, require_equal_tensors, tensors, token_ids
from helpers.ranks import on_ranks, together
from helpers.trainers import quiet
from torch.utils.data import DataLoader

from lightning_tex import LanguageModel, TexMoEStrategy, TextDataModule
from lightning_tex.cli.plan_recipe import read_recipe
from lightning_tex.data.tokenizer import train_bpe
from lightning_tex.models import DecoderConfig
from lightning_tex.models.exporting import export, shard_bytes
from lightning_tex.parallel.errors import UserError, UserValueError
from lightning_tex.pretrained import tensor_file
from lightning_tex.saving import load_from_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return publish("mixtral", tmp_path_factory.mktemp("published") / "mixtral")


class _Plain(LanguageModel):
    """With an argument of its own, and plain descent."""

    def __init__(self, rate: float = 0.1, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.rate = rate

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def rows() -> DataLoader:
    return DataLoader(Rows(token_ids(4)), batch_size=2)


def fit(model: LanguageModel, steps: int = 1, ckpt_path: Any = None, devices: int = 2, **options: Any) -> Any:
    precision = options.pop("precision", "32-true")
    strategy = TexMoEStrategy(**options)
    trainer = quiet(devices=devices, strategy=strategy, max_steps=steps, precision=precision)
    trainer.fit(model, rows(), ckpt_path=ckpt_path)
    return trainer


def test_what_a_run_goes_on_from_goes_before_what_it_would_begin_with(folder, tmp_path):
    on_ranks(2, _goes_before, folder, tmp_path)
    begun, again, chosen = (tensors(tmp_path / name) for name in ("begun", "again", "chosen"))
    assert not torch.equal(begun["model.norm.weight"], tensors(folder)["model.norm.weight"])
    for name, value in begun.items():
        assert torch.equal(value, again[name]) and torch.equal(value, chosen[name]), name


def _goes_before(folder: Path, tmp_path: Path) -> None:
    model = _Plain.from_pretrained(folder, rate=0.3)
    assert model.rate == 0.3
    trainer = fit(model, 1, tensor_parallel_size=2)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    model.save_pretrained(tmp_path / "begun")
    resumed = _Plain.from_pretrained(folder)
    fit(resumed, 1, tmp_path / "one.ckpt", tensor_parallel_size=1)  # no step is left
    resumed.save_pretrained(tmp_path / "again")
    other = _Plain.from_pretrained(folder, rate=0.0)
    fit(other, 1, tensor_parallel_size=2, init_from=tmp_path / "one.ckpt")
    other.save_pretrained(tmp_path / "chosen")


def test_sixteen_bits_keep_all_digits_in_masters_which_an_export_writes(folder, tmp_path):
    runs = {kind: (_in_sixteen_bits, folder, tmp_path / kind, kind) for kind in ("fp32", "split")}
    together(2, runs)
    for kind in runs:
        with pytest.warns(UserWarning, match="no tokenizer goes to"):
            report = export(tmp_path / kind / "run.ckpt", tmp_path / kind / "out", dtype="float32")
        assert report["family"] == "mixtral" and report["dtype"] == "float32"
        require_equal_tensors(folder, tmp_path / kind / "out")
        with pytest.warns(UserWarning, match="no tokenizer goes to"):
            export(tmp_path / kind / "run.ckpt", tmp_path / kind / "short", dtype="bfloat16")
        for name, value in tensors(tmp_path / kind / "short").items():
            assert torch.equal(value, tensors(folder)[name].to(torch.bfloat16)), name


def _in_sixteen_bits(folder: Path, out: Path, kind: str) -> None:
    model = _Plain.from_pretrained(folder, rate=0.0)
    trainer = fit(model, 1, precision="bf16-mixed", optimizer_state_format=kind, tensor_parallel_size=2)
    trainer.save_checkpoint(out / "run.ckpt")


@pytest.mark.parametrize("distributed", [True, False], ids=["directory", "plain file"])
def test_a_checkpoint_of_either_form_is_exported_without_its_folder(distributed, folder, tmp_path):
    here = Path(shutil.copytree(folder, tmp_path / "here"))
    on_ranks(2, _saved, here, tmp_path / "run.ckpt", distributed)
    shutil.rmtree(here)
    with pytest.warns(UserWarning, match="no tokenizer goes to"):
        export(tmp_path / "run.ckpt", tmp_path / "out", max_shard_size="60KB")
    require_equal_tensors(folder, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 2
    model = load_from_checkpoint(LanguageModel, tmp_path / "run.ckpt")
    model.save_pretrained(tmp_path / "again")
    require_equal_tensors(folder, tmp_path / "again")


def _saved(folder: Path, path: Path, distributed: bool) -> None:
    model = LanguageModel.from_pretrained(folder)
    strategy = TexMoEStrategy(save_distributed_checkpoint=distributed)
    trainer = quiet(devices=2, strategy=strategy)
    trainer.validate(model, rows(), verbose=False)
    trainer.save_checkpoint(path)


def test_ranks_that_begin_with_different_weights_are_told(folder, tmp_path):
    other = publish("mixtral", tmp_path / "mixtral", initializer_range=0.1)
    for message in on_ranks(2, _different, folder, other):
        assert "the pretrained weights" in message and "different models" in message


def _different(first: Path, second: Path) -> str:
    try:
        fit(LanguageModel.from_pretrained(second if os.environ["LOCAL_RANK"] == "1" else first))
    except UserError as error:
        return str(error)
    return "trained"


def test_a_rank_that_cannot_write_leaves_nothing_anywhere(folder, tmp_path):
    messages = on_ranks(2, _cannot_write, folder, tmp_path / "out")
    assert messages == [f"{tmp_path / 'out'} cannot be written: rank 1: OSError: no room"] * 2
    assert list(tmp_path.iterdir()) == []


def _cannot_write(folder: Path, out: Path) -> str:
    model = LanguageModel.from_pretrained(folder)
    trainer = quiet(devices=2, strategy=TexMoEStrategy(tensor_parallel_size=2))
    trainer.validate(model, rows(), verbose=False)
    if trainer.global_rank:

        def refuse(*_: Any) -> None:
            raise OSError("no room")

        tensor_file.TensorFiles.write = refuse
    try:
        model.save_pretrained(out)
    except UserError as error:
        return str(error)
    return "written"


def test_nothing_is_written_over(folder, tmp_path):
    model = LanguageModel.from_pretrained(folder)
    model.configure_model()
    (tmp_path / "out").mkdir()
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(FileExistsError, match="out exists; nothing is written over it"):
        model.save_pretrained(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_options_that_are_not_legal_are_refused_by_name(folder, tmp_path):
    model = LanguageModel.from_pretrained(folder)
    model.configure_model()
    for act, told in (
        (lambda: LanguageModel(), "legal: one of them"),
        (lambda: LanguageModel(DecoderConfig(), pretrained=str(folder)), "legal: one of them"),
        (lambda: LanguageModel(pretrained=str(folder), overrides={"width": 3}), "overrides of width; legal: vocab"),
        (lambda: LanguageModel.from_pretrained(folder, dim=64, head_dim=8), "has shape .*, by .* it is"),
        (lambda: model.save_pretrained(tmp_path / "o", dtype="int8"), "dtype='int8'; legal: float32, bfloat16"),
        (lambda: model.save_pretrained(tmp_path / "o", max_shard_size="much"), "max_shard_size='much'; legal: bytes"),
        (lambda: model.save_pretrained(tmp_path / "o", tokenizer=tmp_path), "is no tokenizer's file"),
    ):  # fmt: skip
        with pytest.raises(UserValueError, match=told):
            act()
    assert list(tmp_path.iterdir()) == []
    assert shard_bytes("2 gb") == 2 * 10**9 and shard_bytes(7) == 7


def test_a_decoder_that_no_family_has_is_refused_with_the_reasons(tmp_path):
    sizes = {"vocab_size": VOCABULARY, "dim": 16, "num_layers": 2, "num_heads": 2, "activation": "gelu"}
    model = LanguageModel(DecoderConfig(**sizes))
    model.configure_model()
    with pytest.raises(UserValueError, match=r"no known family has .*llama has no decoder with activation='gelu'"):
        model.save_pretrained(tmp_path / "out")


def test_a_model_of_ours_is_written_as_the_first_family_that_has_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": VOCABULARY, "dim": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 24}
    for experts, expected in ((1, "LlamaForCausalLM"), (4, "MixtralForCausalLM")):
        routed = {"num_experts": 4, "top_k": 2, "moe_every": 1, "norm_topk_prob": True} if experts > 1 else {}
        model = LanguageModel(DecoderConfig(**sizes, **routed))
        model.configure_model()
        model.save_pretrained(tmp_path / expected)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / expected)
        assert type(loaded).__name__ == expected
        ids = token_ids(2)
        with torch.no_grad():
            assert torch.allclose(loaded(ids).logits, model(ids), rtol=1e-5, atol=1e-5)


def test_a_repository_is_taken_from_the_hubs_cache_by_its_revision(folder, tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    place, commit = tmp_path / "models--owner--tiny", "0" * 40
    shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    for revision in (None, "main", commit):
        model = LanguageModel.from_pretrained("owner/tiny", revision=revision)
        assert model.config.num_experts == 4 and model.origin.name == "owner/tiny" and model.origin.is_repository
    assert not LanguageModel.from_pretrained(folder).origin.is_repository
    with pytest.raises(UserError, match="gives nothing of that name and revision v2"):
        LanguageModel.from_pretrained("owner/tiny", revision="v2")


def test_a_plan_reads_the_configuration_and_no_weights(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of calls that Lightning makes
    place = Path(shutil.copytree(folder, tmp_path / "here"))
    for file in place.glob("*.safetensors"):
        file.unlink()
    recipe = tmp_path / "recipe.yaml"
    options = {"pretrained": str(place), "overrides": {"capacity_factor": 1.5}}
    model = {"class_path": "lightning_tex.LanguageModel", "init_args": options}
    data = {"class_path": "lightning_tex.TextDataModule", "init_args": {"vocab_size": 300}}
    recipe.write_text(json.dumps({"trainer": {"devices": 2}, "model": model, "data": data}))
    planned = read_recipe(str(recipe), sizes={"top_k": 1})
    assert planned.model.config == DecoderConfig(
        **asdict(LanguageModel.from_pretrained(folder, capacity_factor=1.5, top_k=1).config)
    )


# --- tokenizers


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text"
    path.mkdir()
    for number in range(8):
        (path / f"{number}.txt").write_text(f"document {number} of some words, " * 40)
    return path


def with_tokenizer(folder: Path, here: Path, words: str) -> Path:
    shutil.copytree(folder, here)
    train_bpe([words], 280).save(str(here / "tokenizer.json"))
    (here / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return here


def test_data_of_another_vocabulary_is_refused_and_the_models_own_goes_along(text, tmp_path):
    large = publish("mixtral", tmp_path / "large", vocab_size=300)
    own, other = (with_tokenizer(large, tmp_path / name, name * 50) for name in ("some words, ", "quite others; "))
    small = publish("mixtral", tmp_path / "small")
    options = {"path": str(text), "sequence_length": 16, "global_batch_size": 2, "cache_dir": str(tmp_path / "cache")}

    class WithoutCallbacks(LanguageModel):
        def configure_callbacks(self):
            return []

    def tried(model: Path, tokenizer: Path, kind: type[LanguageModel] = LanguageModel) -> str:
        data = TextDataModule(tokenizer=str(tokenizer), **options)
        trainer, module = quiet(devices=1, max_steps=1, limit_val_batches=0), kind.from_pretrained(model)
        try:
            trainer.fit(module, datamodule=data)
        except UserValueError as error:
            return str(error)
        module.save_pretrained(tmp_path / "out")
        return "trained"

    assert re.search(r"the data's tokenizer has \d+ tokens, and the model 101; legal:", tried(small, own))
    assert "the data's tokenizer is not that of" in (told := tried(own, other)) and f"tokenizer='{own}'" in told
    assert tried(own, other, WithoutCallbacks) == told
    assert tried(own, own) == "trained"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (own / "tokenizer.json").read_bytes()
    transformers = pytest.importorskip("transformers")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").encode("some words") is not None


def test_the_tokenizer_of_the_data_goes_along_with_a_model_of_ours(text, tmp_path):
    transformers = pytest.importorskip("transformers")
    data = TextDataModule(
        path=str(text), vocab_size=300, sequence_length=16, global_batch_size=2, cache_dir=str(tmp_path / "cache")
    )
    config = DecoderConfig(vocab_size=300, dim=16, num_layers=1, num_heads=2)
    trainer, module = quiet(devices=1, max_steps=1, limit_val_batches=0), LanguageModel(config)
    trainer.fit(module, datamodule=data)
    module.save_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.encode("document 7 of words") == data.encode("document 7 of words")
    assert tokenizer.eos_token_id == data.end_of_document_id
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == data.end_of_document_id
