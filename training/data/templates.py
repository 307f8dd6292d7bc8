"""Chat templates: render examples as text and locate the assistant's answers, including the end marker."""

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import Template, TemplateError, TemplateSyntaxError

from training.data.errors import DataError, RowError
from training.data.records import Chat, Example, Filled, Message, Pair, Text
from training.data.rendered import Rendered, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


_QUESTION, _ANSWER = "What is it?", "That is it."
_SPEAKERS = {"user", "assistant"}


class Renderer:
    """A renderer that applies the model's chat template to the examples of a source."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", *, whole_text: bool):
        """Detect the text that the chat template puts around an answer.

        Args:
            tokenizer: Tokenizer with its chat template.
            whole_text: True to train on every token instead of the answers only.
        """
        self._tokenizer = tokenizer
        self._special_tokens = dict(tokenizer.special_tokens_map)
        self._whole_text = whole_text
        self.header, self.end_marker = self._surroundings()
        """Text before and after an answer; both are empty if the template does more than append."""
        self._written: set[str] = set()
        self._writes_tools: bool | None = None
        self._writes_calls: bool | None = None

    def render(self, example: Example) -> tuple[Rendered, ...]:
        """Render an example as one sequence, or a pair as two: chosen, then rejected, with their completions as spans.

        Raises:
            RowError: The template rejects the row, or its answers cannot be located in the rendered text.
        """
        if isinstance(example, Text):
            return (Rendered(example.text, ((0, len(example.text)),), ends_the_text=True),)
        if isinstance(example, Filled):
            text = example.prompt + example.answer
            begin = 0 if self._whole_text else len(example.prompt)
            return (Rendered(text, ((begin, len(text)),), ends_the_text=True),)
        if isinstance(example, Pair):
            return tuple(self._completed(example, side) for side in (example.chosen, example.rejected))
        whole = self._apply_template(example.messages, example.tools)
        self._check_content(whole, example.messages, example.tools)
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
        before = self._apply_template(pair.prompt, pair.tools, prompt=True)
        whole = self._apply_template([*pair.prompt, *side], pair.tools)
        self._check_content(whole, [*pair.prompt, *side], pair.tools)
        if not whole.startswith(before):
            raise RowError(
                "template",
                "the model's chat template does not render the completion directly after the prompt. Use a model whose "
                "template only appends messages, or set chat_template",
            )
        return Rendered(whole.rstrip(), ((len(before), len(whole.rstrip())),))

    def _up_to_label(self, whole: str, answer: Span, label: str) -> Rendered:
        begin = whole.find(label, answer[0], answer[1])
        if begin < 0:
            raise RowError("template", f"the model's chat template does not render the label {label!r}")
        end = begin + len(label)
        return Rendered(whole[:end], ((begin, end),))

    def _apply_template(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, *, prompt: bool = False
    ) -> str:
        try:
            # Equivalent to tokenizer.apply_chat_template, without its constant work per row.
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
                f"the chat template has a syntax error ({error}, template line {error.lineno}). Copy the tokenizer files again from the "
                "original model, or fix chat_template."
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
                f"is rejected by the chat template ({error}). Use only roles and fields that the template supports",
            ) from error

    def _check_content(self, whole: str, messages: list[Message], tools: list[dict[str, Any]] | None) -> None:
        """Check that the template renders user and assistant content; some templates skip content that is a string."""
        for position in range(len(messages) - 1, -1, -1):
            if self._written >= _SPEAKERS:
                return
            message = messages[position]
            role = message["role"]
            if role in self._written or role not in _SPEAKERS or "tool_calls" in message:
                continue
            changed = {**message, "content": f"{message['content']} {_ANSWER}"}
            if whole == self._apply_template(
                [*messages[:position], changed, *messages[position + 1 :]], tools
            ):
                raise DataError(
                    f"the chat template drops the content of {role} messages. Set chat_template, or use a model whose template accepts "
                    "message content as a string."
                )
            self._written.add(role)

    def _check_tools(self, whole: str, chat: Chat) -> None:
        """Check that the template renders tools and tool calls; most templates silently skip unsupported fields."""
        if chat.tools:
            if self._writes_tools is None:
                self._writes_tools = whole != self._apply_template(chat.messages, None)
            if not self._writes_tools:
                raise RowError(
                    "template",
                    "has `tools`, but the chat template drops them. Use a model whose template renders tools, or set chat_template",
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
                self._writes_calls = whole != self._apply_template(changed, chat.tools)
            if not self._writes_calls:
                raise RowError(
                    "template",
                    f"message {position + 1} calls `{name}`, but the chat template drops the call. Use a model whose template "
                    "renders tool calls, or set chat_template",
                )

    def _surroundings(self) -> tuple[str, str]:
        """Return the text before and after an answer, or two empty strings if the template does more than append."""
        if not self._tokenizer.chat_template:
            return "", ""
        question: Message = {"role": "user", "content": _QUESTION}
        try:
            asked = self._apply_template([question], None)
            prompt = self._apply_template([question], None, prompt=True)
            whole = self._apply_template([question, {"role": "assistant", "content": _ANSWER}], None)
        except RowError:
            return "", ""
        answer = whole.find(_ANSWER, len(prompt))
        if not (prompt.startswith(asked) and whole.startswith(prompt) and answer >= 0):
            return "", ""
        return prompt[len(asked) :], whole[answer + len(_ANSWER) :].rstrip()

    def _answers(self, whole: str, chat: Chat) -> list[Span]:
        """Return the span of each assistant message in the rendered text."""
        positions = _answer_positions(chat.messages)
        header, marker = self.header, self.end_marker
        # The count makes sure that message content is never mistaken for a header.
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
        before = self._apply_template(chat.messages[:position], chat.tools, prompt=True)
        if not whole.startswith(before):
            raise RowError("template", _changes(position))
        return len(before)

    def _end_by_rendering(self, whole: str, chat: Chat, position: int) -> int:
        """Return where the text ends if this turn is the last, without whitespace after the end marker."""
        is_last = position == len(chat.messages) - 1
        after = whole if is_last else self._apply_template(chat.messages[: position + 1], chat.tools)
        if not whole.startswith(after):
            raise RowError("template", _changes(position))
        return len(after.rstrip())


@lru_cache
def _compiled(chat_template: str) -> Template:
    """Compile a template with transformers' sandbox and globals, merged once; Jinja would merge them for every row."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment = _compile_jinja_template(chat_template).environment
    return Template.from_code(environment, environment.compile(chat_template), dict(environment.globals))


def _answer_positions(messages: list[Message]) -> list[int]:
    return [position for position, message in enumerate(messages) if message["role"] == "assistant"]


def _end_of(whole: str, begin: int, message: Message, marker: str) -> int | None:
    """Return where the end marker after an answer ends, or None if the answer is not rendered verbatim."""
    if len(message) > 2:
        return None  # tool calls come between the content and the marker
    content = message["content"]
    for text in (content, content.strip()):
        if whole.startswith(text + marker, begin):
            return begin + len(text) + len(marker)
    return None


def _changes(position: int) -> str:
    return (
        f"the chat template renders message {position + 1} differently when other messages follow, so its loss tokens cannot be "
        "located. Use one assistant message per row, a model whose template only appends messages, or set chat_template"
    )
