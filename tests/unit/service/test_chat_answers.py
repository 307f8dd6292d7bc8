"""Answers while they are generated: stop texts, characters of several tokens, and tool calls."""

import random
from typing import Any

import pytest

from service.answers import Answer, Sampled
from service.engine import Delta, Sampling
from service.prompts import ChatFormat
from tests.support.tiny_model import CHAT_TEMPLATE, make_tokenizer

HERMES = CHAT_TEMPLATE.replace(
    "message['content'] +",
    "(message['content'] or '') + (message.tool_calls | default([]) | map(attribute='function') | map('tojson') "
    "| map('replace', '{\"name\"', '<tool_call>\\n{\"name\"') | join('\\n') ~ ('\\n</tool_call>' if message.tool_calls else '')) +",
).replace("{% for", "{% if tools %}{{ tools | tojson }}{% endif %}{% for", 1)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def make_format(tokenizer: Any, template: str = CHAT_TEMPLATE) -> ChatFormat:
    tokenizer.chat_template = template
    return ChatFormat(tokenizer, variables={}, context=512, model="tiny")


def generate(
    form: ChatFormat,
    text: str,
    *,
    may_call: bool = False,
    max_tokens: int = 500,
    ends: bool = True,
    **sampling: Any,
) -> list[Delta]:
    """Return the deltas of an answer whose tokens spell a text."""
    tokens = form.tokenizer.encode(text, add_special_tokens=False)
    end = form.tokenizer.eos_token_id
    answer = Answer(
        0,
        form,
        Sampling(**sampling),
        stop_tokens=frozenset({end}),
        max_tokens=max_tokens,
        may_call=may_call,
    )
    deltas = []
    for token in [*tokens, *([end] if ends else [])]:
        if (delta := answer.push(Sampled(token, -0.5 if "top_logprobs" in sampling else None))) is not None:
            deltas.append(delta)
        if answer.is_finished:
            break
    return deltas


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_text_arrives_token_by_token_and_in_complete_characters(tokenizer: Any):
    text = "Ada has 3 apples. 😀 wörld €"
    deltas = generate(make_format(tokenizer), text)
    assert text_of(deltas) == text
    assert len(deltas) > 8
    assert not any("\ufffd" in delta.text for delta in deltas)
    assert (deltas[-1].finish_reason, deltas[-1].completion_tokens) == (
        "stop",
        len(tokenizer.encode(text, add_special_tokens=False)) + 1,
    )


def test_max_tokens_within_a_character_ends_as_a_complete_decoding(tokenizer: Any):
    form = make_format(tokenizer)
    tokens = tokenizer.encode("ab 😀", add_special_tokens=False)
    deltas = generate(form, "ab 😀", max_tokens=len(tokens) - 1)
    assert text_of(deltas) == tokenizer.decode(tokens[:-1])
    assert deltas[-1].finish_reason == "length"


def test_no_part_of_a_stop_text_is_emitted(tokenizer: Any):
    """Every prefix of the stop text, wherever token borders are, is held until it cannot become the stop text."""
    form = make_format(tokenizer)
    generator = random.Random(5)
    for _ in range(200):
        text = "".join(generator.choice("ab#") for _ in range(30))
        stop = "".join(generator.choice("ab#") for _ in range(generator.randint(1, 4)))
        deltas = generate(form, text, stop=(stop, "##ab##"))
        places = [place for part in (stop, "##ab##") if (place := text.find(part)) >= 0]
        expected = text[: min(places)] if places else text
        assert text_of(deltas) == expected
        emitted = ""
        for delta in deltas:
            emitted += delta.text
            assert expected.startswith(emitted)
        assert deltas[-1].finish_reason == "stop"


def test_text_that_cannot_become_a_stop_text_is_not_held(tokenizer: Any):
    form = make_format(tokenizer)
    deltas = generate(form, "one two three", stop=("\n\n",))
    assert len(deltas) >= 3


def test_special_tokens_are_not_shown(tokenizer: Any):
    assert text_of(generate(make_format(tokenizer), "a<|endoftext|>b")) == "ab"


def test_logprobs_cover_the_emitted_text_and_nothing_else(tokenizer: Any):
    deltas = generate(make_format(tokenizer), "one two### three", stop=("###",), top_logprobs=0)
    entries = [entry for delta in deltas for entry in delta.logprobs]
    assert b"".join(bytes(entry.bytes) for entry in entries).startswith(b"one two")
    assert "three" not in "".join(entry.token for entry in entries)
    deltas = generate(make_format(tokenizer), "😀 end", top_logprobs=0)
    raw = b"".join(bytes(entry.bytes) for delta in deltas for entry in delta.logprobs)
    assert raw.decode() == "😀 end"


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        (CALL, "", ["weather"]),
        (f"Let me look.\n{CALL}", "Let me look.", ["weather"]),
        (f"{CALL}\n{CALL}", "", ["weather", "weather"]),
        ("3 < 4 <tool", "3 < 4 <tool", []),
        ("<tool_call>\nnot JSON", "<tool_call>\nnot JSON", []),
        ('<tool_call>\n{"nam": 1}', '<tool_call>\n{"nam": 1}', []),
    ],
)
def test_calls_are_parsed_out_of_the_text(tokenizer: Any, text: str, content: str, names: list[str]):
    deltas = generate(make_format(tokenizer, HERMES), text, may_call=True)
    calls = [call for delta in deltas for call in delta.tool_calls]
    assert text_of(deltas) == content
    assert [call.name for call in calls] == names
    assert all(call.arguments == '{"city": "Köln"}' for call in calls)
    assert deltas[-1].finish_reason == ("tool_calls" if names else "stop")
    if names:
        assert not any("tool_call" in delta.text for delta in deltas)


def test_call_that_max_tokens_cuts_off_is_text(tokenizer: Any):
    deltas = generate(make_format(tokenizer, HERMES), CALL, may_call=True, max_tokens=20)
    assert text_of(deltas).startswith("<tool_call>")
    assert deltas[-1].finish_reason == "length"
    assert not deltas[-1].tool_calls


def test_calls_of_a_request_without_tools_are_text(tokenizer: Any):
    assert text_of(generate(make_format(tokenizer, HERMES), CALL)) == CALL
