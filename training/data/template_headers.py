"""Headers of turns: the texts by which a message shows that a chat template has rendered it already."""

import re
from collections.abc import Iterator, Sequence

from training.data.records import Message

_MARK = re.compile(r"[<\[|]")  # what the markers of turns are written with, other than headings of plain text
_LAST_MARK = re.compile(r".*[>\]|]\n?")
_ROLE = re.compile("user|system", re.IGNORECASE)
_ANY_ROLE = "(?i:system|developer|user|human|assistant|model|chatbot|tool|function|observation|ipython)"

_KNOWN = re.compile(
    r"<\|im_start\|>(?=system|user|assistant)|<\|start\|>(?=system|developer|user|assistant)|<\|start_header_id\|>|<\|header_start\|>"
    r"|<\|(?:system|user|assistant)\|>|<\|START_OF_TURN_TOKEN\|>|<\|start_of_role\|>|<\|turn>|<\uff5c(?:User|Assistant)\uff5c>"
    r"|<start_of_turn>|\[INST\]"
)
"""Headers of turns of widespread chat templates: of ChatML, gpt-oss, Llama, Phi, Cohere, Granite, Gemma, DeepSeek and Mistral."""
_HEADINGS = ((re.compile("### Instruction:"), "### Response:"), (re.compile(r"\bUSER:"), "ASSISTANT:"))
"""Headings of the question and the answer in prompts of Alpaca and Vicuna; one of them alone may be any text."""


def headers_in(text: str) -> Iterator[str]:
    """Yield the headers of widespread chat templates that stand in a text."""
    if "<" in text or "[INST]" in text:  # quicker, and false for most texts
        yield from (found[0] for found in _KNOWN.finditer(text))


def headings_in(text: str) -> Iterator[str]:
    """Yield the heading of the question in a prompt of Alpaca or Vicuna, which ends with the heading of the answer."""
    end = text.rstrip()
    for question, answer in _HEADINGS:
        if end.endswith(answer) and (found := question.search(text)):
            yield found[0]


class Headers:
    """The headers with which a chat template begins turns.

    A message is rendered already if it begins as a turn does, or ends with the generation prompt after a user's turn. Words that
    only quote a header are words.
    """

    def __init__(self, *, before: str, after: str, asking: str, between: str, bos: str, stops: Sequence[str]):
        """Find the headers in renderings of the template; each may be empty.

        Args:
            before: Text before the first question.
            after: Text after the question in a prompt.
            asking: Text that the generation prompt adds to the rendering of the question.
            between: Text between an answer and the next question, without the end of the answer.
            bos: The BOS token.
            stops: Texts that end an answer.
        """
        marks_turns = between.startswith(bos) and not _MARK.search(between.removeprefix(bos))
        self._bos = "" if marks_turns else bos
        """BOS token, if it is not the mark of every turn."""
        openings = (_opening_of(text.removeprefix(self._bos)) for text in (before, between))
        self._opening = re.compile("|".join(dict.fromkeys(filter(None, openings))) or "(?!)")
        headers = (text.partition("<think>")[0] for text in (asking, after))
        self._answer = next((_last_line(header) for header in headers if _MARK.search(header)), "")
        end = after.partition("<think>")[0].strip()
        self._end = end if _MARK.search(end) else ""
        """End of a prompt, after the last word of the user."""
        turn = "|".join(pattern for pattern in (self._opening.pattern, re.escape(self._answer)) if pattern)
        self._next_turn = re.compile(rf"(?:{'|'.join(map(re.escape, stops)) or '(?!)'})\s*(?:{turn})")

    def found_in(self, message: Message, *, is_first: bool) -> str | None:
        """Return what shows that a message is rendered already, for an error, or None.

        Args:
            message: The message.
            is_first: True if only answers precede the message, so that it may begin with the BOS token.
        """
        text = message["content"]
        if "<" not in text and "[" not in text and "|" not in text:
            return None  # quicker than the checks, and true of most words
        text = text.lstrip()
        if message["role"] == "assistant":
            return self._found_in_answer(text)
        if is_first and self._bos and text.startswith(self._bos):
            return f"begins with {self._bos}"
        if opening := self._opening.match(text):
            return f"begins with {_shown(opening[0])}"
        text = text.rstrip()
        if message["role"] == "tool" or not self._end or not text.endswith(self._end):
            return None
        is_prompt = self._opening.search(text.removesuffix(self._end))
        return f"ends with {_shown(self._end)}" if is_prompt else None

    def _found_in_answer(self, text: str) -> str | None:
        if not self._answer or self._answer.strip() not in text:
            return None
        if text.startswith(self._answer):
            return f"begins with {_shown(self._answer)}"
        following = self._next_turn.search(text)
        return f"contains {_shown(following[0])}" if following else None


def _opening_of(text: str) -> str:
    """Return a pattern of the header, in any role, with which a text begins; empty if it begins with plain words.

    The pattern includes the line break after the header, which distinguishes it from words about it.
    """
    line = "".join(text.lstrip().splitlines(keepends=True)[:1]).rstrip(" ")
    if not _MARK.search(line):
        return ""
    before, *after = _ROLE.split(line, maxsplit=1)
    if not after:
        return re.escape(line)
    end = _LAST_MARK.match(after[0])
    return re.escape(before) + _ANY_ROLE + re.escape(end[0] if end else after[0])


def _last_line(text: str) -> str:
    """Return the last line of a generation prompt that is not blank, or the complete text if that line has no mark."""
    last = [line for line in text.splitlines(keepends=True) if line.strip()][-1]
    return last.strip(" ") if _MARK.search(last) else text.strip()


def _shown(text: str) -> str:
    return " ".join(text.split())
