"""The texts with which a model marks its reasoning and its answer, found in renderings of its chat template."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from training.data.chat_template import QUESTION
from training.data.errors import DataError, RowError
from training.data.records import Chat, Message
from training.data.renderer import Renderer, same_before
from training.data.template_forms import split_thought
from training.data.template_traits import ANSWER, PROBED_TOOL, THOUGHT

_OPENING = "<think>"


@dataclass(frozen=True)
class AnswerMarks:
    """The texts around the reasoning and the answer that a model writes."""

    opening: str = _OPENING
    """Text before the reasoning, which a prompt may end with."""
    closing: str = "</think>"
    """Text between the reasoning and the answer."""
    header: str = ""
    """Text before an answer without reasoning; most templates have none."""
    tokens: frozenset[str] = frozenset()
    """The special tokens in these texts."""
    ends: tuple[str, ...] = ()
    """Special tokens that end an answer after a header."""

    def answer_in(self, text: str, prompt: str = "") -> str:
        """Return what a model wrote without its reasoning; empty if the reasoning is unfinished."""
        return self.split(text, prompt)[1]

    def split(self, text: str, prompt: str = "") -> tuple[str, str]:
        """Return (reasoning, answer) of what a model wrote; the answer is empty if the reasoning is unfinished.

        Reasoning in <think> tags is found for every template, since rows may have it as text.

        Args:
            text: What the model wrote.
            prompt: Its prompt, which may end with the beginning of the reasoning or of the answer.
        """
        asked = prompt.rstrip()
        marks = (self.opening, self.header, _OPENING)
        opened = next((mark for mark in marks if mark and asked.endswith(mark)), "")
        written = (opened + text).lstrip()
        is_closed = self.closing in self.tokens and self.closing in written  # its beginning may be missing
        if not written.startswith(self._beginnings) and not is_closed:
            if written.startswith(_OPENING) and "</think>" not in written:
                return written.removeprefix(_OPENING), ""
            return split_thought(written)
        begin = len(self.opening) if written.startswith(self.opening) else 0
        found = self._pattern_of(self.header or self.closing).search(written, begin)
        reasoning = written[begin : found.start() if found else None]
        answer = written[found.end() :] if found else ""
        if not self.header:
            return reasoning.strip(), answer
        ends = _any_of(self.ends)
        return re.split(ends, reasoning, maxsplit=1)[0].strip(), re.split(ends, answer, maxsplit=1)[0]

    @property
    def _beginnings(self) -> tuple[str, ...]:
        """Return the texts of which one begins an answer that the template's marks are in."""
        marks = [mark for mark in (self.opening, self.header) if mark]
        tokens = (token for token in self.tokens for mark in marks if mark.startswith(token))
        return (*marks, *tokens)

    def _pattern_of(self, mark: str) -> re.Pattern[str]:
        """Return a pattern of a mark. Models may write more after its words (gpt-oss: `final <|constrain|>json<|message|>`)."""
        tokens = _any_of(self.tokens)
        parts = [part.strip() for part in re.split(f"({tokens})", mark) if part.strip()]
        others = f"(?:(?!{tokens}).)*?"
        patterns = [re.escape(part) + ("" if part in self.tokens else others) for part in parts[:-1]]
        return re.compile(r"\s*".join([*patterns, *map(re.escape, parts[-1:])]), re.DOTALL)


def find_marks(renderer: Renderer) -> AnswerMarks:
    """Return the marks of a chat template; those of <think> tags if it renders no reasoning.

    Args:
        renderer: A renderer that trains answers.
    """
    if not renderer.template.source:
        return AnswerMarks()
    _, plain = _turn(renderer, {"content": ANSWER}) or ("", ANSWER)
    around = _around_reasoning(renderer)
    if around is None:
        return AnswerMarks()
    (opening, before, closing), special = around, renderer.traits.special
    header, _, end = plain.partition(ANSWER)
    header = "" if header.strip().startswith(opening) else header.strip()
    if not (closing or header):
        return AnswerMarks()
    ends = [*special.findall(end)[:1], *special.findall(closing)[:1]] if header else []
    tokens = frozenset(special.findall("\0".join([before, closing, header, *ends])))
    return AnswerMarks(opening, closing, header, tokens, tuple(ends))


def _around_reasoning(renderer: Renderer) -> tuple[str, str, str] | None:
    """Return the texts around the reasoning of an answer, or of a call if answers have none (Gemma 4); None without any.

    Returns:
        The opening, its part that the model writes (the rest ends the prompt), and the closing.
    """
    reasoned = _turn(renderer, {"content": ANSWER, "reasoning_content": THOUGHT})
    if reasoned is not None:
        after = reasoned[1].partition(THOUGHT)[2]
        closing = after.partition(ANSWER)[0]
    else:
        function = {"name": PROBED_TOOL, "arguments": {"name": ANSWER}}
        call: Message = {"content": "", "tool_calls": [{"type": "function", "function": function}]}
        plain, reasoned = _turn(renderer, call), _turn(renderer, {**call, "reasoning_content": THOUGHT})
        if plain is None or reasoned is None:
            return None
        after = reasoned[1].partition(THOUGHT)[2]
        closing = after[
            : len(after) - same_before(plain[1], after, len(after))
        ]  # both end with the same call
    before = reasoned[1].partition(THOUGHT)[0].strip()
    return before or reasoned[0].rpartition(QUESTION)[2].strip(), before, closing.strip()


def _turn(renderer: Renderer, answer: Message) -> tuple[str, str] | None:
    """Return the prompt and the completion of an answer; None if the template does not render it."""
    messages: list[Message] = [{"role": "user", "content": QUESTION}, {"role": "assistant", **answer}]
    try:
        rendered = renderer.render(Chat(messages))[-1]
    except (RowError, DataError):
        return None
    begin, end = rendered.spans[-1]
    return rendered.text[:begin], rendered.text[begin:end]


def _any_of(texts: Sequence[str] | frozenset[str]) -> str:
    """Return a pattern that matches any of the texts, and nothing without them."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"
