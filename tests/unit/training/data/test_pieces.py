"""Texts that are tokenized by their pieces have the tokens that the tokenizers library gives the complete text."""

import copy
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from tests.support.tiny_model import make_tokenizer
from training.data import pieces
from training.data.encoding import bytes_of_tokens
from training.data.pieces import PieceEncoder, splits_at_spaces

LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT_OSS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def splitting(*patterns: str) -> Callable[[Tokenizer], None]:
    """Return a change to the pre-tokenizer of a model family: its patterns, then bytes."""

    def change(backend: Tokenizer) -> None:
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_alone])

    return change


def split_as_qwen(backend: Tokenizer) -> None:
    splitting(LLAMA_3.replace("{1,3}", ""))(backend)
    backend.normalizer = normalizers.NFC()


def split_as_smollm2(backend: Tokenizer) -> None:
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def add_tokens(backend: Tokenizer) -> None:
    """Add tokens that overlap, hold whitespace, or match normalized text."""
    backend.add_tokens([AddedToken("<|im_end|>\n"), AddedToken("    "), AddedToken(" é", normalized=True)])


def with_few_bytes(**settings: Any) -> Callable[[Tokenizer], None]:
    """Return a change to a vocabulary without the bytes of é and of digits, which are dropped or unknown."""

    def change(backend: Tokenizer) -> None:
        model = json.loads(backend.to_str())["model"]
        lacks = re.compile("[\u00c3\u00cc0-9]")
        vocabulary = {token: number for token, number in model["vocab"].items() if not lacks.search(token)}
        merges = [tuple(merge) for merge in model["merges"] if not lacks.search("".join(merge))]
        backend.model = models.BPE(vocabulary, merges, **settings)

    return change


FAMILIES: dict[str, Callable[[Tokenizer], None]] = {
    "gpt2": lambda backend: None,
    "smollm2": split_as_smollm2,
    "llama_3": splitting(LLAMA_3),
    "qwen": split_as_qwen,
    "gpt_oss": splitting(GPT_OSS),
    "deepseek_v3": splitting(*DEEPSEEK_V3),
    "added": add_tokens,
    "dropped": with_few_bytes(),
    "unknown": with_few_bytes(unk_token="<|endoftext|>", fuse_unk=True),
}


@pytest.fixture(scope="session")
def families() -> dict[str, Tokenizer]:
    """Return a tokenizer for each family."""
    backends = {}
    for name, change in FAMILIES.items():
        backends[name] = copy.deepcopy(make_tokenizer().backend_tokenizer)
        change(backends[name])
    return backends


_parts = [
    "<|im_start|>",
    "<|im_end|>\n",
    "<|im",
    "|>",
    "It",
    "is",
    "naïve,",
    "it's",
    "2",
    "12345",
    "?",
    "e\u0301",
    "\u0301",
    *["word", "Longer", "words,", "naïve", "и", "слова", "你好"],
]
_spaces = [" ", " ", "  ", "    ", "\n", " \n", "\n  ", "\t", "\u00a0", "\u2028", "\x1c", "\x85"]
_texts = st.lists(st.sampled_from([*_parts, *_spaces, *_spaces]) | st.text(max_size=3), max_size=24).map(
    "".join
)


def piece_encoder(backend: Tokenizer) -> PieceEncoder:
    bytes_of = bytes_of_tokens(backend)
    assert bytes_of is not None
    return PieceEncoder(backend, bytes_of)


@pytest.mark.parametrize("family", list(FAMILIES))
@given(texts=st.lists(_texts, min_size=1, max_size=4))
@example(texts=["It is  2 \n  x<|im_end|>\n  It", " ", "", "你好" * 40])
@example(
    texts=["x e\u0301e\u0301e\u0301 \u0958 x", "x \u0958"]
)  # NFC: one is 3 bytes shorter, the other 3 longer
@example(texts=["It is\u3000 it", "is\u00a0 it is\u1680 it is\x85 it", "<|im", "_end|>"])
def test_pieces_have_the_tokens_of_the_complete_text(
    families: dict[str, Tokenizer], family: str, texts: list[str]
):
    backend = families[family]
    assert splits_at_spaces(backend)
    encoder = piece_encoder(backend)
    expected = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    for _ in range(2):  # the second time, from the pieces that were kept
        ids, lengths = encoder.encode(texts)
        assert [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] == expected


def test_words_beside_special_tokens_are_kept_alone(families: dict[str, Tokenizer]):
    encoder = piece_encoder(families["gpt2"])
    encoder.encode(["<|im_start|>It is<|im_end|>\n<|im_start|>"])
    assert encoder._known.keys() == {"<|im_start|>", "It", " is", "<|im_end|>", "\n"}


def join_words(backend: Tokenizer) -> None:
    """Let tokens reach over spaces, as those of SuperBPE do."""
    splitting(r"\d+")(backend)


def split_after_spaces(backend: Tokenizer) -> None:
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "merged_with_previous"), bytes_alone]
    )


def add_stripping_token(backend: Tokenizer) -> None:
    backend.add_tokens([AddedToken("<eats>", lstrip=True)])


def add_word_token(backend: Tokenizer) -> None:
    backend.add_tokens([AddedToken("It", single_word=True)])


def add_token_with_space(backend: Tokenizer) -> None:
    backend.add_tokens([AddedToken("It is")])


def drop_merges(backend: Tokenizer) -> None:
    model = backend.model
    assert isinstance(model, models.BPE)
    model.dropout = 0.5


@pytest.mark.parametrize(
    "change",
    [join_words, split_after_spaces, add_stripping_token, add_word_token, add_token_with_space, drop_merges],
)
def test_tokenizers_whose_tokens_reach_over_spaces_are_not_split(change: Callable[[Tokenizer], None]):
    backend = make_tokenizer().backend_tokenizer
    change(backend)
    assert not splits_at_spaces(backend)


def test_memory_of_pieces_is_bounded(families: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pieces, "_KEPT_BYTES", 10_000)
    encoder = piece_encoder(families["gpt2"])
    for first in range(0, 1000, 20):
        text = " ".join(f"word{number}" for number in range(first, first + 20))
        (expected,) = families["gpt2"].encode_batch_fast([text], add_special_tokens=False)
        assert encoder.encode([text])[0].tolist() == expected.ids
        assert sum(len(piece) + len(ids) for piece, ids in encoder._known.items()) < 10_000
