"""The traits of a chat template: the keys that it reads and the texts that it prints, found by rendering probes."""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from training.data.chat_template import QUESTION, ChatTemplate
from training.data.errors import RowError
from training.data.records import Chat, Message
from training.data.template_forms import Form, adapted, possible_forms, thought_of
from training.data.template_headers import Headers
from training.data.tools import Tool, as_function
from training.data.written_calls import is_plain_json, notation_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ANSWER, THOUGHT, PROBED_TOOL = "That is it.", "Let me think.", "probed_tool"
_DIRECTIVES = (
    "/no_think",
    "/think",
    "/system_override",
)  # in the order in which SmolLM3's template removes them


class TemplateTraits:
    """The texts that a chat template puts around messages, and the kinds of messages that it renders."""

    def __init__(self, template: ChatTemplate, tokenizer: "PreTrainedTokenizerFast"):
        """Detect the texts around an answer.

        Args:
            template: The template.
            tokenizer: Its tokenizer.
        """
        self._template = template
        self.header, self.end_marker = self._surroundings()
        """Text before and after an answer; both are empty if the template does more than append."""
        self.bos = _text_of(tokenizer.bos_token)
        self.special = re.compile("|".join(map(re.escape, _special_tokens(tokenizer))) or "(?!)")
        """Pattern of the special tokens."""
        self.stops = tuple(
            {
                stop
                for stop in (
                    *(_text_of(tokenizer.eos_token), self.end_marker.strip(), self._end_of_earlier_turns()),
                    *self.end_marker.split(),
                )
                if stop
            }
        )
        """Texts that end an answer."""
        self.next_headers = self._first_tokens_of_next_turns()
        """Role -> special token with which a turn of that role ends the answer before it; empty if answers have an end marker."""
        self.headers = self._find_headers()
        self.wraps_results = "<tool_response>" in template.source
        self.switches = [
            name
            for name in ("enable_thinking", "thinking")
            if name in template.names and name not in template.variables
        ]
        """Variables that turn thinking on and off, which the template reads and the YAML does not set."""
        self.directives = [word for word in _DIRECTIVES if re.search(rf"['\"]{word}['\"]", template.source)]
        """Words of a system message that the template reads as switches."""

    @property
    def renders_calls(self) -> bool:
        """Return whether the template renders calls."""
        return bool(self._call)

    @cached_property
    def hides_ids(self) -> bool:
        """Return whether the template renders calls and results, but no ids: it may find the call of a result by its id."""
        identity = "call5TSid"
        result = {"role": "tool", "tool_call_id": identity, "content": ANSWER}
        return bool(text := self._probe_call("", {"id": identity}, [result])) and identity not in text

    @cached_property
    def _call(self) -> str:
        """Return the rendering of a call, or an empty text."""
        return self._probe_call("")

    def writes_calls_as(self, content: str) -> bool:
        """Return whether a content writes its calls as the template does."""
        notation = notation_of(content)
        return notation == notation_of(self._call) and (notation != "json" or is_plain_json(content))

    def renders_beside_calls(self, message: Message) -> bool:
        """Return whether the template renders the words and the reasoning of a message beside its calls."""
        thought, words = thought_of(message)
        return "tool_calls" not in message or (
            (not words.strip() or self._renders_words_beside_calls)
            and (not thought or self._renders_thoughts_beside_calls)
        )

    @cached_property
    def _renders_words_beside_calls(self) -> bool:
        return bool(self._probe_call(ANSWER))

    @cached_property
    def _renders_thoughts_beside_calls(self) -> bool:
        return bool(self._probe_call(f"<think>\n{THOUGHT}\n</think>"))

    @cached_property
    def rejects_written_calls(self) -> bool:
        """Return whether the template renders no result of a call that stands in the text of an answer."""
        said = (("user", QUESTION), ("assistant", "<tool_call>"), ("tool", ANSWER), ("assistant", THOUGHT))
        return ANSWER not in self._probe(*said)

    @property
    def has_own_thoughts(self) -> bool:
        """Return whether the template renders reasoning, but not in <think> tags (gpt-oss, Gemma 4, Mistral)."""
        return "</think>" not in self._template.source and self.reasoning_form is not None

    @cached_property
    def reasoning_form(self) -> str | None:
        """Return the form in which the template renders the reasoning of an answer (`Form.reasoning`); None if it renders none."""
        answer: Message = {"role": "assistant", "content": ANSWER, "reasoning_content": THOUGHT}
        chat = Chat([{"role": "user", "content": QUESTION}, answer])
        for form in possible_forms(chat, self._template.source):
            try:
                text = self._template.render(adapted(chat.messages, form, None), chat)
            except RowError:
                continue
            if form.reasoning and THOUGHT in text:
                return form.reasoning
        return None

    @cached_property
    def wraps_tools(self) -> bool:
        """Return whether the template reads functions in OpenAI's form only."""
        tool = {"name": PROBED_TOOL, "description": "", "parameters": {"type": "object", "properties": {}}}
        return not self._prints_tool(tool) and self._prints_tool(as_function(tool))

    @cached_property
    def needed_of_functions(self) -> dict[str, Any]:
        """Return the keys without which the template rejects a function, with the value that it gets in their place."""
        usual = {"description": "", "parameters": {"type": "object", "properties": {}}}
        function = {"name": PROBED_TOOL, **usual}
        if not self._prints_tool(as_function(function)):
            return {}
        return {
            key: value
            for key, value in usual.items()
            if not self._prints_tool(
                as_function({name: entry for name, entry in function.items() if name != key})
            )
        }

    @cached_property
    def knows_developer(self) -> bool:
        """Return whether the template renders developer messages; some only have the word (Cohere 2)."""
        text = "Be kind."
        return "developer" in self._template.source and text in self._probe(
            ("developer", text), ("user", QUESTION)
        )

    @cached_property
    def renders_two_instructions(self) -> bool:
        """Return whether the template renders a developer message after a system message."""
        texts = ("Be brief.", "Be kind.")
        roles = ("system", "developer" if self.knows_developer else "system")
        return all(text in self._probe(*zip(roles, texts, strict=True), ("user", QUESTION)) for text in texts)

    def _prints_tool(self, tool: Tool) -> bool:
        try:
            text = self._template.render(
                [{"role": "user", "content": QUESTION}], Chat([], [tool]), prompt=True
            )
        except RowError:
            return False
        return PROBED_TOOL in text

    def _probe_call(
        self, words: str, ids: Mapping[str, str] = MappingProxyType({}), results: Sequence[Message] = ()
    ) -> str:
        """Render a call with words, or reasoning in tags, beside it, in the first form that renders all; empty if none does."""
        argument, said = "Tromsø", thought_of({"content": words, "tool_calls": []})
        function = {"name": PROBED_TOOL, "arguments": {"name": argument}}
        call: Message = {
            "role": "assistant",
            "content": words,
            "tool_calls": [{**ids, "type": "function", "function": function}],
        }
        chat = Chat([{"role": "user", "content": QUESTION}, call, *results])
        for form in possible_forms(chat, self._template.source):
            try:
                text = self._template.render(adapted(chat.messages, form, None), chat)
            except RowError:
                continue
            if all(part in text for part in (PROBED_TOOL, argument, *said)):
                return text
        return ""

    def _surroundings(self) -> tuple[str, str]:
        """Return the text before and after an answer, or two empty strings if the template does more than append."""
        if not self._template.source:
            return "", ""
        question: Message = {"role": "user", "content": QUESTION}
        try:
            asked = self._template.render([question], Chat([]))
            prompt = self._template.render([question], Chat([]), prompt=True)
            whole = self._template.render([question, {"role": "assistant", "content": ANSWER}], Chat([]))
        except RowError:
            return "", ""
        answer = whole.find(ANSWER, len(prompt))
        if not (prompt.startswith(asked) and whole.startswith(prompt) and answer >= 0):
            return "", ""
        return prompt[len(asked) :], whole[answer + len(ANSWER) :].rstrip()

    def _end_of_earlier_turns(self) -> str:
        """Return the special token after an answer that another turn follows: of gpt-oss, another one than after the last answer."""
        if not self._template.source:
            return ""
        question: Message = {"role": "user", "content": QUESTION}
        try:
            whole = self._template.render(
                [question, {"role": "assistant", "content": ANSWER}, question], Chat([])
            )
        except RowError:
            return ""
        found = self.special.match(whole.rpartition(ANSWER)[2].lstrip())
        return found[0] if found else ""

    def _first_tokens_of_next_turns(self) -> dict[str, str]:
        """Return the special tokens that follow an answer without an end marker (GLM-4.5), by the role of the next turn."""
        if not self.header or self.end_marker:
            return {}
        question: Message = {"role": "user", "content": QUESTION}
        arguments = {"name": ANSWER}
        call: Message = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": PROBED_TOOL, "arguments": arguments}}],
        }
        found: dict[str, str] = {}
        for role, answer in (("user", {"role": "assistant", "content": ANSWER}), ("tool", call)):
            try:
                asked = self._template.render([question, answer], Chat([])).rstrip()
                whole = self._template.render(
                    [question, answer, {"role": role, "content": QUESTION}], Chat([])
                )
            except RowError:
                continue
            token = self.special.match(whole.removeprefix(asked).lstrip())
            if whole.startswith(asked) and token and token[0] != self.bos:
                found[role] = token[0]
        return found

    def _find_headers(self) -> Headers:
        """Find the headers of turns in renderings of a question and an answer."""
        question, answer = ("user", QUESTION), ("assistant", ANSWER)
        asked, prompt = self._probe(question), self._probe(question, prompt=True)
        before, _, after = prompt.partition(QUESTION)
        between = self._probe(question, answer, question).rpartition(ANSWER)[2].rpartition(QUESTION)[0]
        between = between.lstrip()
        marker = self.end_marker.strip()
        end = self.special.match(between)
        if marker and between.startswith(marker):
            between = between.removeprefix(marker)
        elif end:
            between = between[end.end() :]
        return Headers(
            before=before,
            after=after,
            asking=prompt[len(asked) :] if prompt.startswith(asked) else "",
            between=between.lstrip(),
            bos=self.bos,
            stops=self.stops,
        )

    def _probe(self, *said: tuple[str, str], prompt: bool = False) -> str:
        """Render messages of roles and texts, with content as text or as parts; empty if the template rejects both."""
        messages: list[Message] = [{"role": role, "content": text} for role, text in said]
        for form in (Form(), Form(parts=True)) if self._template.source else ():
            try:
                text = self._template.render(adapted(messages, form, None), Chat([]), prompt=prompt)
            except RowError:
                continue
            if QUESTION in text:
                return text
        return ""


def _text_of(token: Any) -> str:
    return token if isinstance(token, str) else ""


def _special_tokens(tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    """Return the texts of the special tokens, longest first."""
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted(special, key=len, reverse=True)
