"""Forms of messages: chat templates read reasoning, calls and content under different keys and in different shapes."""

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product, takewhile
from typing import Any

from training.data.records import REASONING_KEYS, Chat, Message, Pair
from training.data.tools import Tool
from utils.files import checksum_bytes

EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>")
_TOOLS_OF_A_MESSAGE = re.compile(r"message(\[['\"]tools['\"]\]|\.tools\b)")  # Phi 4 mini
_INSTRUCTIONS = {"system", "developer"}
_ID_CHARACTERS = 9  # Mistral's templates reject other ids
THINKING_PART = "thinking part"
"""Form of reasoning: a part of the content with the type `thinking` (Mistral)."""
_RARE_FORMS = (
    (THINKING_PART, re.compile(r"==\s*['\"]thinking['\"]")),
    ("tool_plan", re.compile(r"\btool_plan\b")),
)
"""Form of reasoning -> pattern of templates that may read it. Cohere's have `tool_plan` beside calls."""


@dataclass(frozen=True)
class Form:
    """The form in which messages are passed to a template: templates read different keys."""

    reasoning: str | None = None
    """Key of a turn's reasoning; THINKING_PART: a part of its content; None: inside the content, as written."""
    arguments_as_text: bool = False
    """True to pass the arguments of calls as JSON text."""
    short_ids: bool = False
    """True to replace the ids of calls with nine characters."""
    null_content: bool = False
    """True to pass no content beside calls."""
    parts: bool = False
    """True to pass content as a list of text parts."""
    tools_in_system: bool = False
    """True to pass the tools in the system message, as the JSON text of their functions."""

    @property
    def has_parts(self) -> bool:
        """Return whether contents are passed as lists of parts."""
        return self.parts or self.reasoning == THINKING_PART


def answers_of(messages: Sequence[Message]) -> list[int]:
    """Return the indices of the assistant messages."""
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def greeting_of(messages: Sequence[Message]) -> list[int]:
    """Return the indices of the assistant messages before the first question."""
    greeting: list[int] = []
    for index, message in enumerate(messages):
        if message["role"] == "user":
            break
        if message["role"] == "assistant":
            greeting.append(index)
    return greeting


def without_greeting(example: Chat | Pair) -> Chat | Pair | None:
    """Return an example without the assistant's words before the first question; None if it has none, or they call tools."""
    messages = context_of(example)
    greeting = greeting_of(messages)
    if not greeting:
        return None
    calls = any(m["role"] == "tool" or "tool_calls" in m for m in messages[: greeting[-1] + 2])
    has_question = any(message["role"] == "user" for message in messages)
    return _without(example, greeting) if has_question and not calls else None


def with_one_instruction(example: Chat | Pair) -> Chat | Pair | None:
    """Return an example whose system and developer messages at its beginning are one message; None if it has no two."""
    messages = context_of(example)
    if len(messages) < 2 or not {messages[0]["role"], messages[1]["role"]} <= _INSTRUCTIONS:
        return None
    count = len(list(takewhile(lambda message: message["role"] in _INSTRUCTIONS, messages)))
    text = "\n\n".join(message["content"] for message in messages[:count])
    joined = _without(example, range(1, count))
    first = {**messages[0], "content": text}
    if isinstance(joined, Pair):
        return replace(joined, prompt=[first, *joined.prompt[1:]])
    return replace(joined, messages=[first, *joined.messages[1:]])


def without_empty_thoughts(example: Chat | Pair) -> Chat | Pair | None:
    """Return an example whose answers do not begin with an empty thought in tags; None if none does."""

    def empty_thought(message: Message) -> re.Match[str] | None:
        return EMPTY_THOUGHT.match(message["content"]) if message["role"] == "assistant" else None

    def shortened(message: Message) -> Message:
        found = empty_thought(message)
        return {**message, "content": message["content"][found.end() :].lstrip()} if found else message

    return map_messages(example, shortened) if any(map(empty_thought, messages_of(example))) else None


def messages_of(example: Chat | Pair) -> list[Message]:
    """Return all messages of an example."""
    if isinstance(example, Chat):
        return example.messages
    return [*example.prompt, *example.chosen, *example.rejected]


def has_reasoning(example: Chat | Pair) -> bool:
    """Return whether an answer of an example has reasoning, or an empty thought that the row writes."""
    return any(
        message["role"] == "assistant"
        and ("reasoning_content" in message or "</think>" in message["content"])
        for message in messages_of(example)
    )


