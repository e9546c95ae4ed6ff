"""A folder of pretrained weights: what is in it, checked by its tables before any element is read. No pickle, ever."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import torch
import xxhash

from lightning_tex.parallel.errors import UserFileError, UserValueError
from lightning_tex.pretrained.quantised import multiplied_out
from lightning_tex.pretrained.tensor_file import SUFFIX, Readable, StoredTensor, read_table

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
ONE_FILE = f"model{SUFFIX}"
INDEX = f"model{SUFFIX}.index.json"
# What belongs to a tokenizer, and goes where the weights go.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_QUANTISED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.int8)
# Of each file's beginning, middle and end, for the fingerprint.
_SAMPLE_BYTES = 65536


class PretrainedFolder:
    """A folder with ``config.json`` and safetensors files.

    Args:
        path: the folder.

    Raises:
        FileNotFoundError: there is no such folder, or no configuration in it.
        ValueError: its configuration is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / CONFIG)

    @cached_property
    def tensors(self) -> dict[str, Readable]:
        """All tensors, by name; those that are quantised are read multiplied out.

        Raises:
            FileNotFoundError: a file that the index names is missing, or there are no safetensors files.
            ValueError: a file is damaged, the index and the files say different things, what is stored is quantised in
                a way that is not known, or scales are missing or do not fit.
        """
        tensors, problems = multiplied_out(self.stored, self.config)
        quantised = [tensor for tensor in tensors.values() if tensor.dtype in _QUANTISED]
        if quantised and not problems:
            first = quantised[0]
            problems.append(
                f"{len(quantised)} tensors are quantised, such as {first.name} ({str(first.dtype)[6:]}), in a way "
                "that config.json does not tell; legal: weights in float32, float16 or bfloat16, or a "
                "quantization_config of fp8 in blocks or mxfp4"
            )
        self._refuse(problems)
        return tensors

    @cached_property
    def stored(self) -> dict[str, StoredTensor]:
        """All that is in the files, by name; every file's table is read and checked. Errors as of :attr:`tensors`."""
        files, promised = self._files()
        tables, problems = {}, []
        for file in files:
            try:
                tables[file] = read_table(file)
            except UserFileError:
                problems.append(f"{file.name} is missing")
            except UserValueError as error:
                problems.append(str(error))
        found: dict[str, StoredTensor] = {}
        for table in tables.values():
            for tensor in table:
                if tensor.name in found:
                    problems.append(f"{tensor.name} is in {found[tensor.name].file.name} and in {tensor.file.name}")
                found[tensor.name] = tensor
        if promised is not None and not problems:
            problems += _against_index(promised, found)
        self._refuse(problems)
        return found

    @property
    def fingerprint(self) -> str:
        """Tells this folder's weights from others: its configuration, the files' tables, and samples of their bytes."""
        hasher = xxhash.xxh3_128(json.dumps(self.config, sort_keys=True).encode())
        for path in sorted({tensor.file for tensor in self.stored.values()}):
            size = path.stat().st_size
            hasher.update(f"{path.name} {size}".encode())
            with path.open("rb", buffering=0) as file:
                for place in (0, size // 2, max(0, size - _SAMPLE_BYTES)):
                    file.seek(place)
                    hasher.update(file.read(_SAMPLE_BYTES))
        return hasher.hexdigest()

    def _files(self) -> tuple[list[Path], dict[str, str] | None]:
        """The files, and by the index's word which tensor is in which."""
        index = self.path / INDEX
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            plain = isinstance(weight_map, dict) and all(
                isinstance(name, str) and PurePath(name).name == name and name.endswith(SUFFIX)
                for name in weight_map.values()
            )
            if not plain or not weight_map:
                raise UserValueError(f"{index} names no safetensors files of its folder in weight_map")
            return [self.path / name for name in sorted(set(weight_map.values()))], weight_map
        if (self.path / ONE_FILE).is_file():
            return [self.path / ONE_FILE], None
        pickles = sorted(file.name for pattern in _PICKLES for file in self.path.glob(pattern))
        if pickles:
            raise UserValueError(
                f"{self.path} has its weights in {pickles[0]}: a pickle, which runs code when it is read, and is "
                f"never opened here; legal: {ONE_FILE}, or several files with {INDEX}"
            )
        others = sorted(file.name for file in self.path.glob(f"*{SUFFIX}"))
        there = f"; there is {', '.join(others[:4])}, but no index that says what belongs together" if others else ""
        raise UserFileError(f"{self.path} has neither {ONE_FILE} nor {INDEX}{there}")

    def _refuse(self, problems: Sequence[str]) -> None:
        if problems:
            raise UserValueError(f"the pretrained weights in {self.path} are refused: {listed(problems)}")


def _against_index(promised: Mapping[str, str], found: Mapping[str, StoredTensor]) -> list[str]:
    problems = [
        f"{name} is not in {file}, where {INDEX} says it is"
        for name, file in promised.items()
        if name not in found or found[name].file.name != file
    ]
    return problems + [f"{tensor.file.name} has {name}, which {INDEX} does not know"
                       for name, tensor in found.items() if name not in promised]  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file with an object at its top.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserFileError(f"there is no {path}") from None
    except (ValueError, RecursionError) as error:
        raise UserValueError(f"{path} is no JSON file: {error}") from error
    if not isinstance(content, dict):
        raise UserValueError(f"{path} is no JSON object")
    return content


def listed(problems: Sequence[str], most: int = 8) -> str:
    """The first of some problems, and how many there are besides."""
    return "; ".join(problems[:most]) + (f"; and {len(problems) - most} more" if len(problems) > most else "")
