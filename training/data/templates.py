"""Chat templates: render each assistant turn in the context in which the model will be asked for it.

The prompt of a turn is the template's rendering of the messages before it, with the generation prompt. The completion is what
follows the prompt in the rendering that ends with the turn, end marker included.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, time
from difflib import get_close_matches
from functools import cached_property, lru_cache, partial
from itertools import pairwise, takewhile
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast, overload

from jinja2 import Environment, Template, TemplateError, TemplateSyntaxError
from jinja2.runtime import LoopContext

from training.data.errors import DataError, RowError
from training.data.records import REASONING_KEYS, Chat, Example, Filled, Message, Pair, Text, Tokens, Turns
from training.data.rendered import Rendered, Span
from training.data.template_checks import (
    OTHER_CONTEXT,
    TEMPLATE_KINDS,
    check_answer,
    check_context,
    check_parts,
    check_tools,
    clearest,
    drops_tool_texts,
)
from training.data.template_forms import (
    EMPTY_THOUGHT,
    Form,
    adapted,
    answers_of,
    context_of,
    features_of,
    is_wrapped,
    messages_of,
    possible_forms,
    split_thought,
    thought_of,
    unwrapped,
    with_one_instruction,
    with_structured_calls,
    without_empty_thoughts,
    without_greeting,
)
from training.data.template_headers import Headers
from training.data.tools import Tool, as_function

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_QUESTION, _ANSWER, _PROBED_TOOL = "What is it?", "That is it.", "probed_tool"
_THOUGHT = "Let me think."
# A row whose text contains these may be rendered by other rules than a row of the same roles without them.
_RULES_DEPEND_ON = ("think>", "<tool_", "[TOOL_")
_DIRECTIVES = (
    "/no_think",
    "/think",
    "/system_override",
)  # in the order in which SmolLM3's template removes them
_GREETING_LEFT_OUT = "assistant messages before the first user message are left out, because the chat template does not render them"
_LOOP = frozenset(("first", "last", "index", "index0"))
_JSON_IN_TAGS = re.compile(r"<tool_call>\s*\{")
_END_OF_EMPTY_THOUGHT = re.compile(r"\s*</think>")


_TEMPLATE_ERRORS = (
    *(TemplateError, TypeError, ValueError, AttributeError),
    *(LookupError, ArithmeticError, RecursionError),
)
"""What the code of a template raises for a row."""


@dataclass(frozen=True)
class _Turn:
    """An assistant turn in its own context."""

    text: str
    """The rendering that ends with the turn."""
    begin: int
    """First character of the completion."""
    end: int
    """End of the completion; only whitespace follows."""

    @property
    def prompt(self) -> str:
        """The text before the completion."""
        return self.text[: self.begin]

    @property
    def completion(self) -> str:
        """The text that the loss is on."""
        return self.text[self.begin : self.end]


class _Renderings:
    """The renderings of a turn and of the messages before it, each made once."""

    def __init__(self, apply: Callable[..., str], messages: list[Message], chat: Chat):
        self.messages = messages
        self._apply = apply
        self._chat = chat
        self._made: dict[tuple[Any, ...], str] = {}

    def whole(self, switch: Mapping[str, bool] = MappingProxyType({})) -> str:
        """Return the rendering that ends with the turn."""
        return self._once(self.messages, switch, prompt=False)

    def before(self) -> str:
        """Return the rendering of the messages before the turn."""
        return self._once(self.messages[:-1], {}, prompt=False)

    def prompt(self, switch: Mapping[str, bool]) -> str:
        """Return the rendering of the messages before the turn, with the generation prompt."""
        return self._once(self.messages[:-1], switch, prompt=True)

    def _once(self, messages: list[Message], switch: Mapping[str, bool], *, prompt: bool) -> str:
        key = (len(messages), prompt, *switch.items())
        if key not in self._made:
            self._made[key] = self._apply(messages, self._chat, prompt=prompt, switch=switch)
        return self._made[key]


class Renderer:
    """A renderer that applies the model's chat template to the examples of a source."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        whole_text: bool,
        turns: Turns = "auto",
        variables: dict[str, Any] | None = None,
        today: date | None = None,
    ):
        """Detect the text that the chat template puts around an answer.

        Args:
            tokenizer: Tokenizer with its chat template.
            whole_text: True to train on every token instead of the answers only.
            turns: auto: every turn in its own context; last: only the last turn; all: every turn, in one sequence.
            variables: Variables of the template (`chat_template_kwargs`).
            today: Date that the template prints, if it prints one; None: the date of this call.
        """
        self._tokenizer = tokenizer
        self._now = datetime.combine(today, time()) if today else datetime.now()
        self._special_tokens = dict(tokenizer.special_tokens_map)
        self._whole_text = whole_text
        self._turns = turns
        self._variables = variables or {}
        self._source = str(tokenizer.get_chat_template(None, None)) if tokenizer.chat_template else ""
        self.header, self.end_marker = self._surroundings()
        """Text before and after an answer; both are empty if the template does more than append."""
        self._bos = _text_of(tokenizer.bos_token)
        self._special = re.compile("|".join(map(re.escape, _special_tokens(tokenizer))) or "(?!)")
        self._stops = tuple(
            {
                stop
                for stop in (
                    *(_text_of(tokenizer.eos_token), self.end_marker.strip(), self._end_of_earlier_turns()),
                    *self.end_marker.split(),
                )
                if stop
            }
        )
        self.next_headers = self._first_tokens_of_next_turns()
        """Role -> special token with which a turn of that role ends the answer before it; empty if answers have an end marker."""
        self._headers = self._find_headers()
        self._wraps_results = "<tool_response>" in self._source
        self._adds_bos = bool(self._bos) and tokenizer.encode("")[:1] == [tokenizer.bos_token_id]
        names = _names_in(self._source)
        self._switches = [
            name for name in ("enable_thinking", "thinking") if name in names and name not in self._variables
        ]
        """Variables that turn thinking on and off, which the template reads and the YAML does not set."""
        self._directives = [word for word in _DIRECTIVES if re.search(rf"['\"]{word}['\"]", self._source)]
        self._forms: dict[tuple[bool, ...], Form] = {}
        """Features of a chat -> the form that rendered the last such chat."""
        self._appends: dict[tuple[Any, ...], bool] = {}
        """Roles and keys of a chat -> True if one rendering holds all of its turns."""

    @overload
    def render(self, example: Tokens) -> tuple[Tokens]: ...

    @overload
    def render(self, example: Chat | Text | Filled | Pair) -> tuple[Rendered, ...]: ...

    def render(self, example: Example) -> tuple[Rendered, ...] | tuple[Tokens]:
        """Render an example: a pair as two sequences (chosen, then rejected), a chat as one or, if need be, several.

        Pretokenised rows are checked and returned as they are.

        Raises:
            RowError: The template rejects the row, a text of the row does not reach the rendering, or a token is unknown.
        """
        if isinstance(example, Tokens):
            return (self._checked(example),)
        if isinstance(example, Text):
            return (self._plain(example.text, 0, len(example.text)),)
        if isinstance(example, Filled):
            text = example.prompt + example.answer
            return (self._plain(text, 0 if self._whole_text else len(example.prompt), len(text)),)
        self._reject_rendered(example)
        example, notes = self._as_read(example)
        shorter = without_greeting(example)
        try:
            self._check_greeting(example)
            sequences = self._conversation(example)
        except RowError as error:
            if shorter is None or error.kind not in TEMPLATE_KINDS:
                raise
            sequences = self._conversation(shorter)
            notes = (*notes, _GREETING_LEFT_OUT)
        return tuple(replace(sequence, notes=notes) for sequence in sequences) if notes else sequences

    def _check_greeting(self, example: Chat | Pair) -> None:
        """Check that the assistant's words before the first question are not rendered as the user's (Llama 3.1, beside tools)."""
        if not example.tools or without_greeting(example) is None:
            return
        messages = self._clean(context_of(example))
        question = next(index for index, message in enumerate(messages) if message["role"] == "user")
        begin = messages[: question + 1]
        asked = [{**m, "role": "user"} if m["role"] == "assistant" else m for m in begin]
        chat = Chat([], example.tools, variables=example.variables)
        if self._apply(begin, chat) == self._apply(asked, chat):
            raise RowError(
                "template",
                "the chat template renders the assistant's first message as the user's words. Begin with a message of the user",
            )

    def _conversation(self, example: Chat | Pair) -> tuple[Rendered, ...]:
        """Render a chat or a pair with the chat template."""
        if isinstance(example, Pair):
            return self._pair(self._clean_pair(example))
        cleaned = self._clean(example.messages)
        if cleaned is not example.messages:
            example = replace(example, messages=cleaned)
        if self._whole_text:
            return (self._whole(example),)
        if example.label is not None:
            last_only = replace(example, untrained=tuple(answers_of(example.messages)[:-1]))
            return (_up_to_label(self._chat(last_only)[-1], str(example.messages[-1]["content"])),)
        return self._chat(example)

    def _checked(self, tokens: Tokens) -> Tokens:
        """Check that the tokenizer has all tokens of a row."""
        unknown = tokens.ids >= self._vocabulary
        if unknown.any():
            place = int(unknown.argmax())
            raise RowError(
                "unknown token",
                f"`input_ids`: entry {place + 1} is {tokens.ids[place]}, but the model's tokenizer has {self._vocabulary:,} tokens. Tokenize the "
                "rows with this model's tokenizer",
            )
        return tokens

    @cached_property
    def _vocabulary(self) -> int:
        """Return the number of token ids."""
        return max(self._tokenizer.get_vocab().values()) + 1

    def reject_unknown_variables(self) -> None:
        """Raise DataError for a variable of the YAML that the template does not read: a misspelled one would change nothing."""
        for name in self._variables if self._source else ():
            if name not in self._known_variables:
                raise DataError(f"chat_template_kwargs.{name}: {self._unknown(name)}")

    @cached_property
    def _known_variables(self) -> set[str]:
        """Return the names in the template, or in the templates with and without tools."""
        given = self._tokenizer.chat_template
        return set().union(*map(_names_in, given.values() if isinstance(given, dict) else [self._source]))

    def _unknown(self, name: str) -> str:
        """Return what is said about a variable that the template does not read."""
        near = get_close_matches(name, sorted(self._known_variables), n=1, cutoff=0.7)
        return f"the chat template reads no such variable. {f'Did you mean {near[0]}?' if near else 'Remove it.'}"

    def switch_of_plain_answers(self) -> str | None:
        """Return the variable of thinking that must be false for chat to ask as answers without reasoning are trained, or None."""
        question: Message = {"role": "user", "content": _QUESTION}
        chat = Chat([question, {"role": "assistant", "content": _ANSWER}])
        try:
            if not self._switches or self._turn(chat, 1, Form()).prompt == self._apply(
                [question], chat, prompt=True
            ):
                return None
            for name in self._switches:
                prompt = self._apply([question], chat, prompt=True, switch={name: False})
                if prompt.rstrip().endswith("</think>"):
                    return name
        except RowError:
            pass  # the template does not render this chat; rows of another shape have their own errors
        return None

    def prompt(self, chat: Chat) -> str:
        """Render the messages of a chat with the generation prompt for the turn that follows them.

        Raises:
            RowError: The template rejects the messages, or a text of theirs does not reach the rendering.
        """
        self._reject_rendered(chat)
        chat = cast(Chat, self._as_read(chat)[0])
        self._check_greeting(chat)
        chat = replace(chat, messages=self._clean(chat.messages))
        said = self._said(chat.messages)
        errors: list[RowError] = []
        for form in possible_forms(chat, self._template_for(chat.tools)):
            messages = adapted(chat.messages, form, chat.tools)
            try:
                text = self._apply(messages, chat, prompt=True)
                check_context(text, said, _names(chat, len(said)))
                check_tools(text, said, chat.tools)
                if form.parts:
                    check_parts(text, messages)
            except RowError as error:
                errors.append(error)
                continue
            return text
        raise clearest(errors)

    def _plain(self, text: str, begin: int, end: int) -> Rendered:
        """Return text that is tokenized without a chat template, without the BOS token that the tokenizer adds."""
        if self._adds_bos and text.startswith(self._bos):
            cut = len(self._bos)
            text, begin, end = text[cut:], max(0, begin - cut), end - cut
        return Rendered(text, ((begin, end),), ends_the_text=True)

    @property
    def date(self) -> str | None:
        """Return the date that the template prints (ISO 8601), or None if it prints none."""
        return self._now.date().isoformat() if "strftime_now" in self._source else None

    def notes(self, example: Example, sequences: Sequence[Rendered | Tokens]) -> list[str]:
        """Return what the plan counts about a rendered row: special tokens that a user wrote, and texts of tools that are not used.

        Special tokens in the words of a user are tokenized as such.
        """
        last = sequences[-1]
        if not isinstance(example, Chat | Pair) or not isinstance(last, Rendered):
            return []
        notes = list(last.notes)
        messages = example.messages if isinstance(example, Chat) else example.prompt
        if isinstance(example, Chat) and len(messages) - 1 in example.untrained:
            notes.append("messages after the last answer in the loss are removed")
        writers = [
            m["role"] for m in messages if m["role"] != "assistant" and self._special.search(m["content"])
        ]
        if writers:
            notes.append(f"{writers[0]} messages contain special tokens of the tokenizer")
        notes += self._notes_of_answers(example)
        thoughts = (thought_of(m)[0].strip() for m in messages if m["role"] == "assistant")
        texts = [sequence.text for sequence in sequences if isinstance(sequence, Rendered)]
        if any(thought and not any(thought in text for text in texts) for thought in thoughts):
            notes.append("reasoning of earlier turns that are not in the loss is not in the rendering")
        if any("name" in m and m["name"] not in last.text for m in messages):
            notes.append("`name` of messages is not in the rendering of the chat template")
        notes += [
            f"`{name}` of chat_template_kwargs: {self._unknown(name)}"
            for name in example.variables
            if name not in self._known_variables
        ]
        if example.tools and drops_tool_texts(last.text, example.tools):
            notes.append("some texts of `tools` are not in the rendering of the chat template")
        return notes

    def _notes_of_answers(self, example: Chat | Pair) -> list[str]:
        """Return what the plan counts about special tokens in the words of the assistant."""
        messages = example.messages if isinstance(example, Chat) else [*example.chosen, *example.rejected]
        written = [m for m in messages if m["role"] == "assistant" and self._special.search(m["content"])]
        if not written:
            return []
        kept = [self._without_stop(message) for message in written]
        found = {token for message in kept for token in self._special.findall(message["content"])}
        notes = []
        if kept != written:
            notes.append("end tokens at the end of assistant messages are removed")
        if stops := sorted(found.intersection(self._stops)):
            notes.append(
                f"assistant messages contain the end token {stops[0]} before their end, so the model learns to write on after it"
            )
        elif found:
            notes.append("assistant messages contain special tokens of the tokenizer")
        return notes

    def _reject_rendered(self, example: Chat | Pair) -> None:
        """Raise RowError for a message that the chat template, or another one, has rendered already."""
        sides = (example.chosen, example.rejected) if isinstance(example, Pair) else ()
        chats = [Chat([*example.prompt, *side]) for side in sides] if isinstance(example, Pair) else [example]
        for chat in chats:
            is_first = True
            for index, message in enumerate(chat.messages):
                if found := self._headers.found_in(message, is_first=is_first):
                    raise RowError(
                        "rendered already",
                        f"{chat.name_of(index)} {found}, so it is rendered already and the chat template would wrap it again. Use the "
                        "format `text` (task: causal_lm), a prompt_template, or messages without the template's tokens",
                    )
                is_first &= message["role"] == "assistant"

    def _as_read(self, example: Chat | Pair) -> tuple[Chat | Pair, tuple[str, ...]]:
        """Return an example with tools and instructions in the shape that the template reads, and notes about what was changed."""
        if example.tools and (tools := self._readable_tools(example.tools)) != example.tools:
            example = replace(example, tools=tools)
        notes: tuple[str, ...] = ()
        if (shorter := without_empty_thoughts(example)) is not None and self._has_own_thoughts:
            example = shorter
            notes = (
                "empty thoughts in <think> are removed, because the chat template writes thoughts in another form",
            )
        called = with_structured_calls(example)
        if called and self._has_own_calls and (example.tools or self._rejects_written_calls):
            has_words = any("tool_calls" in m and m["content"] for m in messages_of(called))
            # Where words beside a call would be dropped, calls stay text if the template renders their results.
            if not has_words or self._rejects_written_calls or self._renders_words_beside_calls:
                example = called
                notes = (
                    *notes,
                    "calls in <tool_call> are read as tool_calls, because the chat template writes calls in another form",
                )
        joined = with_one_instruction(example)
        if joined is None or self._renders_two_instructions:
            return example, notes
        return joined, (*notes, "system and developer messages are merged")

    @cached_property
    def _has_own_calls(self) -> bool:
        """Return whether the template renders calls, but not as JSON in <tool_call> tags."""
        text = self._probe_call("")
        return bool(text) and _JSON_IN_TAGS.search(text) is None

    @cached_property
    def _renders_words_beside_calls(self) -> bool:
        """Return whether the template renders a message with words and calls."""
        return bool(self._probe_call(_ANSWER))

    def _probe_call(self, words: str) -> str:
        """Render a call with words beside it, in the first form in which they and the call are rendered; empty if none is."""
        argument = "Tromsø"
        function = {"name": _PROBED_TOOL, "arguments": {"name": argument}}
        call: Message = {
            "role": "assistant",
            "content": words,
            "tool_calls": [{"type": "function", "function": function}],
        }
        chat = Chat([{"role": "user", "content": _QUESTION}, call])
        for form in possible_forms(chat, self._source):
            try:
                text = self._apply(adapted(chat.messages, form, None), chat)
            except RowError:
                continue
            if all(part in text for part in (_PROBED_TOOL, argument, words)):
                return text
        return ""

    @cached_property
    def _rejects_written_calls(self) -> bool:
        """Return whether the template renders no result of a call that stands in the text of an answer."""
        said = (("user", _QUESTION), ("assistant", "<tool_call>"), ("tool", _ANSWER), ("assistant", _THOUGHT))
        return _ANSWER not in self._probe(*said)

    @cached_property
    def _has_own_thoughts(self) -> bool:
        """Return whether the template renders reasoning, but not in <think> tags (gpt-oss, Gemma 4)."""
        if "</think>" in self._source:
            return False
        question: Message = {"role": "user", "content": _QUESTION}
        for key in REASONING_KEYS:
            answer: Message = {"role": "assistant", "content": _ANSWER, key: _THOUGHT}
            try:
                text = self._apply([question, answer], Chat([]))
            except RowError:
                continue
            if _THOUGHT in text:
                return True
        return False

    def _readable_tools(self, tools: list[Tool]) -> list[Tool]:
        """Return tools in OpenAI's form, and with a description, if the template reads no others."""
        if any("function" not in tool for tool in tools) and self._wraps_tools:
            tools = [as_function(tool) for tool in tools]
        if self._needs_descriptions:
            tools = [
                {**tool, "function": {"description": "", **tool["function"]}}
                if isinstance(tool.get("function"), dict)
                else tool
                for tool in tools
            ]
        return tools

    @cached_property
    def _wraps_tools(self) -> bool:
        """Return whether the template reads functions in OpenAI's form only."""
        tool = {"name": _PROBED_TOOL, "description": "", "parameters": {"type": "object", "properties": {}}}
        return not self._prints_tool(tool) and self._prints_tool(as_function(tool))

    @cached_property
    def _needs_descriptions(self) -> bool:
        """Return whether the template rejects a function without a description."""
        tool = {"name": _PROBED_TOOL, "parameters": {"type": "object", "properties": {}}}
        return not self._prints_tool(as_function(tool)) and self._prints_tool(
            as_function({**tool, "description": ""})
        )

    def _prints_tool(self, tool: Tool) -> bool:
        try:
            text = self._apply([{"role": "user", "content": _QUESTION}], Chat([], [tool]), prompt=True)
        except RowError:
            return False
        return _PROBED_TOOL in text

    @cached_property
    def _knows_developer(self) -> bool:
        """Return whether the template renders developer messages; some only have the word (Cohere 2)."""
        text = "Be kind."
        return "developer" in self._source and text in self._probe(("developer", text), ("user", _QUESTION))

    @cached_property
    def _renders_two_instructions(self) -> bool:
        """Return whether the template renders a developer message after a system message."""
        texts = ("Be brief.", "Be kind.")
        roles = ("system", "developer" if self._knows_developer else "system")
        return all(
            text in self._probe(*zip(roles, texts, strict=True), ("user", _QUESTION)) for text in texts
        )

    def _clean(self, messages: list[Message]) -> list[Message]:
        """Give developer messages the role that the template knows, and remove tags of results and end tokens that the row brings."""
        if self._wraps_results and any(is_wrapped(message) for message in messages):
            messages = [unwrapped(message) if is_wrapped(message) else message for message in messages]
        if not self._knows_developer and any(message["role"] == "developer" for message in messages):
            messages = [
                {**message, "role": "system"} if message["role"] == "developer" else message
                for message in messages
            ]
        if not any(
            m["role"] == "assistant" and m["content"].rstrip().endswith(self._stops) for m in messages
        ):
            return messages
        return [
            self._without_stop(message) if message["role"] == "assistant" else message for message in messages
        ]

    def _without_stop(self, message: Message) -> Message:
        content = message["content"].rstrip()
        stop = next((stop for stop in self._stops if content.endswith(stop)), None)
        if stop is None or content == stop:
            return message
        return {**message, "content": content[: -len(stop)]}

    def _clean_pair(self, pair: Pair) -> Pair:
        return replace(
            pair,
            prompt=self._clean(pair.prompt),
            chosen=[self._without_stop(message) for message in pair.chosen],
            rejected=[self._without_stop(message) for message in pair.rejected],
        )

    # --- Chats ---

    def _chat(self, chat: Chat) -> tuple[Rendered, ...]:
        """Render the trained turns of a chat as few sequences as give each turn its own context."""
        trained = [k for k in answers_of(chat.messages) if k not in chat.untrained]
        if self._turns == "last":
            trained = trained[-1:]
        chat = (
            replace(chat, messages=chat.messages[: trained[-1] + 1])
            if trained[-1] + 1 < len(chat.messages)
            else chat
        )
        signature = (
            bool(chat.tools),
            *(m["role"] if len(m) == 2 else (*m, m["role"]) for m in chat.messages),
        )
        if not chat.variables:
            if signature not in self._appends:
                self._appends[signature] = self._is_one_sequence(chat)
            if self._appends[signature] and (whole := self._appended(chat, trained)):
                return (whole,)
        sequences = self._split(chat, trained)
        if self._turns == "all" and len(sequences) > 1:
            raise RowError(
                "several contexts",
                f"needs {len(sequences)} sequences, because the chat template renders earlier turns differently once others follow. Set "
                "turns: auto (each turn in its own context) or last",
            )
        return sequences

    def _is_one_sequence(self, chat: Chat) -> bool:
        """Return whether one rendering holds all turns of a chat, each in its own context."""
        answers = answers_of(chat.messages)
        whole = self._appended(chat, answers)
        try:
            return whole is not None and self._split(chat, answers) == (whole,)
        except RowError:
            return False

    def _split(self, chat: Chat, trained: Sequence[int]) -> tuple[Rendered, ...]:
        """Return the sequences of a chat in the order of their last turns."""
        turns = self._turns_of(chat, trained)
        sequences: list[tuple[str, list[Span]]] = []
        for turn in reversed(turns):
            for text, spans in sequences:
                if text.startswith(turn.text[: turn.end]) and turn.end <= spans[0][0]:
                    spans.insert(0, (turn.begin, turn.end))
                    break
            else:
                sequences.append((turn.text, [(turn.begin, turn.end)]))
        return tuple(Rendered(text, tuple(spans)) for text, spans in reversed(sequences))

    def _appended(self, chat: Chat, trained: Sequence[int]) -> Rendered | None:
        """Render a chat once and find its answers word for word, or return None.

        The result counts only for templates and kinds of chats for which it equals that of `_split`.
        """
        if not (self.header and self.end_marker):
            return None
        try:
            whole = self._apply(chat.messages, chat)
        except RowError:
            return None
        answers = answers_of(chat.messages)
        # The count makes sure that message content is never mistaken for a header.
        if whole.count(self.header) != len(answers) or any(mark in whole for mark in _RULES_DEPEND_ON):
            return None
        spans: list[Span] = []
        cursor = 0
        for index in answers:
            begin = whole.index(self.header, cursor) + len(self.header)
            end = _end_of(whole, begin, chat.messages[index], self.end_marker)
            if end is None:
                return None
            if index in trained:
                spans.append((begin, end))
            cursor = end
        for message in chat.messages:
            if message["role"] != "assistant" and message["content"].strip() not in whole:
                return None
        return Rendered(whole, tuple(spans))

    def _turns_of(self, chat: Chat, trained: Sequence[int]) -> list[_Turn]:
        """Return the turns in the first form in which every text of the row reaches the rendering."""
        features = features_of(chat)
        errors: list[RowError] = []
        known = self._forms.get(features)
        forms = [form for form in possible_forms(chat, self._template_for(chat.tools)) if form != known]
        for form in [known, *forms] if known else forms:
            try:
                turns = [self._turn(chat, index, form) for index in trained]
                before = self._said(chat.messages[: trained[-1]])
                check_context(turns[-1].prompt, before, _names(chat, len(before)))
                check_tools(turns[0].prompt, self._said(chat.messages[: trained[0]]), chat.tools)
            except RowError as error:
                errors.append(error)
                continue
            self._forms[features] = form
            return turns
        raise clearest(errors)

    def _turn(self, chat: Chat, index: int, form: Form, *, thinks: bool | None = None) -> _Turn:
        """Return the assistant turn at an index, which ends the rendering.

        Args:
            chat: The chat.
            index: Index of the turn.
            form: How messages are handed to the template.
            thinks: True if the turn is asked for with thinking; None: if it has reasoning.
        """
        messages = adapted(chat.messages[: index + 1], form, chat.tools)
        answer = chat.messages[index]
        reasoning = thought_of(answer)[0]
        # A row may write an empty thought itself; in a pair of which one answer has reasoning, the other is an answer without.
        keeps_empty_thought = bool(thinks) or EMPTY_THOUGHT.match(answer["content"]) is not None
        if thinks is None:
            thinks = bool(reasoning) or keeps_empty_thought
        renderings = _Renderings(self._apply, messages, chat)
        turn = self._asked(renderings, chat, thinks=thinks)
        if turn is None or (
            reasoning and reasoning.strip() not in turn.completion and form.reasoning is None
        ):
            turn = self._continued(renderings, chat, reasoning)
        if not keeps_empty_thought:
            turn = _without_empty_thought(turn, answer["content"])
        check_answer(turn.completion, answer, chat.name_of(index))
        if form.parts:
            check_parts(turn.text, messages)
        if end := self.next_headers.get("tool" if "tool_calls" in answer else "user"):
            text = turn.text[: turn.end] + end  # what the model is to write after its answer
            return _Turn(text, turn.begin, len(text))
        return turn

    def _closes_the_thought(self, chat: Chat, index: int) -> str:
        """Return the error for reasoning after a prompt that asks for none, with the variables that make the prompt do so."""
        given = {**self._variables, **chat.variables}
        shown = ", ".join(f"{key}: {json.dumps(value, default=str)}" for key, value in given.items())
        cause = f"chat_template_kwargs {{{shown}}}" if shown else "the chat template"
        return (
            f"{chat.name_of(index)} has reasoning, but the prompt that {cause} gives asks for an answer without reasoning. Remove the "
            f"reasoning, or {'change chat_template_kwargs' if shown else 'set chat_template'}"
        )

    def _asked(self, renderings: "_Renderings", chat: Chat, *, thinks: bool) -> _Turn | None:
        """Return the turn after its generation prompt, or None if the rendering does not begin with that prompt.

        Without thinking, the generation prompt that turns thinking off is preferred if the rendering begins with it.
        """
        usual = renderings.whole()
        found: list[tuple[bool, int, _Turn]] = []
        for switch in self._settings_of_switches(chat, on=thinks):
            prompt = renderings.prompt(switch)
            text = renderings.whole(switch)
            end = len(text.rstrip())
            if thinks and prompt.rstrip().endswith("</think>"):
                continue  # this prompt asks for an answer without reasoning
            if text.startswith(prompt) and len(prompt) < end:
                found.append((text == usual, len(prompt), _Turn(text, len(prompt), end)))
        if not found:
            return None
        if thinks:
            return found[0][2]
        return max(found, key=lambda entry: entry[:2])[2]

    def _settings_of_switches(self, chat: Chat, *, on: bool) -> list[dict[str, bool]]:
        """Return the template's default, and each switch of thinking that the row leaves open."""
        return [{}, *({name: on} for name in self._switches if name not in chat.variables)]

    def _continued(self, renderings: "_Renderings", chat: Chat, reasoning: str) -> _Turn:
        """Return a turn whose rendering does not begin with its generation prompt: what stands after its header, after the prompt.

        Such templates change earlier turns once another follows, cut reasoning out, or open a thought in the generation prompt.
        """
        messages, before = renderings.messages, renderings.before()
        prompts = list(map(renderings.prompt, self._settings_of_switches(chat, on=bool(reasoning))))
        opened = [prompt for prompt in prompts if prompt.rstrip().endswith("<think>")]
        prompt = opened[0] if reasoning and opened else prompts[0]
        if reasoning and prompt.rstrip().endswith("</think>"):
            raise RowError("reasoning", self._closes_the_thought(chat, len(messages) - 1))
        text = renderings.whole()
        is_open = prompt.rstrip().endswith("<think>")
        header = prompt[len(before) :] if prompt.startswith(before) else ""
        if is_open and "<think>" in header:
            header = header[: header.rindex("<think>")]
        question = messages[-2]["content"] if len(messages) > 1 else ""
        if not header and isinstance(question, str) and question.strip():
            header = prompt.rpartition(question.strip())[2].strip()
        place = _place_after(prompt.rpartition(header)[0], header, text) if header else -1
        if place < 0:
            raise RowError(OTHER_CONTEXT, _not_a_prefix(len(messages) - 1))
        completion = text[place + len(header) :]
        writes_thoughts = is_open or "</think>" in self._template_for(chat.tools)
        if is_open or (writes_thoughts and reasoning and reasoning.strip() not in completion):
            opening = "" if is_open else "<think>\n"
            answer = split_thought(completion)[1].lstrip().removeprefix("</think>").lstrip()
            completion = f"{opening}{reasoning.strip()}\n</think>\n\n{answer}"
        whole = prompt + completion
        return _Turn(whole, len(prompt), len(whole.rstrip()))

    def _said(self, messages: list[Message]) -> list[Message]:
        """Return messages without the words of a system message that the template reads as a switch (SmolLM3)."""
        if not self._directives or not messages or messages[0]["role"] != "system":
            return messages
        content = messages[0]["content"]
        for directive in self._directives:
            content = content.replace(directive, "")
        return [{**messages[0], "content": content}, *messages[1:]]

    # --- Other examples ---

    def _whole(self, chat: Chat) -> Rendered:
        """Render a chat that is trained on every token."""
        errors: list[RowError] = []
        for form in possible_forms(chat, self._template_for(chat.tools)):
            messages = adapted(chat.messages, form, chat.tools)
            try:
                whole = self._apply(messages, chat)
                check_context(whole, self._said(chat.messages), _names(chat, len(chat.messages)))
                check_tools(whole, self._said(chat.messages), chat.tools)
                if form.parts:
                    check_parts(whole, messages)
                for index in answers_of(chat.messages):
                    check_answer(whole, chat.messages[index], chat.name_of(index))
            except RowError as error:
                errors.append(error)
                continue
            return Rendered(whole, ((0, len(whole)),))
        error = clearest(errors)
        raise RowError(
            error.kind,
            f"{error}. task: causal_lm renders the conversation once; task: instruction_tuning trains each answer in its own context",
        )

    def _pair(self, pair: Pair) -> tuple[Rendered, ...]:
        """Render the conversations of a pair after the same prompt: two, or one of an unpaired row."""
        chats = [
            Chat([*pair.prompt, *side], pair.tools, variables=pair.variables)
            for side in (pair.chosen, pair.rejected)
            if side
        ]
        index = len(pair.prompt)
        thinks = any(thought_of(chat.messages[index])[0] for chat in chats)
        errors: list[RowError] = []
        for form in possible_forms(
            Chat([*pair.prompt, *pair.chosen, *pair.rejected], pair.tools), self._template_for(pair.tools)
        ):
            try:
                turns = [self._turn(chat, index, form, thinks=thinks or None) for chat in chats]
                check_context(turns[0].prompt, self._said(pair.prompt), _names(chats[0], index))
                check_tools(turns[0].prompt, self._said(pair.prompt), pair.tools)
            except RowError as error:
                errors.append(error)
                continue
            if turns[0].prompt != turns[-1].prompt:
                errors.append(
                    RowError(
                        "template", "the chat template renders the prompt of the two answers differently"
                    )
                )
                continue
            if len(turns) == 2 and turns[0].completion == turns[1].completion:
                raise RowError(
                    "nothing to prefer", "the chat template renders `chosen` and `rejected` to the same text"
                )
            return tuple(Rendered(turn.text[: turn.end], ((turn.begin, turn.end),)) for turn in turns)
        raise clearest(errors)

    # --- The template ---

    def _template_for(self, tools: list[dict[str, Any]] | None) -> str:
        """Return the template of rows with or without tools; models may have one for each."""
        return str(self._tokenizer.get_chat_template(None, tools)) if self._tokenizer.chat_template else ""

    def _apply(
        self,
        messages: list[Message],
        chat: Chat,
        *,
        prompt: bool = False,
        switch: Mapping[str, bool] | None = None,
    ) -> str:
        """Render messages with the tools and the variables of a chat."""
        try:
            # Equivalent to tokenizer.apply_chat_template, without its constant work per row.
            template = _compiled(self._tokenizer.get_chat_template(None, chat.tools))
        except TemplateSyntaxError as error:
            raise DataError(
                f"the chat template has a syntax error ({error}, template line {error.lineno}). Copy the tokenizer files again from the "
                "original model, or fix chat_template."
            ) from error
        render = partial(
            template.render,
            tools=chat.tools,
            documents=None,
            strftime_now=self._now.strftime,
            add_generation_prompt=prompt,
            **self._special_tokens,
            **{**self._variables, **chat.variables, **(switch or {})},
        )
        try:
            return render(messages=messages)
        except _TEMPLATE_ERRORS as error:
            index = _rejected_message(render, messages, error)
            raise RowError("template", _rejection(chat, index, error)) from error

    def _end_of_earlier_turns(self) -> str:
        """Return the special token after an answer that another turn follows: of gpt-oss, another one than after the last answer."""
        if not self._source:
            return ""
        question: Message = {"role": "user", "content": _QUESTION}
        try:
            whole = self._apply([question, {"role": "assistant", "content": _ANSWER}, question], Chat([]))
        except RowError:
            return ""
        found = self._special.match(whole.rpartition(_ANSWER)[2].lstrip())
        return found[0] if found else ""

    def _first_tokens_of_next_turns(self) -> dict[str, str]:
        """Return the special tokens that follow an answer without an end marker (GLM-4.5), by the role of the next turn."""
        if not self.header or self.end_marker:
            return {}
        question: Message = {"role": "user", "content": _QUESTION}
        arguments = {"name": _ANSWER}
        call: Message = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": _PROBED_TOOL, "arguments": arguments}}],
        }
        found: dict[str, str] = {}
        for role, answer in (("user", {"role": "assistant", "content": _ANSWER}), ("tool", call)):
            try:
                asked = self._apply([question, answer], Chat([])).rstrip()
                whole = self._apply([question, answer, {"role": role, "content": _QUESTION}], Chat([]))
            except RowError:
                continue
            token = self._special.match(whole.removeprefix(asked).lstrip())
            if whole.startswith(asked) and token and token[0] != self._bos:
                found[role] = token[0]
        return found

    def _find_headers(self) -> Headers:
        """Find the headers of turns in renderings of a question and an answer."""
        question, answer = ("user", _QUESTION), ("assistant", _ANSWER)
        asked, prompt = self._probe(question), self._probe(question, prompt=True)
        before, _, after = prompt.partition(_QUESTION)
        between = self._probe(question, answer, question).rpartition(_ANSWER)[2].rpartition(_QUESTION)[0]
        between = between.lstrip()
        marker = self.end_marker.strip()
        end = self._special.match(between)
        if marker and between.startswith(marker):
            between = between.removeprefix(marker)
        elif end:
            between = between[end.end() :]
        return Headers(
            before=before,
            after=after,
            asking=prompt[len(asked) :] if prompt.startswith(asked) else "",
            between=between.lstrip(),
            bos=self._bos,
            stops=self._stops,
        )

    def _probe(self, *said: tuple[str, str], prompt: bool = False) -> str:
        """Render messages of roles and texts, with content as text or as parts; empty if the template rejects both."""
        messages: list[Message] = [{"role": role, "content": text} for role, text in said]
        for form in (Form(), Form(parts=True)) if self._source else ():
            try:
                text = self._apply(adapted(messages, form, None), Chat([]), prompt=prompt)
            except RowError:
                continue
            if _QUESTION in text:
                return text
        return ""

    def _surroundings(self) -> tuple[str, str]:
        """Return the text before and after an answer, or two empty strings if the template does more than append."""
        if not self._source:
            return "", ""
        question: Message = {"role": "user", "content": _QUESTION}
        try:
            asked = self._apply([question], Chat([]))
            prompt = self._apply([question], Chat([]), prompt=True)
            whole = self._apply([question, {"role": "assistant", "content": _ANSWER}], Chat([]))
        except RowError:
            return "", ""
        answer = whole.find(_ANSWER, len(prompt))
        if not (prompt.startswith(asked) and whole.startswith(prompt) and answer >= 0):
            return "", ""
        return prompt[len(asked) :], whole[answer + len(_ANSWER) :].rstrip()


