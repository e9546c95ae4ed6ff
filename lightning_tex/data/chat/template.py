"""Chat templates: messages to text, as the tokenizer's own Jinja template says, rendered in Jinja's sandbox."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lightning_tex.data.corpus import fingerprint
from lightning_tex.data.tokenizer import is_hub_name
from lightning_tex.parallel.errors import UserFileError, UserValueError

Message = Mapping[str, Any]

_BUILT_IN = {
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
}
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class _Generation(Extension):
    """``{% generation %}``: what the assistant says; between two marks where these are given, else as it stands."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, context: Any, caller: Any) -> str:
        start, end = context.get("generation_marks") or ("", "")
        return f"{start}{caller()}{end}"


class TemplateRaised(ValueError):
    """A template does not take some messages."""


class ChatTemplate:
    """A Jinja template of a tokenizer.

    Args:
        source: its text.
        tokens: special tokens that it names, such as ``eos_token``.
        options: further variables of it.

    Raises:
        ValueError: it is no template.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], options: Mapping[str, Any] | None = None) -> None:
        self.source, self.tokens, self.options = source, dict(tokens), dict(options or {})
        try:
            self._template  # noqa: B018
        except TemplateError as error:
            raise UserValueError(f"the chat template is no Jinja template: {error}") from error

    @property
    def fingerprint(self) -> str:
        """Changes with all that decides what is rendered, but for dates."""
        return fingerprint([self.source, json.dumps([self.tokens, self.options], sort_keys=True)])

    @property
    def marks_answers(self) -> bool:
        """Whether it says itself what the assistant's part is, by ``{% generation %}``."""
        return _GENERATION.search(self.source) is not None

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        marks: tuple[str, str] | None = None,
        **variables: Any,
    ) -> str:
        """The text of some messages.

        Args:
            messages: of a conversation.
            add_generation_prompt: end with what the assistant's answer begins after.
            marks: put around what the template says is the assistant's.
            variables: further ones, such as ``tools``.

        Raises:
            TemplateRaised: the template raises.
        """
        given = {**self.tokens, **self.options, **variables}
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                generation_marks=marks,
                **given,
            )
        except Exception as error:  # whatever its expressions come upon
            raise TemplateRaised(f"{type(error).__name__}: {error}") from error

    @cached_property
    def _template(self) -> Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise, strftime_now=_now)
        return environment.from_string(self.source)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_template"}


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


# --- where templates are


def chat_template(tokenizer: str | None, given: str | None, options: Mapping[str, Any] | None) -> ChatTemplate | None:
    """The one that is given, or the tokenizer's own; None: there is none.

    Args:
        tokenizer: file, folder or repository of the tokenizer.
        given: a file, or the name of one that is built in ("chatml"); None: the tokenizer's.
        options: further variables of it.

    Raises:
        FileNotFoundError: no such file, or the hub cannot be asked whether there is one.
        ValueError: a file that is none.
    """
    config = tokenizer_config(tokenizer)
    tokens = {name: text for name in _TOKENS if (text := _content(config.get(name))) is not None}
    if given is not None:
        source: str | None = given_template(given)
    else:
        file = _beside(tokenizer, "chat_template.jinja")
        source = _of_config(config) if file is None else file.read_text("utf-8")
    return None if source is None else ChatTemplate(source, tokens, options)


def tokenizer_config(tokenizer: str | None) -> dict[str, Any]:
    """What ``tokenizer_config.json`` beside a tokenizer says; empty: there is none."""
    file = _beside(tokenizer, "tokenizer_config.json")
    if file is None:
        return {}
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserValueError(f"{file} is no JSON: {error}") from error
    return dict(config)


def end_of_text(config: Mapping[str, Any]) -> str | None:
    """The token that ends a text, where a tokenizer's configuration names it."""
    return _content(config.get("eos_token"))


def _content(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None


def given_template(given: str) -> str:
    """The text of one that is built in, or of a file.

    Raises:
        FileNotFoundError: no such file.
    """
    if given in _BUILT_IN:
        return _BUILT_IN[given]
    file = Path(given).expanduser()
    if not file.is_file():
        raise UserFileError(f"chat_template={given!r} is no file; legal: one, or {', '.join(_BUILT_IN)}")
    return file.read_text("utf-8")


def _of_config(config: Mapping[str, Any]) -> str | None:
    templates = config.get("chat_template")
    if isinstance(templates, list):  # several by name
        by_name = {entry["name"]: entry["template"] for entry in templates}
        templates = by_name.get("default", next(iter(by_name.values()), None))
    return templates if isinstance(templates, str) else None


def _beside(tokenizer: str | None, name: str) -> Path | None:
    """A file of a tokenizer's folder or repository; None: it has no such file."""
    if tokenizer is None:
        return None
    if is_hub_name(tokenizer):
        return _of_hub(tokenizer, name)
    place = Path(tokenizer).expanduser()
    file = (place if place.is_dir() else place.parent) / name
    return file if file.is_file() else None


def only_cache(tokenizer: str | None) -> bool:
    """Whether what a repository lacks here may be on the hub, which is not to be asked."""
    from huggingface_hub import constants

    return tokenizer is not None and is_hub_name(tokenizer) and bool(constants.HF_HUB_OFFLINE)


def _of_hub(repository: str, name: str) -> Path | None:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, name))
    except Exception as error:  # the client has no common class for them
        unanswered = isinstance(error, LocalEntryNotFoundError)  # which is the other one, too
        if isinstance(error, EntryNotFoundError) and (only_cache(repository) or not unanswered):
            return None
        if unanswered and not isinstance(try_to_load_from_cache(repository, name), str | None):
            return None  # the client has been told before that there is none
        reason = str(error).strip().partition("\n")[0]
        raise UserFileError(
            f"whether tokenizer={repository!r} has a {name} cannot be found out: the Hugging Face hub does not give it "
            f"({type(error).__name__}: {reason}); legal: a way to the hub, a folder with the tokenizer's files, or "
            "HF_HUB_OFFLINE=1, and what has been fetched before is all"
        ) from error
