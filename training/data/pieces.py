"""Token ids of texts, from the ids of their words: a word is tokenized once, and most words occur in many rows.

Byte-level BPE with the pre-tokenizers of Llama 3, Qwen, GPT and their kin never joins a space with the word before it. Special
tokens are found before anything else. So a text may be split at both, and its ids are those of its pieces.
"""

import json
import re
from array import array
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_KEPT_BYTES, _ENTRY_BYTES = (
    48_000_000,
    150,
)  # kept pieces and segments, and what each takes besides its text and ids
_ID_BYTES = 4
_RUNS = re.compile(rb" *[^ ]+| +")
_USUAL_BYTES = 24  # per word; a segment of longer ones is tokenized as a whole
_PROBES = (
    *"aZéßǅʰжمक你ひ한7²Ⅷ.,'()-_/\\$+<|~…🍎\u0301\u200b\u3000\ue000\x01\n\t",
    *["e\u0301", "1234", "'s", "'LL", "don't", "a.", "a7", "\ta", "a\u00a0b", "x\ny", ".\n\n.", "\r\n"],
)
"""Texts of every kind of character that pre-tokenizers treat in its own way, alone and beside others."""


def splits_at_spaces(backend: "Tokenizer") -> bool:
    """Return whether the ids of a text are those of its pieces, which begin at a space after another character than whitespace.

    The pre-tokenizer is asked about each pair of probes. An added token that strips whitespace or has a space inside, and BPE
    with dropout, rule it out.

    Args:
        backend: A byte-level BPE, whose normalizer is NFC or nothing.
    """
    from tokenizers import models

    added = backend.get_added_tokens_decoder().values()
    if any(
        token.lstrip or token.rstrip or token.single_word or re.search(r"\S ", token.content)
        for token in added
    ):
        return False
    model = backend.model
    if not isinstance(model, models.BPE) or model.dropout or backend.encode_special_tokens:
        return False
    if backend.pre_tokenizer is None:
        return False
    return _keeps_words_apart(backend.pre_tokenizer.__getstate__().decode())


@lru_cache
def _keeps_words_apart(pre_tokenizer: str) -> bool:
    """Return whether a pre-tokenizer, as JSON, begins a word at a space after each probe, and treats both sides as it does alone."""
    from tokenizers import Tokenizer, models

    state = json.loads(Tokenizer(models.BPE()).to_str()) | {"pre_tokenizer": json.loads(pre_tokenizer)}
    split = Tokenizer.from_str(json.dumps(state)).pre_tokenizer.pre_tokenize_str

    def words(text: str) -> list[str]:
        return [word for word, _ in split(text)]

    ends = {probe: words(probe) for probe in _PROBES if not probe[-1].isspace()}
    begins = {right: words(right) for probe in ("", *_PROBES) for right in (f" {probe}", f"  {probe}")}
    return all(words(left + right) == ends[left] + begins[right] for left in ends for right in begins)


class PieceEncoder:
    """An encoder of texts by their pieces, for tokenizers for which `splits_at_spaces` is true.

    A text is split at special tokens into segments, and these at spaces into pieces. The ids of both are kept, in a limited amount of
    memory: headers and system prompts are the same in many rows, and so are most words.
    """

    def __init__(self, backend: "Tokenizer"):
        self._backend = backend
        added = backend.get_added_tokens_decoder().values()
        special = [token.content.encode() for token in added if not token.normalized]
        names = b"|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
        self._special = re.compile(b"(" + (names or b"(?!)") + b")")
        self._inner: dict[bytes, bytes] = {}
        """Piece in UTF-8 -> its ids as int32. None ends with whitespace, so what follows it changes no id."""
        self._whole: dict[bytes, bytes] = {}
        """The same for segments, and for their last pieces."""
        self._size = 0
        """Bytes of both dictionaries."""

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the token ids of all texts, int32 [tokens], and the number of each, int64 [texts]."""
        ids: list[bytes] = []  # of each segment
        unknown: dict[int, tuple[bytes, list[bytes]]] = {}  # index of a segment -> the segment and its pieces
        ends = [0]
        for text in texts:
            for segment in self._special.split(text.encode()):
                known = self._whole.get(segment)
                if known is None:
                    pieces = _pieces_of(segment)
                    found = self._find(pieces)
                    if None in found:
                        unknown[len(ids)] = segment, pieces
                        known = b""
                    else:
                        known = self._keep(self._whole, segment, b"".join(found))
                ids.append(known)
            ends.append(len(ids))
        self._learn(self._inner, {piece for _, pieces in unknown.values() for piece in pieces[:-1]})
        self._learn(self._whole, {pieces[-1] for _, pieces in unknown.values()})
        for number, (segment, pieces) in unknown.items():
            ids[number] = self._keep(self._whole, segment, b"".join(self._find(pieces)))
        if self._size > _KEPT_BYTES:
            self._inner.clear()
            self._whole.clear()
            self._size = 0
        of_texts = [b"".join(ids[begin:end]) for begin, end in pairwise(ends)]
        lengths = np.array([len(each) for each in of_texts], np.int64) // _ID_BYTES
        return np.frombuffer(b"".join(of_texts), np.int32), lengths

    def _find(self, pieces: list[bytes]) -> list[Any]:
        """Return the ids of the pieces of a segment, with None for unknown ones.

        A piece that ends with whitespace, or is empty, is joined in place with the next one: together, they may have other ids.
        """
        ids = [*map(self._inner.get, pieces[:-1]), self._whole.get(pieces[-1])]
        if None in ids:
            for place in reversed([place for place, known in enumerate(ids[:-1]) if known is None]):
                if not pieces[place].decode()[-1:].strip():
                    pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
                    known = self._whole if place == len(pieces) - 1 else self._inner
                    ids[place : place + 2] = [known.get(pieces[place])]
        return ids

    def _learn(self, known: dict[bytes, bytes], pieces: set[bytes]) -> None:
        """Tokenize the pieces that are not known."""
        new = [*(pieces - known.keys())]
        texts = [piece.decode() for piece in new]
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        for piece, encoding in zip(new, encodings, strict=True):
            self._keep(known, piece, array("i", encoding.ids).tobytes())

    def _keep(self, known: dict[bytes, bytes], text: bytes, ids: bytes) -> bytes:
        known[text] = ids
        self._size += len(text) + len(ids) + _ENTRY_BYTES
        return ids


def _pieces_of(segment: bytes) -> list[bytes]:
    """Split a segment at its spaces; not if its words are long, as in Chinese, or if it holds NUL, which separates pieces here."""
    if segment.count(b" ") * _USUAL_BYTES < len(segment) or b"\0" in segment:
        return [segment]
    if b"  " in segment:
        return _RUNS.findall(segment)
    return segment.replace(b" ", b"\0 ").split(b"\0")