def _rejected_message(render: Callable[..., str], messages: list[Message], error: Exception) -> int | None:
    """Return the index of the first message with which a template raises an error, or None if it does so without the messages."""
    for count in range(len(messages) + 1):
        try:
            render(messages=messages[:count] or [{"role": "user", "content": _QUESTION}])
        except _TEMPLATE_ERRORS as earlier:
            if str(earlier) == str(error):
                return count - 1 if count else None
    return len(messages) - 1


def _rejection(chat: Chat, index: int | None, error: Exception) -> str:
    """Return the error for a row that a template rejects, with the message and what to do about it."""
    if index is None:
        return f"cannot be rendered by the chat template, whatever the messages are ({error}). Set chat_template, or change `tools` or chat_template_kwargs"
    if index >= len(chat.messages):
        return f"is rejected by the chat template ({error}). Set chat_template, or fix the row"
    message = chat.messages[index]
    if (
        index
        and message["role"] in ("system", "developer")
        and chat.messages[0]["role"] in ("system", "developer")
    ):
        fix = f"Move its text into {chat.name_of(0)}"
    elif message["role"] in ("system", "developer"):
        fix = "Move its text into the first user message, or use a model whose template has system messages"
    elif message["role"] == "tool" or "tool_calls" in message:
        fix = "Use a model whose template renders tool calls, or set chat_template"
    else:
        fix = "Fix or remove the message, or set chat_template"
    return f"{chat.name_of(index)} is rejected by the chat template ({error}). {fix}"


