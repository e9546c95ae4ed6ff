"""What `lightning-tex experts` counts and draws: as a plain loop counts, and alike on every layout."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from helpers.ranks import on_ranks
from helpers.trainers import quiet
from torch import Tensor

from lightning_tex import LanguageModel
from lightning_tex.cli import main
from lightning_tex.inspection import LayerUsage, Origins, UsageCounter
from lightning_tex.inspection.measures import lift, spread, told, typical
from lightning_tex.models import DecoderConfig
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.recipe import Recipe
from lightning_tex.saving import load_from_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:Be aware that when using")

CODE = ("def", "return", "self", "import", "class", "none", "if", "else", "for")
WORDS = {"code": CODE, "prose": ("the", "of", "a", "and", "to", "in", "is", "it")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of two sources, and a checkpoint of its model."""
    root = tmp_path_factory.mktemp("inspected")
    for name, words in WORDS.items():
        (root / name).mkdir()
        for i in range(12):
            text = " ".join(words[(i * 7 + j * j + j // 3) % len(words)] for j in range(260))
            (root / name / f"{i:02d}.txt").write_text(f"{name} {i} {text}\n")
    sizes = {"dim": 16, "num_layers": 4, "num_heads": 2, "max_sequence_length": 32, "num_experts": 4, "top_k": 2}
    sources = {name: {"path": str(root / name), "validation_fraction": 0.3} for name in WORDS}
    data = {"sources": sources, "vocab_size": 280, "sequence_length": 32, "global_batch_size": 4, "num_proc": 1}
    recipe = {
        "trainer": {"accelerator": "cpu", "devices": 4},
        "model": {"class_path": "lightning_tex.LanguageModel", "init_args": {"config": sizes}},
        "data": {
            "class_path": "lightning_tex.MixtureDataModule",
            "init_args": {**data, "cache_dir": str(root / "cache")},
        },
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    torch.manual_seed(0)
    model = LanguageModel(DecoderConfig(**sizes, vocab_size=280))
    model.configure_model()
    for _, layer in model.decoder.moe_layers():
        layer.router.weight.data *= 4
        layer.router.weight.data[3] = 0  # the least of four, of most tokens
    state = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    torch.save({**state, "pytorch-lightning_version": "2.6.0"}, root / "model.ckpt")
    return root


def inspect(folder: Path, output: Path, *words: str) -> str:
    """Run the command; what it says in place of an ending."""
    recipe = ["--config", str(folder / "recipe.yaml"), "--output", str(output)]
    told = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(told):
        main(["experts", str(folder / "model.ckpt"), *recipe, *words])
    return told.getvalue()


def inspected(folder: Path, output: Path, *words: str, ranks: int = 1) -> dict[str, Any]:
    on_ranks(ranks, inspect, folder, output, *words)
    found: dict[str, Any] = json.loads((output / "expert_usage.json").read_text())
    return found


@pytest.fixture(scope="module")
def usage(folder: Path) -> dict[str, Any]:
    return inspected(folder, folder / "one")


@torch.no_grad()
def test_counts_are_those_of_a_plain_loop(folder: Path, usage: dict[str, Any]) -> None:
    model = load_from_checkpoint(LanguageModel, folder / "model.ckpt").eval()
    data = Recipe(str(folder / "recipe.yaml")).datamodule()
    data.setup()
    seen: dict[str, Tensor] = {}

    def see(block: int, _: Any, __: Any, route: Any) -> None:
        seen[str(block)] = route.indices

    for block, layer in model.decoder.moe_layers():
        layer.router.register_forward_hook(partial(see, block))
    by_source: dict[str, Counter[Any]] = {"1": Counter(), "3": Counter()}
    by_token, together, tokens, paths = Counter[Any](), Counter[Any](), 0, Counter[Any]()
    for batch in data.val_dataloader():
        model(batch["input_ids"])
        real = (batch["sample"] >= 0)[:, None].expand_as(batch["input_ids"]).flatten().tolist()
        tokens += sum(real)
        for t, (token, counts) in enumerate(zip(batch["input_ids"].flatten().tolist(), real, strict=True)):
            if not counts:
                continue
            first, last = (seen[block][t].tolist() for block in ("1", "3"))
            for expert in first:
                by_source["1"][batch["source"], expert] += 1
                paths.update((expert, after) for after in last)
            for expert in last:
                by_source["3"][batch["source"], expert] += 1
                by_token[token, expert] += 1
                together.update((expert, other) for other in last)
    assert usage["tokens"] == tokens and usage["sources"] == list(WORDS)
    for layer in usage["layers"]:
        counted = by_source[layer["layer"]]
        assert layer["by_source"] == [[counted[name, e] for e in range(4)] for name in WORDS]
        assert sum(layer["choices"]) == 2 * tokens
    last = usage["layers"][1]
    assert last["together"] == [[together[a, b] for b in range(4)] for a in range(4)]
    assert last["paths"] == [[paths[a, b] for b in range(4)] for a in range(4)] and not usage["layers"][0]["paths"]
    for number, expert in enumerate(last["experts"]):
        assert expert["share"] == pytest.approx(last["choices"][number] / (2 * tokens))
        for one in (*expert["frequent"], *expert["typical"]):
            whole = sum(by_token[one["token"], e] for e in range(4))
            assert one["choices"] == by_token[one["token"], number]
            assert one["share_of_token"] == pytest.approx(one["choices"] / whole)
            assert one["text"] == data.decode([one["token"]])
    documents = [document["name"] for document in usage["documents"]]
    assert {name.split()[0] for name in documents} == set(WORDS) and len(documents) == 8
    in_documents = torch.tensor(last["by_document"])
    assert torch.all(in_documents.sum(1) >= 2 * 128) and torch.all(in_documents.sum(0) <= torch.tensor(last["choices"]))
    of_source = [document["source"] for document in usage["documents"]]
    assert [name.split()[0] for name in documents] == of_source


def test_pictures_and_tables_are_there(folder: Path, usage: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    names = {path.name for path in (folder / "one").glob("*.png")}
    tokens = {"tokens-1.png", "tokens-3.png"}
    assert names == {"load.png", "sources.png", "documents.png", "together.png", "paths.png", *tokens}
    assert all((folder / "one" / name).read_bytes().startswith(b"\x89PNG") for name in names)
    with (folder / "one" / "expert_tokens.csv").open() as file:
        rows = list(csv.DictReader(file))
    best = usage["layers"][0]["experts"][0]["typical"][0]
    assert rows[0] == {
        "layer": "1", "expert": "0", "kind": "typical", "token": str(best["token"]), "text": best["text"],
        "choices": str(best["choices"]), "share_of_token": str(best["share_of_token"]),
    }  # fmt: skip


LAYOUTS = {
    "sequence": ("tensor_parallel_size 2", "sequence_parallel true"),
    "expert": ("expert_parallel_size 2",),
}


@pytest.mark.full
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_counts_alike(name: str, folder: Path, usage: dict[str, Any], tmp_path: Path) -> None:
    words = ["--trainer.devices", "2", "--trainer.strategy", "lightning_tex.TexMoEStrategy"]
    for option in LAYOUTS[name]:
        key, value = option.split()
        words += [f"--trainer.strategy.init_args.{key}", value]
    assert inspected(folder, tmp_path, *words, ranks=2) == usage


@pytest.mark.full
def test_training_data_and_fewer_batches(folder: Path, tmp_path: Path) -> None:
    found = inspected(folder, tmp_path, "--part", "train", "--max_batches", "3")
    assert found["tokens"] == 3 * 4 * 32 and sum(map(sum, found["layers"][0]["by_source"])) == 2 * found["tokens"]


def test_those_that_nobody_chose_are_removed(folder: Path, usage: dict[str, Any], tmp_path: Path) -> None:
    dead = json.loads(json.dumps(usage))
    for layer, experts in zip(dead["layers"], ([0, 2], [3]), strict=True):
        for expert in experts:
            layer["choices"][expert] = 0
    (tmp_path / "usage.json").write_text(json.dumps(dead))
    old, new = str(folder / "model.ckpt"), str(tmp_path / "fewer")
    main(["experts", old, new, "--remove_dead", str(tmp_path / "usage.json")])
    before, after = (load_from_checkpoint(LanguageModel, path) for path in (old, new))
    for block, kept in ((1, [1, 2, 3]), (3, [0, 1, 2])):
        up_before, up_after = (model.decoder.blocks[block].mlp.experts.up for model in (before, after))
        assert torch.equal(up_after, up_before[kept])
    with pytest.raises(SystemExit):
        main(["experts", old, f"{new}er", "--remove_dead", str(folder / "recipe.yaml")])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--config is needed"),
        (["out", "--split", "2", "--add", "1"], "--split and --add to do"),
        (["out", "--add", "1", "--granular"], "--granular with --add; legal: with --split"),
        (["out", "--remove", "1:2", "3"], "--remove 1:2 3; legal"),
    ],
)
def test_what_is_not_legal_is_told(
    words: list[str], told: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["experts", str(folder / "model.ckpt"), *words])
    assert told in capsys.readouterr().err


def test_tables_of_many_tokens_are_those_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(6, (500, 2), generator=generator)  # 5: none
    indices[indices[:, 0] == indices[:, 1], 1] = 5
    ids, sources, documents = (torch.randint(n, (500,), generator=generator) for n in (7, 2, 4))
    usage = LayerUsage(5, 7, 2, 3, 0, torch.device("cpu"))
    for part in (slice(0, 200), slice(200, 500)):
        usage.add(indices[part], ids[part], sources[part], documents[part], None)
    tables = {"by_token": (ids, usage.by_token), "by_source": (sources, usage.by_source)}
    for name, (of, table) in {**tables, "by_document": (documents, usage.by_document)}.items():
        counted = Counter(
            (int(row), e) for row, chosen in zip(of, indices.tolist(), strict=True) for e in chosen if e < 5
        )
        assert table.tolist() == [[counted[row, e] for e in range(5)] for row in range(len(table))], name


def test_measures() -> None:
    even = torch.tensor([[2, 2], [4, 4]])
    apart = torch.tensor([[3, 0], [0, 5]])
    assert told(even) == pytest.approx(0, abs=1e-12) and told(apart) == pytest.approx(1)
    assert torch.equal(lift(even), torch.ones(2, 2, dtype=torch.float64))
    assert lift(apart)[0, 0] == pytest.approx(8 / 3)
    assert typical(torch.tensor([[9, 1], [1, 1], [1, 9]]), 0, 5) == [0]
    measured = spread(torch.tensor([0, 2, 4]))
    assert measured.largest == 2 and measured.smallest == 0 and measured.dead == [0]
    assert measured.variation == pytest.approx((2 / 3) ** 0.5)


def test_data_that_is_streamed_is_one_source_without_documents() -> None:
    data = SimpleNamespace(prepared=SimpleNamespace(train=object()))
    origins, ids = Origins(data, "train", 5), torch.zeros(2, 3, dtype=torch.long)
    assert origins.sources == ["train"] and not origins.documents
    sources, documents = origins.of({"sample": torch.tensor([7, -1])}, ids)
    assert not sources.any() and not documents.any()


def test_a_model_without_experts_is_refused() -> None:
    counter = UsageCounter(Origins(None, "validation", 0), 61)
    with pytest.raises(UserValueError, match="LanguageModel has no MoE layer"):
        counter.on_validation_start(quiet(), LanguageModel(DecoderConfig()))


@pytest.mark.full
def test_a_published_folder_is_passed_through(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text((folder / "recipe.yaml").read_text())
    sizes = {"dim": 16, "num_layers": 2, "num_heads": 2, "max_sequence_length": 32, "num_experts": 4, "top_k": 2}
    model = LanguageModel(DecoderConfig(**sizes, vocab_size=280, moe_every=1, norm_topk_prob=True))
    model.configure_model()
    model.save_pretrained(tmp_path / "model.ckpt")
    found = inspected(tmp_path, tmp_path / "out", "--max_batches", "2")
    assert [layer["layer"] for layer in found["layers"]] == ["0", "1"]
    assert sum(found["layers"][1]["choices"]) == 2 * found["tokens"] == 2 * 2 * 4 * 32
