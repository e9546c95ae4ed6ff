"""What was counted, as one object of plain values and as tables in files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_tex.inspection.counting import UsageCounter
from lightning_tex.inspection.measures import spread, told, typical
from lightning_tex.inspection.usage import LayerUsage

_TOKENS = 20  # of each expert


@dataclass(frozen=True)
class UsageReport:
    """Of one pass.

    Args:
        counter: what was counted.
        checkpoint: of which model.
        decode: the text of some tokens; ``None``: there is none.
    """

    counter: UsageCounter
    checkpoint: str
    decode: Callable[[list[int]], str] | None = None

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        origins, layers = self.counter.origins, self.counter.layers
        read = [
            n for n in range(len(origins.documents)) if any(usage.by_document[n].any() for usage in layers.values())
        ]
        documents = [origins.documents[n] for n in read]
        return {
            "checkpoint": self.checkpoint,
            "tokens": self.counter.tokens,
            "sources": origins.sources,
            "documents": [{"source": origins.sources[one.source], "name": one.name} for one in documents],
            "layers": [self._layer(label, usage, usage.by_document[read]) for label, usage in layers.items()],
        }

    def write(self, folder: Path, plain: dict[str, Any]) -> None:
        """Write ``expert_usage.json``, and ``expert_tokens.csv``, the tokens of every expert, into a folder.

        Args:
            plain: what :meth:`plain` gave.
        """
        (folder / "expert_usage.json").write_text(json.dumps(plain, indent=1))
        with (folder / "expert_tokens.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["layer", "expert", "kind", "token", "text", "choices", "share_of_token"])
            for layer in plain["layers"]:
                for number, expert in enumerate(layer["experts"]):
                    for kind in ("typical", "frequent"):
                        for token in expert[kind]:
                            rows.writerow([layer["layer"], number, kind, *token.values()])

    def _layer(self, label: str, usage: LayerUsage, by_document: Tensor) -> dict[str, Any]:
        loads, total = spread(usage.choices), int(usage.choices.sum())
        return {
            "layer": label,
            "num_experts": usage.experts,
            "top_k": self.counter.top_k[label],
            "choices": usage.choices.tolist(),
            "load_max": loads.largest,
            "load_min": loads.smallest,
            "load_cv": loads.variation,
            "dead": loads.dead,
            "told_by_token": told(usage.by_token) if len(usage.by_token) else None,
            "told_by_source": told(usage.by_source) if len(usage.by_source) > 1 else None,
            "told_by_document": told(by_document) if len(by_document) > 1 else None,
            "by_source": usage.by_source.tolist(),
            "by_document": by_document.tolist(),
            "together": usage.together.tolist(),
            "paths": usage.paths.tolist(),
            "experts": [self._expert(usage, expert, total) for expert in range(usage.experts)],
        }

    def _expert(self, usage: LayerUsage, expert: int, total: int) -> dict[str, Any]:
        frequent: list[int] = []
        if len(usage.by_token):
            of_expert = usage.by_token[:, expert]
            frequent = [t for t in of_expert.topk(min(_TOKENS, len(of_expert))).indices.tolist() if of_expert[t] > 0]
        best = typical(usage.by_token, expert, _TOKENS) if len(usage.by_token) else []
        return {
            "share": int(usage.choices[expert]) / max(total, 1),
            "typical": [self._token(usage, expert, token) for token in best],
            "frequent": [self._token(usage, expert, token) for token in frequent],
        }

    def _token(self, usage: LayerUsage, expert: int, token: int) -> dict[str, Any]:
        choices = usage.by_token[token]
        text = str(token) if self.decode is None else self.decode([token])
        return {
            "token": token,
            "text": text,
            "choices": int(choices[expert]),
            "share_of_token": int(choices[expert]) / max(int(choices.sum()), 1),
        }
