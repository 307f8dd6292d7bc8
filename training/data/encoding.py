"""Tokenization: convert rendered text into token ids and mark the loss tokens."""

import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from training.data.records import Tokens
from training.data.rendered import Rendered, Span

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers.normalizers import Normalizer
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerFast

_NOT_KNOWN = (
    1 << 30
)  # byte length of unknown and byte-fallback tokens: exceeds any row, so lengths never add up


@dataclass(frozen=True, slots=True)
class Encoded:
    """A batch of tokenized sequences, concatenated."""

    ids: np.ndarray
    """int32 [tokens]"""
    trained: np.ndarray
    """bool [tokens]: True for loss tokens."""
    lengths: np.ndarray
    """int64 [sequences]: tokens per sequence."""

    def begins(self) -> np.ndarray:
        """Return the start of each sequence and the end of the last, int64 [sequences + 1]."""
        return _sums(self.lengths)

    def places(self) -> np.ndarray:
        """Return each token's position in its sequence, int64 [tokens]."""
        return np.arange(len(self.ids)) - np.repeat(self.begins()[:-1], self.lengths)

    def predicted(self) -> np.ndarray:
        """Return the loss tokens per sequence, int64 [sequences]; the first token is never predicted."""
        begins = self.begins()
        trained = self.trained.copy()
        trained[begins[:-1][self.lengths > 0]] = False
        return np.diff(_sums(trained)[begins])

    def cut(self, limit: int) -> "Encoded":
        """Truncate each sequence to its first `limit` tokens."""
        kept = self.places() < limit
        return Encoded(self.ids[kept], self.trained[kept], np.minimum(self.lengths, limit))

    def take(self, sequences: np.ndarray) -> "Encoded":
        """Select sequences by a mask, bool [sequences]."""
        kept = np.repeat(sequences, self.lengths)
        return Encoded(self.ids[kept], self.trained[kept], self.lengths[sequences])


class Encoder:
    """A tokenizer that maps character spans to token spans.

    Computing token offsets in the tokenizers library takes 50% longer than ids alone. In byte-level BPE, the byte lengths of
    tokens give the same result. Offsets are computed only for rows whose lengths do not add up.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", *, whole_text: bool):
        """Prepare the tokenizer.

        Args:
            tokenizer: Fast tokenizer; its truncation and padding are disabled in place.
            whole_text: True to train on every token instead of the answers only.
        """
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._whole_text = whole_text
        self._end_of_text: int | None = tokenizer.eos_token_id  # pyright: ignore[reportAttributeAccessIssue]
        self._bytes_of = _bytes_of_tokens(tokenizer)
        self._normalizes = "NFC" in _steps(self._backend.normalizer)

    def encode(self, sequences: Sequence[Rendered | Tokens]) -> "list[Encoding]":
        """Tokenize sequences of one kind in the library's threads, without the GIL; none of pretokenised rows."""
        rendered = _rendered(sequences)
        if not rendered:
            return []
        texts = [sequence.text for sequence in rendered]
        if rendered[0].ends_the_text:
            return self._backend.encode_batch(texts, add_special_tokens=True)
        if self._bytes_of is None:
            return self._backend.encode_batch(texts, add_special_tokens=False)
        return self._backend.encode_batch_fast(texts, add_special_tokens=False)

    def locate(self, sequences: Sequence[Rendered | Tokens], encodings: "Sequence[Encoding]") -> Encoded:
        """Mark the loss tokens of sequences of one kind; a token that crosses a span's boundary belongs to the span."""
        rendered = _rendered(sequences)
        if rendered:
            return self._located(rendered, encodings)
        rows = [sequence for sequence in sequences if isinstance(sequence, Tokens)]
        lengths = np.array([row.size for row in rows], np.int64)
        return Encoded(
            np.concatenate([row.ids for row in rows]), np.concatenate([row.trained for row in rows]), lengths
        )

    def _located(self, sequences: Sequence[Rendered], encodings: "Sequence[Encoding]") -> Encoded:
        ids = [encoding.ids for encoding in encodings]
        if sequences[0].ends_the_text:
            ids = [self._with_end(each) for each in ids]
        lengths = np.array([len(each) for each in ids], np.int64)
        flat = np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum()))
        begins = _sums(lengths)
        owners = np.repeat(np.arange(len(sequences)), [len(sequence.spans) for sequence in sequences])
        if sequences[0].ends_the_text:
            first = [self._first_of_the_text(*each) for each in zip(sequences, encodings, strict=True)]
            spans = np.stack([first, lengths], 1)
        elif self._bytes_of is None:
            spans = _pairs(chain.from_iterable(map(_by_offsets, sequences, encodings)))
        else:
            spans = self._by_lengths(sequences, flat, begins, owners)
        first, end = (spans + begins[owners, None]).T
        steps = np.bincount(first, minlength=len(flat) + 1) - np.bincount(end, minlength=len(flat) + 1)
        return Encoded(flat, np.cumsum(steps[:-1]) > 0, lengths)

    def _with_end(self, ids: list[int]) -> list[int]:
        if self._end_of_text is None or ids[-1:] == [self._end_of_text]:
            return ids
        return [*ids, self._end_of_text]

    def _first_of_the_text(self, rendered: Rendered, encoding: "Encoding") -> int:
        return 0 if self._whole_text else _by_offsets(rendered, encoding)[0][0]

    def _by_lengths(
        self, sequences: Sequence[Rendered], ids: np.ndarray, begins: np.ndarray, owners: np.ndarray
    ) -> np.ndarray:
        """Map spans from characters to bytes to tokens, and return them as [spans, 2] in tokens of their sequence.

        Args:
            sequences: The tokenized sequences.
            ids: Token ids of all sequences, [tokens].
            begins: Start of each sequence in tokens, [sequences + 1].
            owners: Sequence index of each span, [spans].
        """
        assert self._bytes_of is not None
        texts = [sequence.text for sequence in sequences]
        whole = "".join(texts)
        text_begins = _sums([len(text) for text in texts])
        spans = _pairs(chain.from_iterable(sequence.spans for sequence in sequences))
        spans += text_begins[owners, None]
        if not whole.isascii():
            offsets = _byte_offsets(whole)
            spans, text_begins = offsets[spans], offsets[text_begins]
        token_begins = _sums(self._bytes_of[ids])
        # If a sequence's tokens do not cover its bytes exactly, the sequences after it are shifted against their text.
        moved = token_begins[begins] - text_begins
        first, end = (spans + moved[owners, None]).T
        found = np.stack(
            [np.searchsorted(token_begins, first, "right") - 1, np.searchsorted(token_begins, end, "left")], 1
        )
        found -= begins[owners, None]
        agrees = np.diff(moved) == 0
        if self._normalizes:
            agrees &= [text.isascii() or unicodedata.is_normalized("NFC", text) for text in texts]
        for number in np.flatnonzero(~agrees).tolist():
            asked = self._backend.encode(texts[number], add_special_tokens=False)
            found[owners == number] = _pairs(_by_offsets(sequences[number], asked))
        return found


