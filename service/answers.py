"""The text of an answer while it is generated: characters, stop texts and tool calls appear only once they are certain."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from tokenizers.decoders import DecodeStream

from service.engine import Delta, FinishReason, Sampling, TokenLogprob, ToolCall
from service.prompts import ChatFormat, split_calls


@dataclass(frozen=True)
class Sampled:
    """A generated token, with log probabilities if the request asks for them."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens and their log probabilities."""


class Answer:
    """One choice of a request: turns generated tokens into deltas and decides where the answer ends."""

    def __init__(
        self,
        choice: int,
        form: ChatFormat,
        sampling: Sampling,
        *,
        stop_tokens: frozenset[int],
        max_tokens: int,
        may_call: bool,
    ):
        """Start an empty answer.

        Args:
            choice: Index of the choice.
            form: Chat format of the model.
            sampling: The request's settings.
            stop_tokens: Tokens that end the answer; they are not part of it.
            max_tokens: Longest answer in tokens.
            may_call: True if the request has tools.
        """
        self._choice = choice
        self._tokenizer = form.tokenizer
        self._decoder = DecodeStream(skip_special_tokens=False)
        self._stop_texts = sampling.stop
        self._stop_tokens = stop_tokens
        self._max_tokens = max_tokens
        self._calls = form.call_form() if may_call else None
        self._hidden = form.hidden_beside_calls if may_call else form.hidden_tokens
        self._shown: list[int] = []
        """Tokens whose text belongs to the answer."""
        self._length = 0
        """Characters decoded."""
        self._held = ""
        """Decoded text that is not emitted yet."""
        self._logprobs: list[tuple[int, TokenLogprob]] = []
        """(first character, log probability) of tokens that are not emitted yet."""
        self.tokens = 0
        """Tokens generated."""
        self.is_finished = False

    def push(self, sampled: Sampled) -> Delta | None:
        """Add the next token; return what has become certain, or None."""
        self.tokens += 1
        if sampled.token in self._stop_tokens:
            self._add(self._undecoded())
            return self._finish("stop", len(self._held))
        if sampled.logprob is not None:
            entry = _logprob(self._tokenizer, sampled)
            self._logprobs.append((self._length, entry))
        piece = ""
        if sampled.token not in self._hidden:
            self._shown.append(sampled.token)
            piece = self._decoder.step(self._tokenizer.backend_tokenizer, sampled.token) or ""
        self._add(piece)
        reaches_limit = self.tokens >= self._max_tokens
        if reaches_limit:
            self._add(self._undecoded())
        place = _first(self._held, self._stop_texts)
        if place is not None:
            return self._finish("stop", place)
        if reaches_limit:
            return self._finish("length", len(self._held))
        return self._emit(len(self._held) - self._kept())

    def _add(self, piece: str) -> None:
        self._held += piece
        self._length += len(piece)

    def _undecoded(self) -> str:
        """Return the text of the last tokens if they end within a character, as a complete decoding shows it."""
        whole = self._tokenizer.backend_tokenizer.decode(self._shown, skip_special_tokens=False)
        return whole[self._length :] if whole.endswith("\ufffd") else ""

    def _kept(self) -> int:
        """Return how many characters at the end may belong to a stop text or to a call."""
        kept = max((_overlap(self._held, text) for text in self._stop_texts), default=0)
        if self._calls is None:
            return kept
        place = self._call_place()
        if place is not None:
            return len(self._held) - len(self._held[:place].rstrip())
        kept = max(kept, _overlap(self._held, self._calls.opening))
        certain = self._held[: len(self._held) - kept]
        return len(self._held) - len(certain.rstrip())

    def _call_place(self) -> int | None:
        """Return where a call begins in the text that is not emitted yet."""
        assert self._calls is not None
        if self._calls.opening:
            return _first(self._held, (self._calls.opening,))
        begins = self._length == len(self._held) and self._held.lstrip()[:1] in ("{", "[")
        return 0 if begins else None

    def _emit(self, characters: int) -> Delta | None:
        text, self._held = self._held[:characters], self._held[characters:]
        emitted = self._length - len(self._held)
        entries = tuple(entry for start, entry in self._logprobs if start < emitted)
        self._logprobs = self._logprobs[len(entries) :]
        return Delta(self._choice, text, logprobs=entries) if text or entries else None

    def _finish(self, reason: FinishReason, end: int) -> Delta:
        """End the answer after this many characters of the text that is not emitted yet."""
        self.is_finished = True
        self._length -= len(self._held) - end
        self._held = self._held[:end]
        calls: tuple[ToolCall, ...] = ()
        place = self._call_place() if self._calls is not None else None
        if place is not None:
            assert self._calls is not None
            content, calls = split_calls(self._held[place:], self._calls)
            if calls:
                self._length -= len(self._held) - place
                self._held = self._held[:place].rstrip() + content
                reason = "tool_calls"
        entries = tuple(entry for start, entry in self._logprobs if start < self._length)
        return Delta(self._choice, self._held, calls, entries, reason, self.tokens)


def _first(text: str, parts: Iterable[str]) -> int | None:
    """Return where the first of these parts begins in a text."""
    return min((place for part in parts if (place := text.find(part)) >= 0), default=None)


def _overlap(text: str, part: str) -> int:
    """Return the length of the longest end of a text that is a beginning of a part, but not the complete part."""
    longest = min(len(text), len(part) - 1)
    return next((length for length in range(longest, 0, -1) if part.startswith(text[-length:])), 0)


def _logprob(tokenizer, sampled: Sampled) -> TokenLogprob:
    assert sampled.logprob is not None
    top = tuple(_entry(tokenizer, token, logprob) for token, logprob in sampled.top)
    entry = _entry(tokenizer, sampled.token, sampled.logprob)
    return TokenLogprob(entry.token, entry.bytes, entry.logprob, top)


def _entry(tokenizer, token: int, logprob: float) -> TokenLogprob:
    raw = _bytes_of(tokenizer, token)
    return TokenLogprob(raw.decode(errors="replace"), tuple(raw), logprob)


def _bytes_of(tokenizer, token: int) -> bytes:
    """Return the bytes that a token stands for, also those of an incomplete character."""
    written = str(tokenizer.convert_ids_to_tokens(token))
    if len(written) == 6 and written.startswith("<0x") and written.endswith(">"):
        return bytes([int(written[3:5], 16)])
    table = _byte_level_table()
    is_byte_level = "ByteLevel" in str(type(tokenizer.backend_tokenizer.decoder).__name__)
    if is_byte_level and token not in tokenizer.added_tokens_decoder and all(c in table for c in written):
        return bytes(table[character] for character in written)
    return str(tokenizer.decode([token], skip_special_tokens=False)).encode()


@lru_cache
def _byte_level_table() -> dict[str, int]:
    """Return the byte of each character in a byte-level vocabulary."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}