def is_wrapped(message: Message) -> bool:
    """Return whether the result of a tool brings its own tags (Hermes)."""
    return _result_in_tags(message) is not None


def unwrapped(message: Message) -> Message:
    """Return a result without its outermost tags; several results in one message keep those between them. Other messages unchanged."""
    result = _result_in_tags(message)
    return message if result is None else {**message, "content": result}


def _result_in_tags(message: Message) -> str | None:
    """Return the text between the outermost tags of a result, or None."""
    opening, closing = "<tool_response>", "</tool_response>"
    content = message["content"].strip() if message["role"] == "tool" else ""
    if not content.startswith(opening) or not content.endswith(closing):
        return None
    return content[len(opening) : -len(closing)].strip()


def map_messages(example: Chat | Pair, change: Callable[[Message], Message]) -> Chat | Pair:
    """Return an example with a change to each message."""
    if isinstance(example, Chat):
        return replace(example, messages=list(map(change, example.messages)))
    prompt, chosen, rejected = (
        list(map(change, part)) for part in (example.prompt, example.chosen, example.rejected)
    )
    return replace(example, prompt=prompt, chosen=chosen, rejected=rejected)


def context_of(example: Chat | Pair) -> list[Message]:
    """Return the messages among which the first question is."""
    return example.prompt if isinstance(example, Pair) else example.messages


def _without(example: Chat | Pair, indices: Collection[int]) -> Chat | Pair:
    """Return an example without the messages at some indices, which all precede the first question."""
    removed = set(indices)
    kept = [index for index in range(len(context_of(example))) if index not in removed]
    if isinstance(example, Pair):
        return replace(example, prompt=[example.prompt[index] for index in kept])
    numbers = example.numbers or range(1, len(example.messages) + 1)
    places = {index: place for place, index in enumerate(kept)}
    return replace(
        example,
        messages=[example.messages[index] for index in kept],
        untrained=tuple(places[index] for index in example.untrained if index in places),
        numbers=tuple(numbers[index] for index in kept),
    )


def _has_calls(messages: Sequence[Message]) -> bool:
    return any("tool_calls" in message for message in messages)


def _has_reasoning(messages: Sequence[Message]) -> bool:
    return any("reasoning_content" in message for message in messages)


def _is_thought(message: Message) -> bool:
    """Return whether a turn's content holds its reasoning before its answer, as models write it."""
    return (
        message["role"] == "assistant" and "</think>" in message["content"] and thought_of(message)[0] != ""
    )


def features_of(chat: Chat) -> tuple[bool, ...]:
    """Return the features of a chat that a form depends on."""
    return (
        bool(chat.tools),
        _has_calls(chat.messages),
        _has_reasoning(chat.messages),
        any(map(_is_thought, chat.messages)),
    )


def thought_of(message: Message) -> tuple[str, str]:
    """Return (reasoning, content) of an assistant turn; both texts are stripped of the tags around the reasoning."""
    if "reasoning_content" in message:
        return message["reasoning_content"], message["content"]
    thought, content = split_thought(message["content"])
    return (thought, content) if content.strip() or "tool_calls" in message else ("", message["content"])


def split_thought(content: str) -> tuple[str, str]:
    """Return (reasoning, rest) of a content that begins with reasoning in tags; without tags, the content is the rest.

    The opening tag may be missing, as where a model continues a prompt that ends with it: then the closing tag is a line of its own.
    """
    closing = "</think>"
    if closing not in content:
        return "", content
    if (text := content.lstrip()).startswith("<think>"):
        thought, _, rest = text.removeprefix("<think>").partition(closing)
        return thought.strip(), rest
    thought, found, rest = content.partition(f"\n{closing}\n")
    return (thought.strip(), f"\n{rest}") if found and "<think>" not in content else ("", content)


def adapted(messages: Sequence[Message], form: Form, tools: Sequence[Tool] | None) -> list[Message]:
    """Return messages in the form that a template reads."""
    if form.short_ids:
        messages = [_with_short_ids(message) for message in _linked(messages)]
    if form.tools_in_system:
        system = messages[0] if messages[0]["role"] == "system" else {"role": "system", "content": ""}
        functions = json.dumps([tool.get("function", tool) for tool in tools or ()], ensure_ascii=False)
        messages = [{**system, "tools": functions}, *messages[messages[0]["role"] == "system" :]]
    return [_adapted(message, form) for message in messages]


