"""Examples -> the text that a model reads, and where in it the answers stand, end marker included."""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import Template, TemplateError, TemplateSyntaxError

from training.data.rows import Chat, Example, Filled, Message, Pair, Text
from training.data.sources import DataError, RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Span = tuple[int, int]

_QUESTION, _ANSWER = "What is it?", "That is it."
_SPEAKERS = {"user", "assistant"}


@dataclass(frozen=True, slots=True)
class Rendered:
    """One sequence as text."""

    text: str
    spans: tuple[Span, ...]
    """Trained characters, in order: [begin, end)."""
    ends_the_text: bool = False
    """Whether the tokenizer's own first and last tokens surround it, as they do around text that no chat template lays out."""


class Renderer:
    """Lays out a source's examples by the model's chat template."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", *, whole_text: bool):
        """Look at how the chat template surrounds an answer.

        Args:
            tokenizer: With its chat template.
            whole_text: Train on every token, not on the answers only.
        """
        self._tokenizer = tokenizer
        self._special_tokens = dict(tokenizer.special_tokens_map)
        self._whole_text = whole_text
        self.header, self.end_marker = self._surroundings()
        """What stands before and behind an answer; both empty where the template does not only append."""
        self._written: set[str] = set()
        self._writes_tools: bool | None = None
        self._writes_calls: bool | None = None

    def render(self, example: Example) -> tuple[Rendered, ...]:
        """One sequence, or two for a pair: the chosen one first; their spans are the completions.

        Raises:
            RowError: the template refuses the row, or renders it so that its answers cannot be told.
            DataError: the template itself is broken.
        """
        if isinstance(example, Text):
            return (Rendered(example.text, ((0, len(example.text)),), ends_the_text=True),)
        if isinstance(example, Filled):
            text = example.prompt + example.answer
            begin = 0 if self._whole_text else len(example.prompt)
            return (Rendered(text, ((begin, len(text)),), ends_the_text=True),)
        if isinstance(example, Pair):
            return tuple(self._completed(example, side) for side in (example.chosen, example.rejected))
        whole = self._layout(example.messages, example.tools)
        self._check_words(whole, example.messages, example.tools)
        self._check_tools(whole, example)
        if self._whole_text:
            return (Rendered(whole, ((0, len(whole)),)),)
        spans = self._answers(whole, example)
        if example.label is not None:
            return (self._up_to_label(whole, spans[-1], str(example.messages[-1]["content"])),)
        if example.untrained:
            positions = _answer_positions(example.messages)
            spans = [
                span
                for position, span in zip(positions, spans, strict=True)
                if position not in example.untrained
            ]
        return (Rendered(whole, tuple(spans)),)

    def _completed(self, pair: Pair, side: list[Message]) -> Rendered:
        before = self._layout(pair.prompt, pair.tools, prompt=True)
        whole = self._layout([*pair.prompt, *side], pair.tools)
        self._check_words(whole, [*pair.prompt, *side], pair.tools)
        if not whole.startswith(before):
            raise RowError(
                "template",
                "is rendered by the model's chat template so that the completion does not follow the prompt. Use a model whose "
                "template only appends, or set chat_template",
            )
        return Rendered(whole.rstrip(), ((len(before), len(whole.rstrip())),))

    def _up_to_label(self, whole: str, answer: Span, label: str) -> Rendered:
        begin = whole.find(label, answer[0], answer[1])
        if begin < 0:
            raise RowError(
                "template", f"is rendered by the model's chat template without its label {label!r}"
            )
        end = begin + len(label)
        return Rendered(whole[:end], ((begin, end),))

    def _layout(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, *, prompt: bool = False
    ) -> str:
        try:
            # What tokenizer.apply_chat_template does, without looking up for each row what is the same for all.
            template = _compiled(self._tokenizer.get_chat_template(None, tools))
            return template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=prompt,
                **self._special_tokens,
            )
        except TemplateSyntaxError as error:
            raise DataError(
                f"the chat template is broken ({error}, line {error.lineno} of it). Copy the tokenizer's files again from where the model "
                "came from, or mend chat_template."
            ) from error
        except (
            TemplateError,
            TypeError,
            ValueError,
            AttributeError,
            LookupError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise RowError(
                "template",
                f"is refused by the chat template ({error}). Change the row to the roles and fields that it takes",
            ) from error

    def _check_words(self, whole: str, messages: list[Message], tools: list[dict[str, Any]] | None) -> None:
        """Templates for content in parts pass over text: what is said last must change what is written, asked or answered."""
        for position in range(len(messages) - 1, -1, -1):
            if self._written >= _SPEAKERS:
                return
            message = messages[position]
            role = message["role"]
            if role in self._written or role not in _SPEAKERS or "tool_calls" in message:
                continue
            changed = {**message, "content": f"{message['content']} {_ANSWER}"}
            if whole == self._layout([*messages[:position], changed, *messages[position + 1 :]], tools):
                raise DataError(
                    f"the chat template writes nothing of what the {role} says. Set chat_template, or use a model whose template takes a "
                    "message's content as text."
                )
            self._written.add(role)

    def _check_tools(self, whole: str, chat: Chat) -> None:
        """Most templates pass over what they do not know: tools must change what is written, and so must calls."""
        if chat.tools:
            if self._writes_tools is None:
                self._writes_tools = whole != self._layout(chat.messages, None)
            if not self._writes_tools:
                raise RowError(
                    "template",
                    "has `tools`, and the chat template writes none of them. Use a model whose template does, or set chat_template",
                )
        for position, message in enumerate(chat.messages):
            if "tool_calls" not in message:
                continue
            name = message["tool_calls"][0]["function"]["name"]
            if self._writes_calls is None:
                other = {"type": "function", "function": {"name": f"not_{name}", "arguments": {}}}
                changed = [
                    *chat.messages[:position],
                    {**message, "tool_calls": [other]},
                    *chat.messages[position + 1 :],
                ]
                self._writes_calls = whole != self._layout(changed, chat.tools)
            if not self._writes_calls:
                raise RowError(
                    "template",
                    f"message {position + 1} calls `{name}`, and the chat template does not write the call. Use a model whose template "
                    "does, or set chat_template",
                )

    def _surroundings(self) -> tuple[str, str]:
        """What stands before and behind an answer, where the template only appends; two empty texts where it does not."""
        if not self._tokenizer.chat_template:
            return "", ""
        question: Message = {"role": "user", "content": _QUESTION}
        try:
            asked = self._layout([question], None)
            prompt = self._layout([question], None, prompt=True)
            whole = self._layout([question, {"role": "assistant", "content": _ANSWER}], None)
        except RowError:
            return "", ""
        answer = whole.find(_ANSWER, len(prompt))
        if not (prompt.startswith(asked) and whole.startswith(prompt) and answer >= 0):
            return "", ""
        return prompt[len(asked) :], whole[answer + len(_ANSWER) :].rstrip()

    def _answers(self, whole: str, chat: Chat) -> list[Span]:
        """Where each assistant turn stands in the conversation's text."""
        positions = _answer_positions(chat.messages)
        header, marker = self.header, self.end_marker
        # Counting makes sure that nobody's words are taken for a header.
        starts_are_known = bool(header) and whole.count(header) == len(positions)
        spans: list[Span] = []
        cursor = 0
        for position in positions:
            if starts_are_known:
                begin = whole.index(header, cursor) + len(header)
            else:
                begin = self._begin(whole, chat, position)
            end = _end_of(whole, begin, chat.messages[position], marker) if marker else None
            if end is None:
                end = self._end_by_rendering(whole, chat, position)
            if not cursor <= begin < end:
                raise RowError("template", _changes(position))
            spans.append((begin, end))
            cursor = end
        return spans

    def _begin(self, whole: str, chat: Chat, position: int) -> int:
        before = self._layout(chat.messages[:position], chat.tools, prompt=True)
        if not whole.startswith(before):
            raise RowError("template", _changes(position))
        return len(before)

    def _end_by_rendering(self, whole: str, chat: Chat, position: int) -> int:
        """Where the text ended when this turn was the last; the white space behind the end marker begins the next turn."""
        is_last = position == len(chat.messages) - 1
        after = whole if is_last else self._layout(chat.messages[: position + 1], chat.tools)
        if not whole.startswith(after):
            raise RowError("template", _changes(position))
        return len(after.rstrip())


@lru_cache
def _compiled(chat_template: str) -> Template:
    """With transformers' sandbox, filters and functions, and these in one dictionary: Jinja merges them again for every row."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment = _compile_jinja_template(chat_template).environment
    return Template.from_code(environment, environment.compile(chat_template), dict(environment.globals))


def _answer_positions(messages: list[Message]) -> list[int]:
    return [position for position, message in enumerate(messages) if message["role"] == "assistant"]


def _end_of(whole: str, begin: int, message: Message, marker: str) -> int | None:
    """Where the end marker behind an answer ends; None where the answer does not stand there word for word."""
    if len(message) > 2:
        return None  # tool calls stand between the content and the marker
    content = message["content"]
    for text in (content, content.strip()):
        if whole.startswith(text + marker, begin):
            return begin + len(text) + len(marker)
    return None


def _changes(position: int) -> str:
    return (
        f"is rendered by the chat template so that message {position + 1} reads differently once others follow, and what to train on "
        "cannot be told. Keep one assistant turn a row, use a model whose template only appends, or set chat_template"
    )
