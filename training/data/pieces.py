"""Token ids of texts, from the ids of their words: a word is tokenized once, and most words occur in many rows.

Byte-level BPE with the pre-tokenizers of Llama 3, Qwen, GPT and their kin never joins a space with the word before it. Special
tokens are found before anything else. So a text may be split at both, and its ids are those of its pieces.
"""

import json
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from itertools import compress, pairwise
from operator import not_
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_KEPT_BYTES, _ENTRY_BYTES = 48_000_000, 150  # kept pieces, and what each takes besides its text and ids
_KEPT_CHARACTERS = 64  # of a piece; longer ones, such as Chinese sentences, are seldom repeated
_JOINED = 500  # pieces that are tokenized as one text
_ID_BYTES = 4
_BLANKS = [chr(code).encode() for code in range(0x3001) if chr(code).isspace()]
"""All whitespace characters in UTF-8."""
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

    A text is split at special tokens and at spaces. The ids of pieces are kept, in a limited amount of memory. numpy and Arrow split all
    texts of a call and number their different pieces, since loops over words would take longer than the tokenizer.
    """

    def __init__(self, backend: "Tokenizer", bytes_of: np.ndarray):
        """Prepare the tokenizer.

        Args:
            backend: The tokenizer.
            bytes_of: Byte length of each token by id, int64 [vocabulary]; of tokens that stand for other bytes, more than any text has.
        """
        self._backend = backend
        self._bytes_of = bytes_of
        added = backend.get_added_tokens_decoder().values()
        special = [token.content.encode() for token in added if not token.normalized]
        names = b"|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
        self._special = re.compile(names or b"(?!)")
        self._known: dict[str, bytes] = {}
        """Piece -> its ids as int32."""
        self._size = 0
        """Bytes of the dictionary."""

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the token ids of all texts, int32 [tokens], and the number of each, int64 [texts]."""
        contents = [text.encode() for text in texts]
        whole = b"".join(contents)
        begins = sums(_lengths(contents))
        is_cut = _begins_pieces(whole)
        is_cut[begins] = True
        for begin, content in zip(begins[:-1].tolist(), contents, strict=True):
            for found in self._special.finditer(content):
                is_cut[begin + found.start()] = is_cut[begin + found.end()] = True
        cuts = np.flatnonzero(is_cut)
        buffers = pa.py_buffer(cuts), pa.py_buffer(whole)
        pieces = pa.LargeStringArray.from_buffers(len(cuts) - 1, *buffers).dictionary_encode()
        ids_of_pieces = self._ids_of(pieces.dictionary.to_numpy(zero_copy_only=False).tolist())
        ids = np.frombuffer(b"".join(ids_of_pieces), np.int32)
        counts = _lengths(ids_of_pieces) // _ID_BYTES
        numbers = pieces.indices.to_numpy()
        lengths = counts[numbers]
        ends = sums(lengths)
        places = np.repeat(sums(counts)[numbers] - ends[:-1], lengths) + np.arange(ends[-1])
        return ids[places], np.diff(ends[np.searchsorted(cuts, begins)])

    def _ids_of(self, pieces: list[str]) -> list[bytes]:
        """Return the ids of different pieces, as int32."""
        found = [*map(self._known.get, pieces)]
        new = self._tokenize([piece for piece, ids in zip(pieces, found, strict=True) if ids is None])
        ids = [new[piece] if ids is None else ids for piece, ids in zip(pieces, found, strict=True)]
        if self._size > _KEPT_BYTES:
            self._known.clear()
            self._size = 0
        for piece in new:
            if len(piece) <= _KEPT_CHARACTERS:
                self._known[piece] = new[piece]
                self._size += len(piece) + len(new[piece]) + _ENTRY_BYTES
        return ids

    def _tokenize(self, pieces: list[str]) -> dict[str, bytes]:
        """Return each piece with its ids. Most are tokenized together, which takes half the time: joined, they are the same pieces."""
        joins = [piece[0] == " " and not piece[-1].isspace() for piece in pieces]
        joined = [*compress(pieces, joins)]
        groups = [joined[begin : begin + _JOINED] for begin in range(0, len(joined), _JOINED)]
        texts = ["".join(group) for group in groups]
        ids: dict[str, bytes] = {}
        for group, text, of_text in zip(groups, texts, self._encode(texts), strict=True):
            parts = self._part(of_text, text, group)
            ids.update(zip(group, parts or map(np.ndarray.tobytes, self._encode(group)), strict=True))
        others = [*compress(pieces, map(not_, joins))]
        ids.update(zip(others, map(np.ndarray.tobytes, self._encode(others)), strict=True))
        return ids

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def _part(self, ids: np.ndarray, text: str, pieces: list[str]) -> list[bytes] | None:
        """Return the ids of each piece of a text, or None if the lengths of its tokens do not tell them."""
        if not unicodedata.is_normalized("NFC", text):
            return None  # the normalizer may make one piece as much shorter as another one longer
        wanted = sums(_lengths([piece.encode() for piece in pieces]))
        ends = sums(self._bytes_of[ids])
        places = np.searchsorted(ends, wanted)
        if ends[-1] != wanted[-1] or not np.array_equal(ends[places], wanted):
            return None
        raw = ids.tobytes()
        return [raw[begin:end] for begin, end in pairwise((places * _ID_BYTES).tolist())]


def sums(counts: np.ndarray | list[int]) -> np.ndarray:
    """Return the cumulative sums with a leading 0, int64 [counts + 1]."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _lengths(contents: list[bytes]) -> np.ndarray:
    return np.fromiter(map(len, contents), np.int64, len(contents))


def _begins_pieces(content: bytes) -> np.ndarray:
    """Return True for each space that follows another character than whitespace, bool [bytes of UTF-8 + 1]."""
    padded = np.frombuffer(b"\0\0\0" + content, np.uint8)
    is_cut = np.zeros(len(content) + 1, bool)
    spaces = np.flatnonzero(padded[3:] == ord(" "))
    follows_blank = np.zeros(len(spaces), bool)
    before = np.zeros(len(spaces), np.int32)
    for count in (1, 2, 3):
        before |= padded[spaces + 3 - count].astype(np.int32) << 8 * (count - 1)
        follows_blank |= np.isin(before, [int.from_bytes(blank) for blank in _BLANKS if len(blank) == count])
    is_cut[spaces[~follows_blank]] = True
    return is_cut
