"""Rendered text -> token ids, and which of them stand where the loss looks."""

import json
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from training.data.templates import Rendered, Span

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers.normalizers import Normalizer
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerFast

_NOT_KNOWN = (
    1 << 40
)  # bytes of a token that stands for what the vocabulary lacks: no text's sum comes out right


@dataclass(slots=True)
class Encoded:
    """Token ids, and the trained ones among them: [begin, end) in tokens."""

    ids: list[int]
    spans: list[Span]

    @property
    def trained(self) -> int:
        """Tokens that are predicted: nothing predicts the first."""
        return sum(end - max(begin, 1) for begin, end in self.spans if end > max(begin, 1))

    def cut(self, limit: int) -> int:
        """Keep the first `limit` tokens; returns how many are lost."""
        lost = max(len(self.ids) - limit, 0)
        if lost:
            self.ids = self.ids[:limit]
            self.spans = [(begin, min(end, limit)) for begin, end in self.spans if begin < limit]
        return lost


class Encoder:
    """A tokenizer that tells which tokens a span of characters has become.

    The library computes every token's offsets for half as long again as its ids alone. Where tokens are pieces of the
    text's bytes, as in byte-level BPE, their lengths say the same; a row whose lengths do not add up is asked for offsets.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", *, whole_text: bool):
        """Prepare the tokenizer.

        Args:
            tokenizer: Truncation and padding are turned off in it.
            whole_text: Train on every token, not on the answers only.
        """
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._whole_text = whole_text
        self._end_of_text: int | None = tokenizer.eos_token_id  # pyright: ignore[reportAttributeAccessIssue]
        self._bytes_of = _bytes_of_tokens(tokenizer)
        self._normalizes = "NFC" in _steps(self._backend.normalizer)

    def encode(self, sequences: Sequence[Rendered]) -> "list[Encoding]":
        """Encode sequences of one kind, in the library's own threads and without Python's lock."""
        texts = [sequence.text for sequence in sequences]
        if sequences[0].ends_the_text:
            return self._backend.encode_batch(texts, add_special_tokens=True)
        if self._bytes_of is None:
            return self._backend.encode_batch(texts, add_special_tokens=False)
        return self._backend.encode_batch_fast(texts, add_special_tokens=False)

    def locate(self, rendered: Rendered, encoding: "Encoding") -> Encoded:
        """The ids of a sequence and its trained tokens; one that reaches over a span's beginning or end belongs to it."""
        ids = encoding.ids
        if rendered.ends_the_text:
            first = 0 if self._whole_text else _by_offsets(encoding, rendered, len(ids))[0][0]
            if self._end_of_text is not None and ids[-1:] != [self._end_of_text]:
                ids.append(self._end_of_text)
            return Encoded(ids, [(first, len(ids))])
        if self._bytes_of is None:
            return Encoded(ids, _by_offsets(encoding, rendered, len(ids)))
        return Encoded(ids, self._by_lengths(ids, rendered) or self._asked_again(ids, rendered))

    def _by_lengths(self, ids: list[int], rendered: Rendered) -> list[Span] | None:
        """None where the tokens are not the text's bytes, one after another."""
        text, spans = rendered.text, rendered.spans
        assert self._bytes_of is not None
        size = len(text)
        if not text.isascii():
            if self._normalizes and not unicodedata.is_normalized("NFC", text):
                return None
            spans, size = _in_bytes(text, spans)
        ends = list(accumulate(map(self._bytes_of.__getitem__, ids)))
        if not ends or ends[-1] != size:
            return None
        return [(bisect_right(ends, begin), bisect_left(ends, end) + 1) for begin, end in spans]

    def _asked_again(self, ids: list[int], rendered: Rendered) -> list[Span]:
        return _by_offsets(self._backend.encode(rendered.text, add_special_tokens=False), rendered, len(ids))


def _in_bytes(text: str, spans: tuple[Span, ...]) -> tuple[tuple[Span, ...], int]:
    """Spans of characters as spans of UTF-8, and the whole text's size."""
    in_bytes: list[Span] = []
    character = size = 0
    for begin, end in spans:
        first = size + len(text[character:begin].encode())
        size = first + len(text[begin:end].encode())
        in_bytes.append((first, size))
        character = end
    return tuple(in_bytes), size + len(text[character:].encode())


def _bytes_of_tokens(tokenizer: "PreTrainedTokenizerFast") -> list[int] | None:
    """Bytes that each token stands for, by its id; None where a token is not certain bytes of the text."""
    from tokenizers import models

    backend = tokenizer.backend_tokenizer
    model = backend.model
    if not isinstance(model, models.BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    steps = _steps(backend.pre_tokenizer)
    if steps[-1:] != ["ByteLevel"] or not set(steps[:-1]) <= {"Split", "Digits"}:
        return None
    if not set(_steps(backend.normalizer)) <= {"NFC"}:
        return None
    vocabulary = backend.get_vocab(with_added_tokens=True)
    lengths = [0] * (max(vocabulary.values()) + 1)
    for token, number in vocabulary.items():
        lengths[number] = len(token)  # a character for each byte
    for number, added in backend.get_added_tokens_decoder().items():
        lengths[number] = len(added.content.encode())
    for token in (model.unk_token, *(f"<0x{byte:02X}>" for byte in range(256))):
        if token in vocabulary:
            lengths[vocabulary[token]] = _NOT_KNOWN
    probe = "a b"  # some put a space before the text
    ids = backend.encode(probe, add_special_tokens=False).ids
    return lengths if sum(lengths[number] for number in ids) == len(probe) else None


def _steps(part: "Normalizer | PreTokenizer | None") -> list[str]:
    """What a part of a tokenizer does, step after step."""
    if part is None:
        return []
    state = json.loads(part.__getstate__())  # the only way to look into a Sequence
    steps = state.get("pretokenizers", state.get("normalizers", [state]))
    return [step["type"] for step in steps]


def _by_offsets(encoding: "Encoding", rendered: Rendered, tokens: int) -> list[Span]:
    characters = len(rendered.text)
    return [_token_span(encoding, span, characters, tokens) for span in rendered.spans]


def _token_span(encoding: "Encoding", span: Span, characters: int, tokens: int) -> Span:
    begin, end = span
    first = _token_at(encoding, begin, end)
    if first is None:
        return 0, 0
    last = None if end >= characters else _token_at(encoding, end, characters)
    if last is None:
        return first, tokens
    while last < tokens and (found := encoding.token_to_chars(last)) is not None and found[0] < end:
        last += 1
    return first, last


def _token_at(encoding: "Encoding", begin: int, end: int) -> int | None:
    """The first token of the characters from `begin` on; some tokenizers leave white space out."""
    for character in range(begin, end):
        if (token := encoding.char_to_token(character)) is not None:
            return token
    return None
