"""Byte lengths of tokens locate the same loss tokens as the offsets of the tokenizers library."""

import copy
import json
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tests.support.tiny_model import make_tokenizer
from training.data.encoding import Encoder
from training.data.rendered import Rendered

WORDS = "2 + 2? It is 4, naïvely. Über 7 مرحبا 你好\n" * 3


def use_gguf_steps(backend: Tokenizer) -> None:
    """Use the steps that transformers builds for a GGUF file's byte-level BPE, such as the quickstart's SmolLM2."""
    backend.normalizer = normalizers.Sequence([])
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("\u2581", " "), decoders.ByteLevel()]
    )


def use_llama_3_steps(backend: Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "merged_with_next"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def use_qwen_steps(backend: Tokenizer) -> None:
    use_llama_3_steps(backend)
    backend.normalizer = normalizers.NFC()


def with_small_vocabulary(**settings: object) -> Callable[[Tokenizer], None]:
    """Return a change that trains a vocabulary on WORDS only; other bytes are unknown, dropped or fall back."""

    def change(backend: Tokenizer) -> None:
        smaller = Tokenizer(models.BPE())
        smaller.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fallback = [f"<0x{byte:02X}>" for byte in range(256)] if settings.get("byte_fallback") else []
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        smaller.train_from_iterator([WORDS], trainers.BpeTrainer(special_tokens=special, show_progress=False))
        vocabulary = smaller.get_vocab()
        vocabulary |= {token: len(vocabulary) + number for number, token in enumerate(fallback)}
        backend.model = models.BPE(vocabulary, _merges(smaller), **settings)
        add_greedy_tokens(backend)

    return change


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]


def add_greedy_tokens(backend: Tokenizer) -> None:
    """Add a token that strips the whitespace around it, and one that matches normalized text."""
    backend.add_tokens(
        [
            AddedToken("<eats>", lstrip=True, rstrip=True),
            AddedToken("é", normalized=True),
            AddedToken("naïve"),
        ]
    )


BYTE_LEVEL: dict[str, Callable[[Tokenizer], None]] = {
    "plain": lambda backend: None,
    "gguf": use_gguf_steps,
    "llama_3": use_llama_3_steps,
    "qwen": use_qwen_steps,
    "unknown": with_small_vocabulary(unk_token="<|endoftext|>", fuse_unk=True),
    "dropped": with_small_vocabulary(),
    "fallback": with_small_vocabulary(byte_fallback=True),
    "added": add_greedy_tokens,
}


@pytest.fixture(scope="session")
def tokenizers_by_kind() -> dict[str, PreTrainedTokenizerFast]:
    by_kind = {}
    for kind, change in BYTE_LEVEL.items():
        by_kind[kind] = copy.deepcopy(make_tokenizer())
        change(by_kind[kind].backend_tokenizer)
        by_kind[kind].backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", by_kind[kind].bos_token_id)]
        )
    return by_kind


_text = st.lists(
    st.text(min_size=1, max_size=8)
    | st.sampled_from(
        [
            "<|im_end|>",
            "<|endoftext|>",
            " <eats> ",
            "naïve",
            "e\u0301",
            "é",
            "a\u0301\u0323",
            "👩‍👩‍👧",
            "<0xC3>",
            "\U000f0000",
            "2 + 2",
        ]
    ),
    min_size=1,
    max_size=8,
).map("".join)
# Texts whose tokens have the same total byte length as the text, but other boundaries.
REORDERED = "a\u0301\u0323"
TWO_UNKNOWN = "!" * (len("<|endoftext|>") - 1) + "2" + "!" * (len("<|endoftext|>") + 1)
STRIPPED_AND_BYTE_FALLBACK = f"Ж{' ' * 11}<eats>{' ' * 11}2"


