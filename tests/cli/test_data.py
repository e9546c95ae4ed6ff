"""``lightning-tex data show`` and ``lightning-tex prepare``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import tiny_recipe
from helpers.chats import chat, write_lines, write_tokenizer

from lightning_tex import cli
from lightning_tex.cli.data import documents_of
from lightning_tex.errors import UserValueError

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


@pytest.fixture
def text_recipe(tmp_path: Path) -> Path:
    return tiny_recipe.write_recipe(tmp_path)


@pytest.fixture
def chat_recipe(tmp_path: Path, text_recipe: Path) -> Path:
    write_tokenizer(tmp_path / "tokenizer")
    write_lines(tmp_path / "chats.jsonl", [{"messages": chat(f"one {i}?", f"first\x1b[31m {i}")} for i in range(12)])
    recipe = yaml.safe_load(text_recipe.read_text())
    data = {"path": str(tmp_path / "chats.jsonl"), "tokenizer": str(tmp_path / "tokenizer"), "num_proc": 1}
    data |= {"sequence_length": 80, "global_batch_size": 2, "cache_dir": str(tmp_path / "cache")}
    recipe["data"] = {"class_path": "lightning_tex.FineTuningDataModule", "init_args": data}
    path = tmp_path / "chat.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def told(capsys: Any, *words: str) -> list[str]:
    cli.main(list(words))
    return capsys.readouterr().out.splitlines()


def test_conversations_are_shown_as_the_model_sees_them(chat_recipe: Path, capsys: Any) -> None:
    lines = told(capsys, "data", "show", "--config", str(chat_recipe), "--rows", "1")
    assert max(map(len, lines)) <= 80 and "\x1b" not in "".join(lines)
    assert lines[0] == "FineTuningDataModule, the first train batch: 2 rows of 80 positions"
    text = "\n".join(lines)
    assert re.search(r"train: 11 of 11 conversations, \d+ tokens, \d\d\.\d % of them", text)
    facts = re.search(r"row 0 \(sample \d\): (\d) documents, (\d+) tokens learnt, (\d+) of padding", text)
    assert facts and int(facts[1]) == text.count("\ndocument ") > 1
    assert re.search(r"document 0 -+\n<\|im_start\|>user\none \d+\?<\|im_end\|>\n<\|im_start\|>assistant\n«first", text)
    assert text.count("«first\\x1b[31m") == text.count("<|im_end|>»") == int(facts[1])


def test_text_is_shown_with_its_documents(text_recipe: Path, capsys: Any) -> None:
    masked = ["--config", str(text_recipe), "--data.document_mask", "true"]
    lines = told(capsys, "data", "show", "--split", "validation", "--rows", "4", *masked)
    assert lines[0] == "TextDataModule, the first validation batch: 4 rows of 32 positions"
    assert any("document 1 ---" in line for line in lines)


def test_colours_are_for_terminals(chat_recipe: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    coloured = "\n".join(told(capsys, "data", "show", "--config", str(chat_recipe)))
    assert "\x1b[1;32mfirst" in coloured and "«" not in coloured
    assert "\x1b" not in "".join(told(capsys, "data", "show", "--config", str(chat_recipe), "--no-color"))


def test_what_is_learnt_of_a_row() -> None:
    batch = {
        "input_ids": torch.tensor([[1, 2, 3, 4, 5, 0]]),
        "labels": torch.tensor([[-100, 3, 9, 5, -100, -100]]),
        "segments": torch.tensor([[0, 0, 0, 1, 1, 1]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]]),
    }
    assert documents_of(batch, 0) == [[(False, [1, 2]), (True, [3, 9])], [(False, [4]), (True, [5])]]
    del batch["attention_mask"], batch["segments"]
    assert documents_of(batch, 0) == [[(False, [1, 2]), (True, [3]), (False, [4]), (True, [5]), (False, [0])]]


def test_a_recipe_without_data_is_refused(text_recipe: Path) -> None:
    recipe = yaml.safe_load(text_recipe.read_text())
    text_recipe.write_text(yaml.safe_dump({**recipe, "data": None}))
    for words in (["data", "show"], ["prepare"]):
        with pytest.raises(SystemExit) as ended:
            cli.main([*words, "--config", str(text_recipe)])
        assert ended.value.code == 2


def test_what_data_refuses_is_one_line(chat_recipe: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "show", "--config", str(chat_recipe), "--data.tokenizer", "nowhere"])
    said = str(ended.value.code) if not isinstance(ended.value.code, int) else capsys.readouterr().err
    assert said.strip().startswith("error: tokenizer='nowhere' is n") and "Union" not in said


def test_data_is_prepared_once(text_recipe: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["prepare", "--config", str(text_recipe), "--json", "--num_proc", "2"]
    lines = told(capsys, *words)
    assert re.match(r"train: 19 documents, [\d,]+ tokens, \d+ blocks of 32$", lines[0])
    report = json.loads(lines[-1])
    monkeypatch.setattr("lightning_tex.data.tokens.writing.build_together", lambda *_: pytest.fail("written again"))
    again = json.loads(told(capsys, *words)[-1])
    assert again["fingerprint"] == report["fingerprint"] and again["parts"] == report["parts"]


def test_data_of_other_modules_is_no_data_of_ours(text_recipe: Path) -> None:
    from lightning_tex.cli.prepare import data_of

    recipe = yaml.safe_load(text_recipe.read_text())
    recipe["data"] = {"class_path": "lightning.pytorch.demos.boring_classes.BoringDataModule"}
    text_recipe.write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserValueError, match="has a BoringDataModule; legal: a TextDataModule"):
        data_of(str(text_recipe), [])
