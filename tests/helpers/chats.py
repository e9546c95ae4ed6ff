"""Conversations, tokenizers for them, and chat templates of the kinds that published models have."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_tex.data.tokenizer import train_bpe

TURNS = ("<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|end|>", "<|return|>", "<|user|>", "<|assistant|>")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "chatml that marks": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # The system message is part of the first question; contents are trimmed; no prompt for an answer.
    "brackets": (
        "<s>{% for m in messages %}{% if m.role == 'system' %}{% set system = m.content %}"
        "{% elif m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
        "{% else %} {{ m.content | trim }} </s>{% endif %}{% endfor %}"
    ),
    # Earlier answers are shown without their thoughts, the last one always with some.
    "thoughts": (
        "{% set last = messages | map(attribute='role') | list %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}"
        "{% set content = m.content.split('</think>')[-1].lstrip('\n') %}"
        "{% if loop.last %}<think>\n{{ m.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in "
        "m.content else '' }}\n</think>\n\n{{ content }}{% else %}{{ content }}{% endif %}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # A prompt that begins the answer, which the whole does not have.
    "a prompt of its own": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
    ),
    # The last turn ends otherwise.
    "another last end": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% if loop.last and m.role == 'assistant' %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
}


def chat(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """Question, answer, question, .."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return [*([{"role": "system", "content": system}] if system else []), *turns]


def write_tokenizer(folder: Path, template: str | None = CHATML, vocab_size: int = 320, **config: Any) -> Path:
    """A folder as transformers writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    train_bpe(["the token of an expert, and what it says"] * 9, vocab_size, TURNS).save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "bos_token": "<s>", **config}
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_lines(file: Path, rows: Iterable[Any]) -> Path:
    """JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def sums(count: int) -> list[dict[str, Any]]:
    """Rows of conversations of different lengths."""
    return [
        {
            "messages": chat(
                *(
                    f"say {'ab' * (i % 5 + turn)}" if turn % 2 == 0 else "ab" * (i % 3 + 1)
                    for turn in range(2 + 2 * (i % 2))
                )
            )
        }
        for i in range(count)
    ]
