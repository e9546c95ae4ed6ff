"""Where answers are in a rendered conversation, for templates of every kind; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.chats import TEMPLATES, TURNS, chat

from lightning_tex.data.chat.answers import AnswerFinder, UnknownAnswer
from lightning_tex.data.chat.template import ChatTemplate, TemplateRaised
from lightning_tex.errors import UserValueError

TWO = chat("one?", "first", "two?", "second", system="be brief")
EXPECTED = {
    "chatml": ["first<|im_end|>", "second<|im_end|>"],
    "chatml that marks": ["first<|im_end|>", "second<|im_end|>"],
    "brackets": [" first </s>", " second </s>"],
    "thoughts": ["first<|im_end|>", "<think>\n\n</think>\n\nsecond<|im_end|>"],
    "a prompt of its own": ["first<|end|>", "second<|end|>"],
    "another last end": ["first<|end|>", "second<|return|>"],
}


def found(template: str, messages: Any, special: Any = TURNS, **variables: Any) -> list[str]:
    finder = AnswerFinder(ChatTemplate(template, {}), special)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    rendered = finder.find(messages, answers, variables)
    assert rendered.text == ChatTemplate(template, {}).render(messages, **variables)
    return [rendered.text[start:end] for start, end in rendered.answers]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_answers_are_what_the_model_has_to_say(kind: str) -> None:
    assert found(TEMPLATES[kind], TWO) == EXPECTED[kind]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_an_answer_that_stands_in_the_question_as_well(kind: str) -> None:
    messages = chat("say yes", "yes", "yes?", "yes")
    assert [text.count("yes") for text in found(TEMPLATES[kind], messages)] == [1, 1]


def test_thoughts_of_earlier_answers_are_not_learnt_where_they_are_not_shown() -> None:
    messages = chat("one?", "<think>\nhm\n</think>\n\nfirst", "two?", "<think>\nwell\n</think>\n\nsecond")
    assert found(TEMPLATES["thoughts"], messages) == [
        "first<|im_end|>",
        "<think>\nwell\n</think>\n\nsecond<|im_end|>",
    ]


def test_white_space_around_an_answer() -> None:
    messages = chat("one?", "\n first \n", "two?", " second ")
    assert found(TEMPLATES["brackets"], messages) == EXPECTED["brackets"]
    assert found(TEMPLATES["chatml"], messages) == ["\n first \n<|im_end|>", " second <|im_end|>"]


def test_a_tokenizer_without_special_tokens() -> None:
    assert found(TEMPLATES["chatml"], TWO, special=()) == ["first<|im_end|>\n", "second<|im_end|>\n"]


def test_contents_in_parts_and_calls_of_tools() -> None:
    template = (
        "{{ tools | tojson if tools else '' }}{% for m in messages %}<|{{ m.role }}|>"
        "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content or [] %}{{ part.text }}"
        "{% endfor %}{% endif %}{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "what "}, {"type": "text", "text": "is it?"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "look", "arguments": {"at": "ü"}}]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": [{"type": "text", "text": "three"}]},
    ]
    assert found(template, messages, tools=[{"name": "look"}]) == [
        '{"name": "look", "arguments": {"at": "ü"}}<|end|>',
        "three<|end|>",
    ]


def test_a_conversation_that_the_assistant_begins() -> None:
    messages = [{"role": "assistant", "content": "hello"}, *chat("one?", "first")]
    assert found(TEMPLATES["chatml"], messages) == ["hello<|im_end|>", "first<|im_end|>"]


@pytest.mark.parametrize(
    "template",
    [
        # Says in front how many messages follow, and in upper case what they are.
        "{{ messages | length }}{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages | reverse %}{{ m.content }};{% endfor %}",
        "{% generation %}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "{% endgeneration %}",
    ],
    ids=["changed", "backwards", "nested"],
)
@pytest.mark.parametrize("messages", [TWO, chat("one?", "first")], ids=["two", "one"])
def test_what_cannot_be_told_is_refused(template: str, messages: Any) -> None:
    with pytest.raises(UnknownAnswer):
        found(template, messages)


def test_a_template_that_raises() -> None:
    with pytest.raises(TemplateRaised, match="TemplateError: only two turns"):
        found("{{ raise_exception('only two turns') }}", TWO)


@pytest.mark.parametrize(
    "attack",
    ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ raise_exception.__globals__['os'] }}"],
)
def test_a_template_is_rendered_in_a_sandbox(attack: str) -> None:
    with pytest.raises(TemplateRaised, match="SecurityError"):
        ChatTemplate(attack, {}).render(TWO)


def test_a_template_that_is_none() -> None:
    with pytest.raises(UserValueError, match="the chat template is no Jinja template"):
        ChatTemplate("{% for %}", {})


def test_against_transformers() -> None:
    """The text is what transformers gives for the same template, tokens and options."""
    pytest.importorskip("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    for template in TEMPLATES.values():
        theirs, _ = render_jinja_template([TWO], chat_template=template, eos_token="</s>", thinking=False)
        assert [ChatTemplate(template, {"eos_token": "</s>"}, {"thinking": False}).render(TWO)] == theirs
