"""Errors that you can put right, for your ``except``."""

from lightning_tex.parallel.errors import (
    UserError,
    UserFileError,
    UserIndexError,
    UserRuntimeError,
    UserTypeError,
    UserValueError,
)

__all__ = ["UserError", "UserFileError", "UserIndexError", "UserRuntimeError", "UserTypeError", "UserValueError"]