def _rendered(sequences: Sequence[Rendered | Tokens]) -> list[Rendered]:
    """Return the sequences that are texts: all of a batch, or none."""
    return [sequence for sequence in sequences if isinstance(sequence, Rendered)]


def _sums(counts: np.ndarray | list[int]) -> np.ndarray:
    """Return the cumulative sums with a leading 0, int64 [counts + 1]."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _pairs(spans: Iterable[Span]) -> np.ndarray:
    return np.array(list(spans), np.int64).reshape(-1, 2)


def _byte_offsets(text: str) -> np.ndarray:
    """Return the UTF-8 offset of each character and of the end, int64 [characters + 1]."""
    content = np.frombuffer(text.encode(), np.uint8)
    return np.append(np.flatnonzero(content & 0xC0 != 0x80), len(content))


def _bytes_of_tokens(tokenizer: "PreTrainedTokenizerFast") -> np.ndarray | None:
    """Return the byte length of each token by id, or None if tokens do not correspond to bytes of the text."""
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
    lengths = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for token, number in vocabulary.items():
        lengths[number] = len(token)  # byte-level BPE writes one character per byte
    for number, added in backend.get_added_tokens_decoder().items():
        lengths[number] = len(added.content.encode())
    for token in (model.unk_token, *(f"<0x{byte:02X}>" for byte in range(256))):
        if token in vocabulary:
            lengths[vocabulary[token]] = _NOT_KNOWN
    probe = "a b"  # some tokenizers add a leading space
    ids = backend.encode(probe, add_special_tokens=False).ids
    return lengths if lengths[ids].sum() == len(probe) else None


def _steps(part: "Normalizer | PreTokenizer | None") -> list[str]:
    """Return the step types of a normalizer or pre-tokenizer."""
    if part is None:
        return []
    state = json.loads(part.__getstate__())  # the only access to the parts of a Sequence
    steps = state.get("pretokenizers", state.get("normalizers", [state]))
    return [step["type"] for step in steps]


def _by_offsets(rendered: Rendered, encoding: "Encoding") -> list[Span]:
    characters, tokens = len(rendered.text), len(encoding)
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
    """Return the first token at or after character `begin`; some tokenizers drop whitespace."""
    for character in range(begin, end):
        if (token := encoding.char_to_token(character)) is not None:
            return token
    return None
