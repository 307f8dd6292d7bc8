"""Rendered text -> token ids, and which of them stand where the loss looks."""

import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from training.data.templates import Rendered, Span

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers.normalizers import Normalizer
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerFast

_NOT_KNOWN = 1 << 30  # bytes of a token that stands for what the vocabulary lacks: more than any row has


@dataclass(frozen=True, slots=True)
class Encoded:
    """Sequences as tokens, one behind another."""

    ids: np.ndarray
    """int32 [tokens]"""
    trained: np.ndarray
    """bool [tokens]: whether the loss looks at it."""
    lengths: np.ndarray
    """int64 [sequences]: tokens of each."""

    def begins(self) -> np.ndarray:
        """int64 [sequences + 1]: where each sequence begins, and where the last ends."""
        return _sums(self.lengths)

    def places(self) -> np.ndarray:
        """int64 [tokens]: each token's place in its sequence."""
        return np.arange(len(self.ids)) - np.repeat(self.begins()[:-1], self.lengths)

    def predicted(self) -> np.ndarray:
        """int64 [sequences]: trained tokens that something stands before; nothing predicts the first."""
        begins = self.begins()
        trained = self.trained.copy()
        trained[begins[:-1][self.lengths > 0]] = False
        return np.diff(_sums(trained)[begins])

    def cut(self, limit: int) -> "Encoded":
        """The first `limit` tokens of each sequence."""
        kept = self.places() < limit
        return Encoded(self.ids[kept], self.trained[kept], np.minimum(self.lengths, limit))

    def take(self, sequences: np.ndarray) -> "Encoded":
        """Some of the sequences: bool [sequences]."""
        kept = np.repeat(sequences, self.lengths)
        return Encoded(self.ids[kept], self.trained[kept], self.lengths[sequences])


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

    def locate(self, sequences: Sequence[Rendered], encodings: "Sequence[Encoding]") -> Encoded:
        """Sequences of one kind as tokens; a token that reaches over a span's beginning or end belongs to it."""
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
        """[spans, 2] in tokens of their sequence: characters -> bytes -> tokens; the arrays go over all sequences.

        Args:
            sequences: What was encoded.
            ids: [tokens].
            begins: [sequences + 1], in tokens.
            owners: [spans]: the sequence that each span is of.
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
        # Where one's tokens are not its bytes, those of the sequences behind it stand elsewhere than their text.
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


def _sums(counts: np.ndarray | list[int]) -> np.ndarray:
    """int64 [counts + 1]: what stands before each, and all."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _pairs(spans: Iterable[Span]) -> np.ndarray:
    return np.array(list(spans), np.int64).reshape(-1, 2)


def _byte_offsets(text: str) -> np.ndarray:
    """int64 [characters + 1]: where in UTF-8 each character begins, and where the last ends."""
    content = np.frombuffer(text.encode(), np.uint8)
    return np.append(np.flatnonzero(content & 0xC0 != 0x80), len(content))


def _bytes_of_tokens(tokenizer: "PreTrainedTokenizerFast") -> np.ndarray | None:
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
    lengths = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for token, number in vocabulary.items():
        lengths[number] = len(token)  # a character for each byte
    for number, added in backend.get_added_tokens_decoder().items():
        lengths[number] = len(added.content.encode())
    for token in (model.unk_token, *(f"<0x{byte:02X}>" for byte in range(256))):
        if token in vocabulary:
            lengths[vocabulary[token]] = _NOT_KNOWN
    probe = "a b"  # some put a space before the text
    ids = backend.encode(probe, add_special_tokens=False).ids
    return lengths if lengths[ids].sum() == len(probe) else None


def _steps(part: "Normalizer | PreTokenizer | None") -> list[str]:
    """What a part of a tokenizer does, step after step."""
    if part is None:
        return []
    state = json.loads(part.__getstate__())  # the only way to look into a Sequence
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
    """The first token of the characters from `begin` on; some tokenizers leave white space out."""
    for character in range(begin, end):
        if (token := encoding.char_to_token(character)) is not None:
            return token
    return None
