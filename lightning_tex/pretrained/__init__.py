"""Folders of weights as Hugging Face's libraries write and read them: files, and rules that tie them to parameters."""

from lightning_tex.pretrained.folder import PretrainedFolder
from lightning_tex.pretrained.rules import Either, Rule

__all__ = ["Either", "PretrainedFolder", "Rule"]
