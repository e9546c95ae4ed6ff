"""For mkdocstrings: references of docstrings, such as :class:`Axis`, as Markdown code."""

import re
from typing import Any

import griffe


class Roles(griffe.Extension):
    """Rewrites the docstring of every object that is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r":\w+:`~?([\w.]+)`", r"`\1`", obj.docstring.value)
