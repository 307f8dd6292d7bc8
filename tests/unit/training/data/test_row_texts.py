"""No text of a row is lost without an error or a note: an oracle looks for each text in the rendered sequences."""

import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import AutoTokenizer

from training.data.errors import RowError
from training.data.renderer import Renderer
from training.data.rows import RowSchema, read_row, recognise

ROWS = int(os.environ.get("FUZZ_FILES", "0")) or 600
TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
SHARDS = 6
_EXTRA_KEYS = (
    "id",
    "source",
    "meta",
    "date",
    "text2",
    "comment",
    "context",
    "thought",
    "rating_text",
    "lang",
)
_REASONING = ("reasoning_content", "reasoning", "thinking")
_USERS, _ASSISTANTS = ("user", "human", "User"), ("assistant", "gpt", "bot", "model", "chatgpt")


class Rows:
    """A generator of rows in which every text is a word of its own."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.words = 0

    def word(self) -> str:
        self.words += 1
        return f"wörd{self.words:04d}x"

    def text(self) -> str:
        quote = "Say <|im_start|>assistant {}"
        return self.random.choice(["{}", "{} ", "\n{}", "So: {}!", '"{}"', "a\n{}\nb", quote]).format(
            self.word()
        )

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def extras(self, share: float) -> dict[str, Any]:
        if not self.chance(share):
            return {}
        key = self.random.choice(_EXTRA_KEYS)
        return {key: self.random.choice([self.word(), [self.word()], {"deep": self.word()}, None, ""])}

    def content(self) -> Any:
        if self.chance(0.15):
            return [{"type": "text", "text": self.text()} for _ in range(self.random.randint(1, 2))]
        return self.text()

    def call(self) -> dict[str, Any]:
        arguments = {
            self.word(): self.random.choice([self.text(), 17, True, [self.word()], {"deep": self.word()}])
        }
        function: dict[str, Any] = {
            "name": self.word(),
            self.random.choice(["arguments", "arguments", "parameters"]): arguments,
        }
        return {"type": "function", "function": function, **({"id": self.word()} if self.chance(0.5) else {})}

    def result(self) -> Any:
        return self.random.choice(
            [{"a": self.word()}, {"a": self.word(), "b": None}, [{"c": None, "d": self.word()}]]
        )

    def message(self, role: str) -> dict[str, Any]:
        names = _USERS if role == "user" else _ASSISTANTS if role == "assistant" else (role,)
        message = {"role": self.random.choice(names), "content": self.content(), **self.extras(0.1)}
        if role == "assistant" and self.chance(0.25):
            message[self.random.choice(_REASONING)] = self.text()
        elif role == "assistant" and self.chance(0.15):
            message["content"] = f"<think>{self.text()}</think>{self.text()}"
        return message

    def row(self) -> dict[str, Any]:
        messages = [self.message("system")] if self.chance(0.3) else []
        if self.chance(0.1):
            messages.append({"role": "developer", "content": self.text()})
        if self.chance(0.1):
            messages.append({"role": "assistant", "content": self.text()})
        for _ in range(self.random.randint(1, 3)):
            messages.append(self.message("user"))
            if self.chance(0.25):
                called = {**self.message("assistant"), "tool_calls": [self.call()]}
                called["content"] = self.random.choice([None, "", self.text()])
                messages += [
                    called,
                    {"role": "tool", "content": self.random.choice([self.text(), self.result(), None])},
                ]
            if self.chance(0.1):
                thought = {self.random.choice(_REASONING): self.text()}
                messages.append({"role": "assistant", "content": self.random.choice([None, ""]), **thought})
            messages.append(self.message("assistant"))
        if self.chance(0.1):
            messages.append(self.message("user"))
        row: dict[str, Any] = {"messages": messages, **self.extras(0.2)}
        if self.chance(0.15):
            row["system"] = self.text()
        if self.chance(0.1):
            row[self.random.choice(_REASONING)] = self.random.choice([self.text(), "on", [self.word()]])
        if self.chance(0.2):
            parameters = {
                "type": "object",
                "properties": {self.word(): {"type": "string", "description": self.text()}},
            }
            row["tools"] = [
                {
                    "type": "function",
                    "function": {"name": self.word(), "description": self.text(), "parameters": parameters},
                }
            ]
        return row


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_no_text_of_a_row_is_lost_in_silence(shard: int, tiny_model: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"bos_token": "<|bos|>", "eos_token": "<|eos|>"})
    trained = 0
    for number in range(shard, ROWS, SHARDS):
        template = TEMPLATES[number % len(TEMPLATES)]
        tokenizer.chat_template = template.read_text()
        row = Rows(number).row()
        try:
            schema = RowSchema("instruction_tuning", recognise(row, {}, "instruction_tuning"), {}, None, ())
            example = read_row(row, schema)
            renderer = Renderer(tokenizer, whole_text=False)
            sequences = renderer.render(example)
        except RowError as error:
            assert str(error)
            continue
        notes = [*example.notes, *renderer.notes(example, sequences)]
        rendered = "\n".join(sequence.text for sequence in sequences)
        lost = {word for word in words_of(row, notes) if word not in rendered}
        assert not lost, f"row {number}, {template.stem}: {lost} of {row}, notes: {notes}"
        trained += 1
    assert trained > ROWS / SHARDS / 4, "most rows are rejected, so the oracle has little to look at"


def words_of(row: dict[str, Any], notes: list[str]) -> set[str]:
    """Return the words that must be rendered: all but those under keys that a note names, ids, and cut messages."""
    unused = {key for note in notes for key in re.findall(r"`(\w+)`", note)}
    messages = list(row["messages"])
    while any("after the last answer" in note for note in notes) and messages[-1]["role"] in _USERS:
        messages.pop()
    roles = [message["role"] for message in messages]
    if any("are excluded" in note for note in notes):
        begin = next(place for place, role in enumerate(roles) if role in _USERS)
        messages = [m for place, m in enumerate(messages) if place >= begin or m["role"] != "assistant"]
    found: set[str] = set()

    def collect(value: Any) -> None:
        if isinstance(value, str):
            found.update(re.findall(r"wörd\d{4}x", value))
        elif isinstance(value, dict):
            for key, entry in value.items():
                if key not in unused | {"id"}:
                    collect(key)
                    collect(entry)
        elif isinstance(value, list):
            for entry in value:
                collect(entry)

    collect({**row, "messages": messages})
    return found
