"""Parts of a recipe are made, and what their classes refuse is told in their own words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jsonargparse import Namespace
from lightning import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser

from lightning_tex.parallel.errors import UserError, and_what_led_to_it


@contextmanager
def own_words() -> Iterator[None]:
    """What the user can put right is raised alone, out of jsonargparse's list of all that a value is not."""
    try:
        yield
    except ValueError as error:
        cause = next((told for told in and_what_led_to_it(error) if isinstance(told, UserError)), None)
        if cause is None:
            raise
        raise cause from None


def data_alone(config: Namespace, kind: Any = LightningDataModule) -> Any:
    """The data of a recipe, without its model."""
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(kind, "data", subclass_mode=True)
    with own_words():
        return parser.instantiate_classes(Namespace(data=config.data)).data
