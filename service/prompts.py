"""Chat format of a model: prompts rendered as in training, and the form in which its template writes tool calls."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from service.engine import ChatRequest, ToolCall
from service.errors import ApiError
from training.data.errors import DataError, RowError
from training.data.prompting import encode_prompt
from training.data.records import Chat
from training.data.renderer import Renderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PROBE, _PROBE_KEY, _PROBE_VALUE = "probe_of_calls", "probe_key", "probe value"


@dataclass(frozen=True)
class CallForm:
    """The form of tool calls: JSON between two texts, or bare JSON."""

    opening: str
    """Text before the JSON; empty: an answer that is JSON from its first character is a call."""
    closing: str
    """Text after the JSON."""


class ChatFormat:
    """The tokenizer and chat template of a model."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerFast", *, variables: Mapping[str, Any], context: int, model: str
    ):
        """Detect how the template writes tool calls.

        Args:
            tokenizer: The model's tokenizer, with the chat template of its training.
            variables: Variables of the template (`chat_template_kwargs`).
            context: Longest sequence in tokens.
            model: Name of the model in messages.
        """
        self.tokenizer = tokenizer
        self.context = context
        self._model = model
        self._renderer = Renderer(tokenizer, whole_text=False, variables=dict(variables))
        self._calls = self._call_form() if tokenizer.chat_template else None
        special = {
            number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        around = self._calls.opening + self._calls.closing if self._calls else ""
        self.hidden_tokens = frozenset(special)
        """Tokens that no answer shows."""
        self.hidden_beside_calls = frozenset(number for number, text in special.items() if text not in around)
        """Tokens that are not shown in an answer that may call tools."""

    def encode(self, request: ChatRequest) -> list[int]:
        """Render and tokenize the prompt of a request.

        Raises:
            ApiError: The template rejects the messages, or the prompt fills the context.
        """
        if not self.tokenizer.chat_template:
            raise ApiError(
                status=400,
                message=f"The model {self._model} has no chat template, so it cannot answer messages.",
                param="model",
            )
        if request.tools:
            self.call_form()
        try:
            prompt = self._renderer.prompt(
                Chat(request.messages, request.tools or None, variables=request.variables)
            )
        except RowError as error:  # a syntax error in the template has been raised before
            raise ApiError(status=400, message=f"messages: {error}.", param="messages") from error
        tokens = list(encode_prompt(self.tokenizer, prompt, is_rendered=True))
        wanted = request.sampling.max_tokens or 1
        if len(tokens) + wanted > self.context:
            raise ApiError(
                status=400,
                message=f"This model's maximum context length is {self.context} tokens. However, you requested "
                f"{len(tokens) + wanted} tokens ({len(tokens)} in the messages, {wanted} in the completion). "
                "Please reduce the length of the messages or completion.",
                param="messages",
                code="context_length_exceeded",
            )
        return tokens

    def call_form(self) -> CallForm:
        """Return the form of tool calls; raise ApiError if the template has none, or one that is not JSON."""
        if self._calls is None:
            raise ApiError(
                status=400,
                message=f"tools: the chat template of {self._model} writes no tool calls as JSON. Remove `tools`, or use "
                "another model.",
                param="tools",
            )
        return self._calls

    def _call_form(self) -> CallForm | None:
        """Render a call and find its JSON in the completion, or return None."""
        call = {
            "type": "function",
            "function": {"name": _PROBE, "arguments": {_PROBE_KEY: _PROBE_VALUE}},
        }
        parameters = {"type": "object", "properties": {_PROBE_KEY: {"type": "string"}}}
        tool = {"type": "function", "function": {"name": _PROBE, "description": "", "parameters": parameters}}
        messages = [
            {"role": "user", "content": "Call it."},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        try:
            (rendered,) = self._renderer.render(Chat(messages, [tool]))
        except (RowError, DataError):
            return None
        completion = rendered.text[slice(*rendered.spans[-1])]
        for place, character in enumerate(completion):
            found = _json_at(completion, place) if character in "[{" else None
            if found and [call.name for call in _calls_in(found[0])] == [_PROBE]:
                closing = completion[found[1] :].strip()
                end = self._renderer.traits.end_marker.strip()
                return CallForm(completion[:place].strip(), closing.removesuffix(end).strip())
        return None


def split_calls(text: str, form: CallForm) -> tuple[str, tuple[ToolCall, ...]]:
    """Return (content, calls) of an answer that begins with the opening text of a call.

    The answer is content as a whole if what follows an opening text is not a call.
    """
    content, calls, cursor = [], list[ToolCall](), 0
    while (place := text.find(form.opening, cursor)) >= 0:
        begin = place + len(form.opening)
        begin += len(text[begin:]) - len(text[begin:].lstrip())
        found = _json_at(text, begin)
        called = _calls_in(found[0]) if found else []
        if not (found and called):
            return text, ()
        calls += called
        content.append(text[cursor:place])
        rest = text[found[1] :]
        cursor = found[1]
        if form.closing and rest.lstrip().startswith(form.closing):
            cursor += len(rest) - len(rest.lstrip()) + len(form.closing)
        if not form.opening:
            break
    return "".join([*content, text[cursor:]]).strip(), tuple(calls)


def _json_at(text: str, place: int) -> tuple[Any, int] | None:
    try:
        return json.JSONDecoder().raw_decode(text, place)
    except (ValueError, RecursionError):
        return None


def _calls_in(value: Any) -> list[ToolCall]:
    """Return the calls in a JSON value: an object with a name and arguments, or a list of them."""
    calls = []
    for entry in value if isinstance(value, list) else [value]:
        function = entry.get("function", entry) if isinstance(entry, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return []
        given = [key for key in ("arguments", "parameters") if key in function]
        if not given:
            return []
        arguments = function[given[0]]
        written = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
        try:
            (function["name"] + written).encode()
        except UnicodeEncodeError:  # a lone surrogate, which no response could contain
            return []
        calls.append(ToolCall(function["name"], written))
    return calls
