"""Rendering of rows: each assistant turn in the context in which the model will be asked for it.

The prompt of a turn is the template's rendering of the messages before it, with the generation prompt. The completion is what
follows the prompt in the rendering that ends with the turn, end marker included.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from itertools import chain, pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast, overload

from training.data.chat_template import QUESTION, ChatTemplate
from training.data.errors import RowError, short
from training.data.records import Chat, Example, Filled, Message, Pair, Text, Tokens, Turns
from training.data.rendered import Rendered, Span
from training.data.template_checks import (
    DROPPED_TEXT,
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
    has_reasoning,
    is_wrapped,
    linked,
    map_messages,
    messages_of,
    possible_forms,
    split_thought,
    thought_of,
    unwrapped,
    with_one_instruction,
    without_empty_thoughts,
    without_greeting,
)
from training.data.template_headers import headers_in, headings_in
from training.data.template_traits import ANSWER, THOUGHT, TemplateTraits
from training.data.tools import Tool, as_function
from training.data.written_calls import with_tool_calls, writes_calls

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A row whose text contains these may be rendered by other rules than a row of the same roles without them.
_RULES_DEPEND_ON = ("think>", "<tool_", "[TOOL_")
_EXCLUDED_GREETING = "assistant messages before the first user message are excluded, because the chat template does not render them"
_CALLS_READ = "calls in the text of answers are read as tool_calls, because the chat template writes calls in another form"
_CALLS_LEFT = (
    "calls in the text of answers are left as text, although the chat template writes calls in another form"
)
_END_OF_EMPTY_THOUGHT = re.compile(r"\s*</think>")


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
        """Find out what the chat template reads and prints.

        Args:
            tokenizer: Tokenizer with its chat template.
            whole_text: True to train on every token instead of the answers only.
            turns: auto: every turn in its own context; last: only the last turn; all: every turn, in one sequence.
            variables: Variables of the template (`chat_template_kwargs`).
            today: Date that the template prints, if it prints one; None: the date of each rendering.
        """
        self._tokenizer = tokenizer
        self._whole_text = whole_text
        self._turns = turns
        self.template = ChatTemplate(tokenizer, variables or {}, today)
        self.traits = TemplateTraits(self.template, tokenizer)
        self._adds_bos = bool(self.traits.bos) and tokenizer.encode("")[:1] == [tokenizer.bos_token_id]
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
            notes = (*notes, _EXCLUDED_GREETING)
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
        if self.template.render(begin, chat) == self.template.render(asked, chat):
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
            return (self._up_to_label(self._chat(last_only)[-1], str(example.messages[-1]["content"])),)
        return self._chat(example)

    def _up_to_label(self, rendered: Rendered, label: str) -> Rendered:
        """Cut a sequence after the label that ends it, which alone is trained."""
        begin, end = rendered.spans[-1]
        completion = rendered.text[begin:end].removesuffix(self.traits.end_marker)
        # Special tokens may hold the label's text ("end" in <|im_end|>), and so may what the template writes before it.
        hidden = self.traits.special.sub(
            lambda found: found[0] if found[0] in label else "\0" * len(found[0]), completion
        )
        begin += hidden.rindex(label)
        return Rendered(rendered.text[: begin + len(label)], ((begin, begin + len(label)),))

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

    def switch_of_plain_answers(self) -> str | None:
        """Return the variable of thinking that must be false for chat to ask as answers without reasoning are trained, or None."""
        question: Message = {"role": "user", "content": QUESTION}
        chat = Chat([question, {"role": "assistant", "content": ANSWER}])
        try:
            if not self.traits.switches or self._turn(chat, 1, Form()).prompt == self.template.render(
                [question], chat, prompt=True
            ):
                return None
            for name in self.traits.switches:
                prompt = self.template.render([question], chat, prompt=True, switch={name: False})
                if prompt.rstrip().endswith("</think>"):
                    return name
        except RowError:
            pass  # the template does not render this chat; rows of another shape have their own errors
        return None

    def switch_of_reasoning(self) -> str | None:
        """Return the variable of thinking that must be true for chat to ask as answers with reasoning are trained, or None."""
        question: Message = {"role": "user", "content": QUESTION}
        answer: Message = {"role": "assistant", "content": ANSWER, "reasoning_content": THOUGHT}
        chat = Chat([question, answer])
        try:
            trained = self._turns_of(chat, [1])[0].prompt if self.traits.switches else ""
            prompts = {
                name: self.template.render([question], chat, prompt=True, switch={name: True})
                for name in self.traits.switches
            }
            if trained == self.template.render([question], chat, prompt=True):
                return None
        except RowError:
            return None  # the template renders no reasoning; rows that have it have their own errors
        return next((name for name, prompt in prompts.items() if prompt == trained), None)

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
        forms = possible_forms(chat, self.template.source_for(chat.tools))
        if has_reasoning(chat):
            # The template may drop the reasoning of earlier turns, so that no check finds the form that it reads.
            forms = sorted(forms, key=lambda form: form.reasoning != self.traits.reasoning_form)
        for form in forms:
            messages = adapted(chat.messages, form, chat.tools)
            try:
                text = self.template.render(messages, chat, prompt=True)
                check_context(text, said, _names(chat, len(said)))
                check_tools(text, said, chat.tools)
                if form.has_parts:
                    check_parts(text, messages)
            except RowError as error:
                errors.append(error)
                continue
            return text
        raise clearest(errors)

    def _plain(self, text: str, begin: int, end: int) -> Rendered:
        """Return text that is tokenized without a chat template, without the BOS token that the tokenizer adds."""
        if self._adds_bos and text.startswith(self.traits.bos):
            cut = len(self.traits.bos)
            text, begin, end = text[cut:], max(0, begin - cut), end - cut
        return Rendered(text, ((begin, end),), ends_the_text=True)

    def notes(self, example: Example, sequences: Sequence[Rendered | Tokens]) -> list[str]:
        """Return what the plan counts about a rendered row: special tokens that a user wrote, and texts of tools that are not used.

        Special tokens in the words of a user are tokenized as such.
        """
        last = sequences[-1]
        if not isinstance(last, Rendered):
            return []
        if not isinstance(example, Chat | Pair):
            return self._notes_of_headers(headers_in(last.text), "the text")
        said = messages_of(example)
        words = "\n".join(m["content"] for m in said)
        asked = (heading for m in said if m["role"] == "user" for heading in headings_in(m["content"]))
        notes = [*last.notes, *self._notes_of_headers(chain(headers_in(words), asked), "messages")]
        messages = example.messages if isinstance(example, Chat) else example.prompt
        if isinstance(example, Chat) and len(messages) - 1 in example.untrained:
            notes.append("messages after the last answer in the loss are removed")
        if self.traits.special.search(words):
            notes += self._notes_of_special_tokens(messages)
            notes += self._notes_of_answers(example)
        thoughts = (thought_of(m)[0].strip() for m in messages if m["role"] == "assistant")
        texts = [sequence.text for sequence in sequences if isinstance(sequence, Rendered)]
        if any(thought and not any(thought in text for text in texts) for thought in thoughts):
            notes.append("reasoning of earlier turns that are not in the loss is not in the rendering")
        if any("name" in m and m["name"] not in last.text for m in messages):
            notes.append("`name` of messages is not in the rendering of the chat template")
        notes += [
            f"`{name}` of chat_template_kwargs: {self.template.explain_unknown(name)}"
            for name in example.variables
            if name not in self.template.known_variables
        ]
        if example.tools and drops_tool_texts(last.text, example.tools):
            notes.append("some texts of `tools` are not in the rendering of the chat template")
        return notes

    def _notes_of_headers(self, headers: Iterable[str], what: str) -> list[str]:
        """Return what the plan counts about texts that another chat template has rendered."""
        for header in headers:
            if header not in self.template.source and not self.traits.special.fullmatch(header):
                return [
                    f"{header} in {what} begins a turn of another chat template, and is plain text for this model"
                ]
        return []

    def _notes_of_special_tokens(self, messages: Iterable[Message]) -> list[str]:
        """Return what the plan counts about special tokens in the words of others than the assistant."""
        for message in messages:
            if message["role"] != "assistant" and self.traits.special.search(message["content"]):
                return [f"{message['role']} messages contain special tokens of the tokenizer"]
        return []

    def _notes_of_answers(self, example: Chat | Pair) -> list[str]:
        """Return what the plan counts about special tokens in the words of the assistant."""
        messages = example.messages if isinstance(example, Chat) else [*example.chosen, *example.rejected]
        written = [
            m for m in messages if m["role"] == "assistant" and self.traits.special.search(m["content"])
        ]
        if not written:
            return []
        kept = [self._without_stop(message) for message in written]
        found = {token for message in kept for token in self.traits.special.findall(message["content"])}
        notes = []
        if kept != written:
            notes.append("end tokens at the end of assistant messages are removed")
        if stops := sorted(found.intersection(self.traits.stops)):
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
                if found := self.traits.headers.found_in(message, is_first=is_first):
                    raise RowError(
                        "rendered already",
                        f"{chat.name_of(index)} {found}, so it is rendered already and the chat template would wrap it again. Use the "
                        "format `text` (task: causal_lm), a prompt_template, or messages without the template's tokens",
                    )
                is_first &= message["role"] == "assistant"

    def _as_read(self, example: Chat | Pair) -> tuple[Chat | Pair, tuple[str, ...]]:
        """Return an example with tools and instructions in the shape that the template reads, and notes about what was changed."""
        self._reject_dropped_variables(example)
        if example.tools and (tools := self._readable_tools(example.tools)) != example.tools:
            example = replace(example, tools=tools)
        notes: tuple[str, ...] = ()
        if (shorter := without_empty_thoughts(example)) is not None and self.traits.has_own_thoughts:
            example = shorter
            notes = (
                "empty thoughts in <think> are removed, because the chat template writes thoughts in another form",
            )
        example, of_calls = self._with_calls_as_read(example)
        notes += of_calls
        if self.traits.hides_ids and any("tool_calls" in message for message in messages_of(example)):
            example = linked(example)
        joined = with_one_instruction(example)
        if joined is None or self.traits.renders_two_instructions:
            return example, notes
        return joined, (*notes, "system and developer messages are merged")

    def _reject_dropped_variables(self, example: Chat | Pair) -> None:
        """Raise RowError for a variable of the row that the template does not read, and that is no setting but a text or a list."""
        for name, value in example.variables.items():
            is_text = (
                len(value.split()) > 1 if isinstance(value, str) else value and isinstance(value, list | dict)
            )
            if is_text and name not in self.template.known_variables:
                raise RowError(
                    DROPPED_TEXT,
                    f"`chat_template_kwargs`: the chat template drops `{name}` ({short(value)}). Write it as a system message or as `tools`, "
                    "remove it, or set chat_template",
                )

    def _with_calls_as_read(self, example: Chat | Pair) -> tuple[Chat | Pair, tuple[str, ...]]:
        """Return an example whose calls in text are `tool_calls` where the template writes calls in another form, and notes about it.

        Raises:
            RowError: Calls must stay text, but the template renders no results of such calls.
        """
        written = [message for message in messages_of(example) if writes_calls(message)]
        traits = self.traits
        if not written or not traits.renders_calls or not (example.tools or traits.rejects_written_calls):
            return example, ()
        if all(traits.writes_calls_as(message["content"]) for message in written):
            return example, ()
        notes: list[str] = []
        faults: dict[str, str] = {}

        def called(message: Message) -> Message:
            if not writes_calls(message):
                return message
            try:
                return with_tool_calls(self._without_stop(message), example.tools, notes)
            except RowError as error:
                faults[message["content"]] = str(error)
                return message

        structured = map_messages(example, called)
        if traits.rejects_written_calls:
            self._reject_results_of(faults, example)
        # Where words beside a call would be dropped, calls stay text if the template renders their results.
        if structured != example and (
            traits.rejects_written_calls or all(map(traits.renders_beside_calls, messages_of(structured)))
        ):
            example = map_messages(structured, unwrapped)
        left = [message["content"] for message in messages_of(example) if writes_calls(message)]
        if len(left) < len(written):
            notes.append(_CALLS_READ)
        if any(not traits.writes_calls_as(content) for content in left):
            notes.append(_CALLS_LEFT)
        return example, tuple(notes)

    def _reject_results_of(self, faults: Mapping[str, str], example: Chat | Pair) -> None:
        """Raise RowError for a call that cannot be read and has a result."""
        chat = Chat(context_of(example)) if isinstance(example, Pair) else example
        for index, (message, following) in enumerate(pairwise(chat.messages)):
            fault = faults.get(message["content"])
            if fault and following["role"] == "tool":
                raise RowError(
                    "template",
                    f"{chat.name_of(index)}: {fault}. The chat template renders only results of `tool_calls`",
                )

    def _readable_tools(self, tools: list[Tool]) -> list[Tool]:
        """Return tools in OpenAI's form, and with a description and parameters, if the template reads no others."""
        if any("function" not in tool for tool in tools) and self.traits.wraps_tools:
            tools = [as_function(tool) for tool in tools]
        if needed := self.traits.needed_of_functions:
            tools = [
                {**tool, "function": {**needed, **tool["function"]}}
                if isinstance(tool.get("function"), dict)
                else tool
                for tool in tools
            ]
        return tools

    def _clean(self, messages: list[Message]) -> list[Message]:
        """Give developer messages the role that the template knows, and remove tags of results and end tokens that the row brings."""
        if self.traits.wraps_results and any(is_wrapped(message) for message in messages):
            messages = [unwrapped(message) if is_wrapped(message) else message for message in messages]
        if not self.traits.knows_developer and any(message["role"] == "developer" for message in messages):
            messages = [
                {**message, "role": "system"} if message["role"] == "developer" else message
                for message in messages
            ]
        if not any(
            m["role"] == "assistant" and m["content"].rstrip().endswith(self.traits.stops) for m in messages
        ):
            return messages
        return [
            self._without_stop(message) if message["role"] == "assistant" else message for message in messages
        ]

    def _without_stop(self, message: Message) -> Message:
        content = message["content"].rstrip()
        stop = next((stop for stop in self.traits.stops if content.endswith(stop)), None)
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
        trained = sorted(set(answers_of(chat.messages)).difference(chat.untrained))
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
        if not (self.traits.header and self.traits.end_marker):
            return None
        try:
            whole = self.template.render(chat.messages, chat)
        except RowError:
            return None
        answers = answers_of(chat.messages)
        # The count makes sure that message content is never mistaken for a header.
        if whole.count(self.traits.header) != len(answers) or any(mark in whole for mark in _RULES_DEPEND_ON):
            return None
        spans: list[Span] = []
        cursor = 0
        for index in answers:
            begin = whole.index(self.traits.header, cursor) + len(self.traits.header)
            end = _end_of(whole, begin, chat.messages[index], self.traits.end_marker)
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
        forms = [form for form in possible_forms(chat, self.template.source_for(chat.tools)) if form != known]
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
            form: How messages are passed to the template.
            thinks: True if the turn is asked for with thinking; None: if it has reasoning.
        """
        messages = adapted(chat.messages[: index + 1], form, chat.tools)
        answer = chat.messages[index]
        reasoning = thought_of(answer)[0]
        # A row may write an empty thought itself; in a pair of which one answer has reasoning, the other is an answer without.
        keeps_empty_thought = bool(thinks) or EMPTY_THOUGHT.match(answer["content"]) is not None
        if thinks is None:
            thinks = bool(reasoning) or keeps_empty_thought
        renderings = _Renderings(self.template.render, messages, chat)
        turn = self._asked(renderings, chat, thinks=thinks)
        if turn is None or (
            reasoning and reasoning.strip() not in turn.completion and form.reasoning is None
        ):
            turn = self._continued(renderings, chat, reasoning)
        if not keeps_empty_thought:
            turn = _without_empty_thought(turn, answer["content"])
        check_answer(turn.completion, answer, chat.name_of(index))
        if form.has_parts:
            check_parts(turn.text, messages)
        calls = (
            "tool_calls" in answer
            or answer["content"].rstrip().endswith("</tool_call>")
            or any(message["role"] == "tool" for message in chat.messages[index + 1 : index + 2])
        )
        if end := self.traits.next_headers.get("tool" if calls else "user"):
            text = turn.text[: turn.end] + end  # what the model is to write after its answer
            return _Turn(text, turn.begin, len(text))
        return turn

    def _closes_the_thought(self, chat: Chat, index: int) -> str:
        """Return the error for reasoning after a prompt that asks for none, with the variables that make the prompt do so."""
        given = {**self.template.variables, **chat.variables}
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
        return [{}, *({name: on} for name in self.traits.switches if name not in chat.variables)]

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
        writes_thoughts = is_open or "</think>" in self.template.source_for(chat.tools)
        if is_open or (writes_thoughts and reasoning and reasoning.strip() not in completion):
            opening = "" if is_open else "<think>\n"
            answer = split_thought(completion)[1].lstrip().removeprefix("</think>").lstrip()
            completion = f"{opening}{reasoning.strip()}\n</think>\n\n{answer}"
        whole = prompt + completion
        return _Turn(whole, len(prompt), len(whole.rstrip()))

    def _said(self, messages: list[Message]) -> list[Message]:
        """Return messages without the words of a system message that the template reads as a switch (SmolLM3)."""
        if not self.traits.directives or not messages or messages[0]["role"] != "system":
            return messages
        content = messages[0]["content"]
        for directive in self.traits.directives:
            content = content.replace(directive, "")
        return [{**messages[0], "content": content}, *messages[1:]]

    # --- Other examples ---

    def _whole(self, chat: Chat) -> Rendered:
        """Render a chat that is trained on every token."""
        errors: list[RowError] = []
        for form in possible_forms(chat, self.template.source_for(chat.tools)):
            messages = adapted(chat.messages, form, chat.tools)
            try:
                whole = self.template.render(messages, chat)
                check_context(whole, self._said(chat.messages), _names(chat, len(chat.messages)))
                check_tools(whole, self._said(chat.messages), chat.tools)
                if form.has_parts:
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
            Chat([*pair.prompt, *pair.chosen, *pair.rejected], pair.tools),
            self.template.source_for(pair.tools),
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


def _names(chat: Chat, count: int) -> list[str]:
    """Return the names of the first messages of a chat in errors."""
    return [chat.name_of(index) for index in range(count)]


def _place_after(before: str, header: str, text: str) -> int:
    """Return where a header stands in a text after the end of what precedes it in another, or -1.

    A turn may repeat its header (gpt-oss: once for each channel), so the place after which most of `before` stands is taken.
    """
    best, place, found = -1, text.find(header), -1
    while place >= 0:
        alike = same_before(before, text, place)
        if alike >= best:
            best, found = alike, place
        place = text.find(header, place + 1)
    return found


def same_before(before: str, text: str, place: int) -> int:
    """Return how many characters before a place in a text equal the last ones of another text. Comparing them one by one takes seconds."""
    longest = min(len(before), place)

    def is_same(count: int) -> bool:
        return text.startswith(before[len(before) - count :], place - count)

    same, step = 0, 1
    while same + step <= longest and is_same(same + step):
        same += step
        step *= 2
    while step := step // 2:
        if same + step <= longest and is_same(same + step):
            same += step
    return same


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


def _not_a_prefix(index: int) -> str:
    return (
        f"the chat template does not render message {index + 1} directly after its generation prompt, so the model would be trained on a "
        "context that it is never asked in. Set chat_template to a template that only appends messages"
    )