def _names(chat: Chat, count: int) -> list[str]:
    """Return the names of the first messages of a chat in errors."""
    return [chat.name_of(index) for index in range(count)]


def _text_of(token: Any) -> str:
    return token if isinstance(token, str) else ""


def _special_tokens(tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    """Return the texts of the special tokens, longest first."""
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted(special, key=len, reverse=True)


def _names_in(source: str) -> set[str]:
    """Return the names that a template reads as variables, which are not those of attributes, strings and comments."""
    tokens = [
        (kind, text) for _, kind, text in Environment(autoescape=True).lex(source) if kind != "whitespace"
    ]
    return {text for (_, before), (kind, text) in pairwise(tokens) if kind == "name" and before != "."}


@lru_cache
def _compiled(chat_template: str) -> Template:
    """Compile a template with transformers' sandbox and globals, merged once; Jinja would merge them for every row."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment = _compile_jinja_template(chat_template).environment
    checked = environment.getattr

    def get(obj: Any, attribute: str) -> Any:
        # The sandbox takes a tenth of a row's time to find that the numbers of a loop are safe.
        is_safe = type(obj) is LoopContext and attribute in _LOOP
        return getattr(obj, attribute) if is_safe else checked(obj, attribute)

    environment.getattr = get  # pyright: ignore[reportAttributeAccessIssue]
    return Template.from_code(environment, environment.compile(chat_template), dict(environment.globals))


def _place_after(before: str, header: str, text: str) -> int:
    """Return where a header stands in a text after the end of what precedes it in another, or -1.

    A turn may repeat its header (gpt-oss: once for each channel), so the place after which most of `before` stands is taken.
    """
    best, place, found = -1, text.find(header), -1
    while place >= 0:
        ends = zip(reversed(before), reversed(text[:place]), strict=False)
        alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends))
        if alike >= best:
            best, found = alike, place
        place = text.find(header, place + 1)
    return found


def _without_empty_thought(turn: _Turn, content: str) -> _Turn:
    """Move an empty thought that the template inserts from the completion to the prompt: the model is not asked for it."""
    is_open = turn.prompt.rstrip().endswith("<think>")
    found = (_END_OF_EMPTY_THOUGHT if is_open else EMPTY_THOUGHT).match(turn.text, turn.begin, turn.end)
    if found is None or found.end() >= turn.end:
        return turn
    begin = turn.text.find(content, found.end(), turn.end)  # the answer keeps its own whitespace
    if not content or begin < 0 or turn.text[found.end() : begin].strip():
        rest = turn.text[found.end() : turn.end]
        begin = turn.end - len(rest.lstrip())
    return _Turn(turn.text, begin, turn.end)


def _end_of(whole: str, begin: int, message: Message, marker: str) -> int | None:
    """Return where the end marker after an answer ends, or None if the answer is not rendered verbatim."""
    if len(message) > 2:
        return None  # tool calls come between the content and the marker
    content = message["content"]
    for text in (content, content.strip()):
        if whole.startswith(text + marker, begin):
            return begin + len(text) + len(marker)
    return None


def _up_to_label(rendered: Rendered, label: str) -> Rendered:
    """Cut a sequence after the label that ends it, which alone is trained."""
    begin = rendered.text.find(label, *rendered.spans[-1])
    end = begin + len(label)
    return Rendered(rendered.text[:end], ((begin, end),))


def _not_a_prefix(index: int) -> str:
    return (
        f"the chat template does not render message {index + 1} directly after its generation prompt, so the model would be trained on a "
        "context that it is never asked in. Set chat_template to a template that only appends messages"
    )
