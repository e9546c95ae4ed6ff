"""Where the choices of every MoE layer fell over a training, in a bounded number of columns."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# C columns, E experts


class ExpertHistory:
    """Choices by layer and expert, a column for every logged step; when all columns are taken, neighbours become one.

    Args:
        columns: at most; even.
    """

    def __init__(self, columns: int = 128) -> None:
        self.columns = columns
        self.steps: list[int] = []
        self._choices: dict[str, list[Tensor]] = {}
        self._logs_in_column = 1
        self._logs_in_last = 0

    @property
    def layers(self) -> list[str]:
        """Labels of the layers, in the model's order."""
        return list(self._choices)

    def add(self, step: int, choices: dict[str, Tensor]) -> None:
        """Add what fell on each expert since the last logged step.

        Args:
            step: optimizer steps taken.
            choices: of each expert by layer. [E] each
        """
        if choices.keys() != self._choices.keys():
            self.steps, self._choices = [], {label: [] for label in choices}
            self._logs_in_column, self._logs_in_last = 1, 0
        if self.steps and self._logs_in_last < self._logs_in_column:
            self.steps[-1] = step
            for label, of_experts in choices.items():
                self._choices[label][-1] = self._choices[label][-1] + of_experts.float().cpu()
            self._logs_in_last += 1
            return
        if len(self.steps) == self.columns:
            self._halve()
        self.steps.append(step)
        for label, of_experts in choices.items():
            self._choices[label].append(of_experts.float().cpu())
        self._logs_in_last = 1

    def choices(self, layer: str) -> Tensor:
        """What fell on each expert of a layer. [C, E]"""
        return torch.stack(self._choices[layer])

    def loads(self, layer: str) -> Tensor:
        """The same, relative to the mean over experts: 1 where all are used alike. [C, E]"""
        choices = self.choices(layer)
        return choices / choices.mean(-1, keepdim=True).clamp(min=torch.finfo(choices.dtype).tiny)

    def write(self, path: Path) -> None:
        """Write a CSV file of a row for each column and layer: the last step of the column, then choices by expert."""
        most = max((len(of_layer[0]) for of_layer in self._choices.values()), default=0)
        with path.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["step", "layer", *range(most)])
            for column, step in enumerate(self.steps):
                for layer, of_layer in self._choices.items():
                    rows.writerow([step, layer, *(int(count) for count in of_layer[column].tolist())])

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes."""
        return {
            "steps": list(self.steps),
            "choices": {label: torch.stack(of_layer) for label, of_layer in self._choices.items()},
            "logs_in_column": self._logs_in_column,
            "logs_in_last": self._logs_in_last,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved history."""
        self.steps = list(state["steps"])
        self._choices = {label: list(of_layer.unbind()) for label, of_layer in state["choices"].items()}
        self._logs_in_column, self._logs_in_last = state["logs_in_column"], state["logs_in_last"]

    def _halve(self) -> None:
        self.steps = self.steps[1::2]
        for label, of_layer in self._choices.items():
            self._choices[label] = [first + second for first, second in zip(of_layer[::2], of_layer[1::2], strict=True)]
        self._logs_in_column *= 2
