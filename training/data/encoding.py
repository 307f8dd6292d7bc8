"""Tokenization: convert rendered text into token ids and mark the loss tokens."""

import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from training.data.pieces import PieceEncoder, splits_at_spaces, sums
from training.data.records import Tokens
from training.data.rendered import Rendered, Span

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
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
        return sums(self.lengths)

    def places(self) -> np.ndarray:
        """Return each token's position in its sequence, int64 [tokens]."""
        return np.arange(len(self.ids)) - np.repeat(self.begins()[:-1], self.lengths)

    def predicted(self) -> np.ndarray:
        """Return the loss tokens per sequence, int64 [sequences]; the first token is never predicted."""
        begins = self.begins()
        trained = self.trained.copy()
        trained[begins[:-1][self.lengths > 0]] = False
        return np.diff(sums(trained)[begins])

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

    In byte-level BPE, the byte lengths of tokens locate a span. Offsets, which cost the tokenizers library 50% more time than ids
    alone, are computed only for rows whose lengths do not add up, and for other tokenizers.
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
        self._adds_eos = self._backend.encode("a").ids[-1:] == [self._end_of_text]
        self._bytes_of = bytes_of_tokens(self._backend)
        self._normalizes = "NFC" in _steps(self._backend.normalizer)
        self._pieces = (
            PieceEncoder(self._backend, self._bytes_of)
            if self._bytes_of is not None and splits_at_spaces(self._backend)
            else None
        )
        self._around = _tokens_around(self._backend) if self._bytes_of is not None else None

    def encode(self, sequences: Sequence[Rendered | Tokens]) -> Encoded:
        """Tokenize sequences of one kind and mark their loss tokens; a token that crosses a span's boundary belongs to the span."""
        rendered = [sequence for sequence in sequences if isinstance(sequence, Rendered)]
        if not rendered:
            rows = [sequence for sequence in sequences if isinstance(sequence, Tokens)]
            lengths = np.array([row.size for row in rows], np.int64)
            return Encoded(
                np.concatenate([row.ids for row in rows]),
                np.concatenate([row.trained for row in rows]),
                lengths,
            )
        if rendered[0].ends_the_text:
            return self._encode_texts(rendered)
        owners = np.repeat(np.arange(len(rendered)), [len(sequence.spans) for sequence in rendered])
        texts = [sequence.text for sequence in rendered]
        if self._bytes_of is None:
            encodings = self._backend.encode_batch(texts, add_special_tokens=False)
            ids, lengths = _concatenated([encoding.ids for encoding in encodings])
            spans = _pairs(chain.from_iterable(map(_by_offsets, rendered, encodings)))
        else:
            ids, lengths = self._ids_of(texts)
            spans = self._by_lengths(rendered, ids, sums(lengths), owners)
        return _marked(ids, lengths, spans, owners)

    def _ids_of(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the token ids of all texts, int32 [tokens], and the number of each, int64 [texts]."""
        if self._pieces is not None:
            return self._pieces.encode(texts)
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return _concatenated([encoding.ids for encoding in encodings])

    def _encode_texts(self, rendered: list[Rendered]) -> Encoded:
        """Tokenize texts with the tokenizer's own BOS and EOS tokens; their one span reaches to the end."""
        texts = [sequence.text for sequence in rendered]
        owners = np.arange(len(texts))
        first = np.zeros(len(texts), np.int64)
        if self._around is None:
            encodings = self._backend.encode_batch(texts, add_special_tokens=True)
            rows = [np.array(encoding.ids, np.int32) for encoding in encodings]
            if not self._whole_text:
                first = np.array([_by_offsets(*each)[0][0] for each in zip(rendered, encodings, strict=True)])
        else:
            begin, end = self._around
            ids, lengths = self._ids_of(texts)
            begins = sums(lengths)
            rows = [np.concatenate([begin, row, end]) for row in np.split(ids, begins[1:-1])]
            if not self._whole_text:
                first = self._by_lengths(rendered, ids, begins, owners)[:, 0] + len(begin)
        rows = [self._with_end(row) for row in rows]
        lengths = np.array([len(row) for row in rows], np.int64)
        return _marked(np.concatenate(rows), lengths, np.stack([first, lengths], 1), owners)

    def _with_end(self, ids: np.ndarray) -> np.ndarray:
        """Return the ids of a text with one EOS token at the end, which the text or the tokenizer may bring."""
        if self._end_of_text is None:
            return ids
        if self._adds_eos and ids[-2:].tolist() == [self._end_of_text] * 2:
            return ids[:-1]
        if ids[-1:].tolist() == [self._end_of_text]:
            return ids
        return np.append(ids, np.int32(self._end_of_text))

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
        text_begins = sums([len(text) for text in texts])
        spans = _pairs(chain.from_iterable(sequence.spans for sequence in sequences))
        spans += text_begins[owners, None]
        if not whole.isascii():
            offsets = _byte_offsets(whole)
            spans, text_begins = offsets[spans], offsets[text_begins]
        token_begins = sums(self._bytes_of[ids])
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


def _concatenated(ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of all sequences, int32 [tokens], and the number of each, int64 [sequences]."""
    lengths = np.array([len(each) for each in ids], np.int64)
    return np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths


def _marked(ids: np.ndarray, lengths: np.ndarray, spans: np.ndarray, owners: np.ndarray) -> Encoded:
    """Mark the tokens in spans as loss tokens.

    Args:
        ids: Token ids of all sequences, [tokens].
        lengths: Tokens per sequence, [sequences].
        spans: First token of each span in its sequence, and the token after its last, [spans, 2].
        owners: Sequence index of each span, [spans].
    """
    first, end = (spans + sums(lengths)[owners, None]).T
    steps = np.bincount(first, minlength=len(ids) + 1) - np.bincount(end, minlength=len(ids) + 1)
    return Encoded(ids, np.cumsum(steps[:-1]) > 0, lengths)


def _pairs(spans: Iterable[Span]) -> np.ndarray:
    return np.array(list(spans), np.int64).reshape(-1, 2)


def _byte_offsets(text: str) -> np.ndarray:
    """Return the UTF-8 offset of each character and of the end, int64 [characters + 1]."""
    content = np.frombuffer(text.encode(), np.uint8)
    return np.append(np.flatnonzero(content & 0xC0 != 0x80), len(content))


def bytes_of_tokens(backend: "Tokenizer") -> np.ndarray | None:
    """Return the byte length of each token by id, or None if tokens do not correspond to bytes of the text."""
    from tokenizers import models

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


def _tokens_around(backend: "Tokenizer") -> tuple[np.ndarray, np.ndarray] | None:
    """Return the ids of the special tokens that a tokenizer adds before and after a text, or None if it changes the text's ids."""
    probe = "a"
    text = backend.encode(probe, add_special_tokens=False).ids
    ids = backend.encode(probe).ids
    places = [place for place in range(len(ids)) if ids[place : place + len(text)] == text]
    if len(places) != 1:
        return None
    begin, end = ids[: places[0]], ids[places[0] + len(text) :]
    return np.array(begin, np.int32), np.array(end, np.int32)


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