@pytest.mark.parametrize("kind", list(BYTE_LEVEL))
@given(text=_text, boundaries=st.sets(st.integers(0, 40), max_size=4))
@example(text=REORDERED, boundaries={1, 2})
@example(text=TWO_UNKNOWN, boundaries={13, 20})
@example(text=STRIPPED_AND_BYTE_FALLBACK, boundaries={1, 5})
def test_byte_lengths_and_offsets_mark_the_same_loss_tokens(
    tokenizers_by_kind: dict[str, PreTrainedTokenizerFast], kind: str, text: str, boundaries: set[int]
):
    tokenizer = tokenizers_by_kind[kind]
    positions = sorted(position for position in boundaries if position <= len(text))
    spans = tuple(zip(positions[::2], positions[1::2], strict=False))
    # The neighbors must be located correctly even if the bytes of the middle text do not add up.
    rendered = [Rendered("é 2", ((1, 3),)), Rendered(text, spans), Rendered("It is 4", ((0, 2), (3, 7)))]
    by_lengths, by_offsets = Encoder(tokenizer, whole_text=False), Encoder(tokenizer, whole_text=False)
    assert by_lengths._bytes_of is not None
    by_offsets._bytes_of = None
    fast, slow = by_lengths.encode(rendered), by_offsets.encode(rendered)
    assert fast.ids.tolist() == slow.ids.tolist()
    assert fast.lengths.tolist() == slow.lengths.tolist()
    assert fast.trained.tolist() == slow.trained.tolist()


@pytest.mark.parametrize("kind", [kind for kind in BYTE_LEVEL if kind != "dropped"])  # it may have no token
@given(text=_text, begin=st.integers(0, 40), whole_text=st.booleans())
def test_texts_get_the_special_tokens_of_the_tokenizer(
    tokenizers_by_kind: dict[str, PreTrainedTokenizerFast], kind: str, text: str, begin: int, whole_text: bool
):
    tokenizer = tokenizers_by_kind[kind]
    texts = [
        Rendered(each, ((min(begin, len(each) - 1), len(each)),), ends_the_text=True)
        for each in (text, "It is 4")
    ]
    by_lengths, by_offsets = (Encoder(tokenizer, whole_text=whole_text) for _ in range(2))
    by_offsets._around = None
    fast, slow = by_lengths.encode(texts), by_offsets.encode(texts)
    for encoded in (fast, slow):
        encoded.trained[encoded.begins()[:-1]] = False  # the first token is never predicted
    assert fast.ids[0] == tokenizer.bos_token_id
    assert fast.ids[-1] == tokenizer.eos_token_id
    assert fast.ids.tolist() == slow.ids.tolist()
    assert fast.lengths.tolist() == slow.lengths.tolist()
    assert fast.trained.tolist() == slow.trained.tolist()


@pytest.mark.parametrize("ending", ["", "<|endoftext|>", "<|endoftext|><|endoftext|>"])
@pytest.mark.parametrize("by_lengths", [True, False])
@pytest.mark.parametrize("whole_text", [True, False])
def test_a_text_that_ends_with_eos_gets_no_second_one(ending: str, by_lengths: bool, whole_text: bool):
    """Some tokenizers append EOS themselves; a text's own EOS tokens are retained."""
    tokenizer = copy.deepcopy(make_tokenizer())
    eos = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<|im_start|> $A {tokenizer.eos_token}",
        special_tokens=[("<|im_start|>", tokenizer.bos_token_id), (str(tokenizer.eos_token), eos)],
    )
    encoder = Encoder(tokenizer, whole_text=whole_text)
    if not by_lengths:
        encoder._around = None
    ending = ending.replace("<|endoftext|>", str(tokenizer.eos_token))
    text = "It is 4" + ending
    encoded = encoder.encode([Rendered(text, ((6, len(text)),), ends_the_text=True)])
    own = tokenizer.encode(text, add_special_tokens=False)
    assert encoded.ids.tolist() == [tokenizer.bos_token_id, *own, *([] if ending else [eos])]
    assert encoded.trained[-1] and encoded.lengths.sum() == len(encoded.trained)


def prefix_with_space(backend: Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def lowercase(backend: Tokenizer) -> None:
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])


def drop_whitespace(backend: Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def use_metaspace(backend: Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.Metaspace()


@pytest.mark.parametrize("change", [prefix_with_space, lowercase, drop_whitespace, use_metaspace])
def test_tokenizers_that_change_bytes_use_offsets(change: Callable[[Tokenizer], None]):
    tokenizer = make_tokenizer()
    change(tokenizer.backend_tokenizer)
    assert Encoder(tokenizer, whole_text=False)._bytes_of is None
