"""No text of a row is lost without an error or a note: an oracle looks for each text in the rendered sequences."""

import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import AutoTokenizer

from training.data.encoding import Encoder
from training.data.errors import RowError
from training.data.records import Task
from training.data.renderer import Renderer
from training.data.rows import RowSchema, read_row, recognise

ROWS = int(os.environ.get("FUZZ_FILES", "0")) or 600
TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
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

    def side(self, role: str) -> Any:
        """Return a text, a message or a list of one message."""
        text = self.text()
        return self.random.choice([text, text, [self.message(role)], {"role": role, "content": text}])

    def columns(self) -> dict[str, Any]:
        """Return columns beside a prompt and its answer."""
        columns = self.extras(0.2)
        if self.chance(0.15):
            columns["system"] = self.text()
        if self.chance(0.15):
            columns["history"] = [[self.text(), self.text()] for _ in range(self.random.randint(1, 2))]
        if self.chance(0.1):
            columns["tools"] = [self.tool()]
        return columns

    def reasoning(self) -> dict[str, Any]:
        return {self.random.choice(_REASONING): self.text()} if self.chance(0.2) else {}

    def preference_row(self) -> dict[str, Any]:
        if self.chance(0.2):
            asked: dict[str, Any] = {
                "instruction": self.text(),
                "input": self.random.choice(["", self.text()]),
            }
        elif self.chance(0.2):
            question = self.message("user")
            pair = {name: [question, self.message("assistant")] for name in ("chosen", "rejected")}
            return {**pair, **self.extras(0.2)}
        else:
            asked = {"prompt": self.side("user")}
        return {
            **asked,
            "chosen": self.side("assistant"),
            "rejected": self.side("assistant"),
            **self.columns(),
        }

    def rated_row(self) -> dict[str, Any]:
        rating = {self.random.choice(["label", "kto_tag"]): self.chance(0.5)}
        return {"prompt": self.side("user"), "completion": self.side("assistant"), **rating, **self.columns()}

    def instruction_row(self) -> dict[str, Any]:
        row = {"instruction": self.text(), "output": self.text(), **self.columns(), **self.reasoning()}
        return row | ({"input": self.text()} if self.chance(0.5) else {})

    def completion_row(self) -> dict[str, Any]:
        names = self.random.choice(
            [("prompt", "completion"), ("question", "answer"), ("query", "response"), ("prompt", "response")]
        )
        prompt, completion = self.side("user"), self.side("assistant")
        return dict(zip(names, (prompt, completion), strict=True)) | self.columns() | self.reasoning()

    def text_row(self) -> dict[str, Any]:
        return {"text": "\n".join(self.text() for _ in range(3)), **self.extras(0.4)}

    def tool(self) -> dict[str, Any]:
        parameters = {
            "type": "object",
            "properties": {self.word(): {"type": "string", "description": self.text()}},
        }
        function = {"name": self.word(), "description": self.text(), "parameters": parameters}
        return {"type": "function", "function": function}

    def chat_row(self) -> dict[str, Any]:
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
            row["tools"] = [self.tool()]
        return row


KINDS: dict[str, tuple[Task, Callable[[Rows], dict[str, Any]]]] = {
    "chat": ("instruction_tuning", Rows.chat_row),
    "preference": ("preference_tuning", Rows.preference_row),
    "rated": ("preference_tuning", Rows.rated_row),
    "instruction": ("instruction_tuning", Rows.instruction_row),
    "completion": ("instruction_tuning", Rows.completion_row),
    "text": ("causal_lm", Rows.text_row),
}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_no_text_of_a_row_is_lost_in_silence(kind: str, tiny_model: Path):
    task, generate = KINDS[kind]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"bos_token": "<|bos|>", "eos_token": "<|eos|>"})
    trained = 0
    for number in range(ROWS // len(KINDS)):
        template = TEMPLATES[number % len(TEMPLATES)]
        tokenizer.chat_template = template.read_text()
        row = generate(Rows(number))
        unpaired = kind == "rated"
        try:
            data_format = recognise(row, {}, task, unpaired=unpaired)
            example = read_row(row, RowSchema(task, data_format, {}, None, (), unpaired))
            renderer = Renderer(tokenizer, whole_text=task == "causal_lm")
            sequences = renderer.render(example)
        except RowError as error:
            assert str(error)
            continue
        notes = [*example.notes, *renderer.notes(example, sequences)]
        encoded = Encoder(tokenizer, whole_text=task == "causal_lm").encode(sequences)
        assert encoded.predicted().all(), "every sequence has loss tokens"
        rendered = tokenizer.decode(encoded.ids)
        lost = {word for word in words_of(row, notes) if word not in rendered}
        assert not lost, f"row {number}, {template.stem}: {lost} of {row}, notes: {notes}"
        trained += 1
    assert trained > ROWS / len(KINDS) / 4, "most rows are rejected, so the oracle has little to look at"


def words_of(row: dict[str, Any], notes: list[str]) -> set[str]:
    """Return the words that must be rendered: all but those under keys that a note names, ids, and cut messages."""
    unused = {key for note in notes for key in re.findall(r"`(\w+)`", note)}
    messages = list(row.get("messages", ()))
    while any("after the last answer" in note for note in notes) and messages[-1]["role"] in _USERS:
        messages.pop()
    roles = [message["role"] for message in messages]
    if messages and any("are excluded" in note for note in notes):
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

    collect({**row, "messages": messages} if messages else row)
    return found