def linked(example: Chat | Pair) -> Chat | Pair:
    """Return an example whose calls and results have ids; results without an id get that of a call of their name, or of the next call."""
    if isinstance(example, Chat):
        return replace(example, messages=_linked(example.messages))
    chosen, rejected = (_linked(side, len(example.prompt)) for side in (example.chosen, example.rejected))
    return replace(example, prompt=_linked(example.prompt), chosen=chosen, rejected=rejected)


def _linked(messages: Sequence[Message], before: int = 0) -> list[Message]:
    """Return messages whose calls and results have ids; `before` is the number of messages before them."""
    numbered: list[Message] = []
    open_calls: dict[str, str] = {}  # id -> name
    for number, message in enumerate(messages):
        if "tool_calls" in message:
            results = [
                m.get("tool_call_id")
                for m in takewhile(
                    lambda m: m["role"] == "tool", map(messages.__getitem__, range(number + 1, len(messages)))
                )
            ]
            calls = [
                {
                    **call,
                    "id": call.get("id")
                    or next(iter(results[place : place + 1]), None)
                    or _short_id(f"{before + number} {place}"),
                }
                for place, call in enumerate(message["tool_calls"])
            ]
            open_calls = {call["id"]: call["function"]["name"] for call in calls}
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool":
            own = message.get("tool_call_id") or next(
                (each for each, name in open_calls.items() if name == message.get("name")),
                next(iter(open_calls), _short_id(str(before + number))),
            )
            open_calls.pop(own, None)
            message = {**message, "tool_call_id": own}
        numbered.append(message)
    return numbered


def _with_short_ids(message: Message) -> Message:
    """Give a message with ids those of nine characters."""
    if "tool_calls" in message:
        calls = [{**call, "id": _short_id(call["id"])} for call in message["tool_calls"]]
        return {**message, "tool_calls": calls}
    if "tool_call_id" in message:
        return {**message, "tool_call_id": _short_id(message["tool_call_id"])}
    return message


def _adapted(message: Message, form: Form) -> Message:
    if form == Form() and "reasoning_content" not in message:
        return message
    changed = {key: value for key, value in message.items() if key != "reasoning_content"}
    reasoning, content = thought_of(message) if message["role"] == "assistant" else ("", message["content"])
    if reasoning and form.reasoning:
        content = content if "reasoning_content" in message else content.lstrip()
        if form.reasoning == THINKING_PART:
            changed["content"] = [{"type": "thinking", "thinking": reasoning}, *_text_parts(content)]
        else:
            changed |= {form.reasoning: reasoning, "content": content}
    elif "reasoning_content" in message:
        changed["content"] = f"<think>\n{reasoning.strip()}\n</think>\n\n{content}"
    if form.parts and isinstance(changed["content"], str):
        changed["content"] = _text_parts(changed["content"])
    if "tool_calls" in message:
        changed["tool_calls"] = [_adapted_call(call, form) for call in message["tool_calls"]]
        if form.null_content and not message["content"].strip():
            changed["content"] = None
    return changed


def _text_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _adapted_call(call: dict[str, Any], form: Form) -> dict[str, Any]:
    function = call["function"]
    if form.arguments_as_text:
        function = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    return {**call, "function": function}


def _short_id(text: str) -> str:
    """Return an id of nine letters and digits."""
    if len(text) == _ID_CHARACTERS and text.isascii() and text.isalnum():
        return text
    return checksum_bytes(text.encode()).removeprefix("crc64nvme:")[:_ID_CHARACTERS]


def possible_forms(chat: Chat, template: str) -> Iterator[Form]:
    """Yield the forms of a chat, the usual one first."""
    calls, reasons = _has_calls(chat.messages), _has_reasoning(chat.messages)
    reasoning: tuple[str | None, ...] = (None,)
    if reasons or any(map(_is_thought, chat.messages)):
        keys = (*REASONING_KEYS, *(form for form, reads in _RARE_FORMS if reads.search(template)))
        reasoning = keys if reasons and "</think>" not in template else (*keys, None)
    either = (False, True)
    in_system = either if chat.tools and _TOOLS_OF_A_MESSAGE.search(template) else (False,)
    for system, parts, null, ids, text, key in product(
        in_system,
        either,
        either if calls else (False,),
        either if calls else (False,),
        either if calls else (False,),
        reasoning,
    ):
        yield Form(key, text, ids, null, parts, system)
