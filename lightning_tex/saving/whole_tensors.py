"""The tensors of a plain checkpoint as a source to read extents from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_tex.saving.global_tensor import GlobalTensor
from lightning_tex.saving.model_state import MODEL, OPTIMIZER, TensorPath, require_same_shape


class WholeTensors:
    """Whole tensors in host memory, perhaps mapped; a :class:`lightning_tex.saving.model_state.Source`."""

    def __init__(self, tensors: Mapping[TensorPath, Tensor]) -> None:
        self.saved = tensors

    @classmethod
    def of_model(cls, state_dict: Mapping[str, Any]) -> WholeTensors:
        """The weights of a ``state_dict``."""
        return cls({(MODEL, name): value for name, value in state_dict.items() if isinstance(value, Tensor)})

    @classmethod
    def of_optimizer(cls, states: Mapping[str, Mapping[str, Any]]) -> WholeTensors:
        """Optimizer states by parameter name and key."""
        return cls(
            {
                (OPTIMIZER, "state", name, key): torch.as_tensor(value)
                for name, values in states.items()
                for key, value in values.items()
                if value is not None
            }
        )

    def fill(self, request: Mapping[TensorPath, GlobalTensor]) -> None:
        """Copy the parts of each requested tensor into their place, on this rank alone.

        Raises:
            ValueError: a tensor has another shape.
        """
        for path, wanted in request.items():
            whole = self.saved[path]
            require_same_shape(path, whole, wanted)
            for part in wanted.parts:
                part.read().copy_(whole[part.extent.slices])


def tensor_bytes(content: Any) -> int:
    """Bytes of all tensors in nested dicts and lists, which are nearly all of a file."""
    if isinstance(content, Tensor):
        return content.nbytes
    parts = content.values() if isinstance(content, Mapping) else content if isinstance(content, list) else ()
    return sum(map(tensor_bytes, parts))
