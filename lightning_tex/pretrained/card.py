"""The model card of a folder that is written here: what the model is, where it began, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("lightning-tex", "torch", "lightning")


def model_card(title: str, architecture: str, began: str | None, repository: bool, facts: Mapping[str, str]) -> bytes:
    """``README.md``.

    Args:
        title: the model's name.
        architecture: its class in transformers.
        began: the folder or repository whose weights it began with; ``None``: it was trained from random ones.
        repository: whether that is a repository of the hub.
        facts: what else is known of it, by name.
    """
    tags = ["lightning-tex", *(["mixture-of-experts"] if facts.get("experts") else [])]
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation", f"tags: [{', '.join(tags)}]"]
    head += [f"base_model: {began}"] if repository else []
    rows = {"architecture": f"`{architecture}`", **facts}
    rows["began with"] = f"the weights of `{began}`" if began else "random weights"
    rows["written by"] = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    body = [
        *head,
        "---",
        "",
        f"# {title}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {text} |" for name, text in rows.items()),
        "",
        "```python",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
        "```",
        "",
    ]
    return "\n".join(body).encode()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from its sources
        return "unknown"
