"""Where tokens are pieces of the text's bytes, their lengths say the same as the library's offsets."""

import copy
import json
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.support.tiny_model import make_tokenizer
from training.data.encoding import Encoder
from training.data.rendered import Rendered

WORDS = "2 + 2? It is 4, naïvely. Über 7 مرحبا 你好\n" * 3


def as_from_gguf(backend: Tokenizer) -> None:
    """What transformers makes of a GGUF file's byte-level BPE: SmolLM2's of the quickstart is one."""
    backend.normalizer = normalizers.Sequence([])
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("\u2581", " "), decoders.ByteLevel()]
    )


def as_llama_3(backend: Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "merged_with_next"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def as_qwen(backend: Tokenizer) -> None:
    as_llama_3(backend)
    backend.normalizer = normalizers.NFC()


def without_some_bytes(**settings: object) -> Callable[[Tokenizer], None]:
    """A vocabulary of what these words need, and something else for the rest."""

    def change(backend: Tokenizer) -> None:
        smaller = Tokenizer(models.BPE())
        smaller.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fallback = [f"<0x{byte:02X}>" for byte in range(256)] if settings.get("byte_fallback") else []
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        smaller.train_from_iterator([WORDS], trainers.BpeTrainer(special_tokens=special, show_progress=False))
        vocabulary = smaller.get_vocab()
        vocabulary |= {token: len(vocabulary) + number for number, token in enumerate(fallback)}
        backend.model = models.BPE(vocabulary, _merges(smaller), **settings)
        with_eager_added_tokens(backend)

    return change


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]


def with_eager_added_tokens(backend: Tokenizer) -> None:
    """One that takes the white space around it, and one that is found in normalised text."""
    backend.add_tokens(
        [
            AddedToken("<eats>", lstrip=True, rstrip=True),
            AddedToken("é", normalized=True),
            AddedToken("naïve"),
        ]
    )


BYTE_LEVEL: dict[str, Callable[[Tokenizer], None]] = {
    "plain": lambda backend: None,
    "gguf": as_from_gguf,
    "llama_3": as_llama_3,
    "qwen": as_qwen,
    "unknown": without_some_bytes(unk_token="<|endoftext|>", fuse_unk=True),
    "dropped": without_some_bytes(),
    "fallback": without_some_bytes(byte_fallback=True),
    "added": with_eager_added_tokens,
}


@pytest.fixture(scope="session")
def tokenizers_by_kind() -> dict[str, PreTrainedTokenizerFast]:
    made = {}
    for kind, change in BYTE_LEVEL.items():
        made[kind] = copy.deepcopy(make_tokenizer())
        change(made[kind].backend_tokenizer)
    return made


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
# Texts whose tokens have as many bytes as they, and have them elsewhere.
REORDERED = "a\u0301\u0323"
TWO_UNKNOWN = "!" * (len("<|endoftext|>") - 1) + "2" + "!" * (len("<|endoftext|>") + 1)
EATEN_AND_FALLEN_BACK = f"Ж{' ' * 11}<eats>{' ' * 11}2"


@pytest.mark.parametrize("kind", list(BYTE_LEVEL))
@given(text=_text, places=st.sets(st.integers(0, 40), max_size=4))
@example(text=REORDERED, places={1, 2})
@example(text=TWO_UNKNOWN, places={13, 20})
@example(text=EATEN_AND_FALLEN_BACK, places={1, 5})
def test_trained_tokens_are_those_of_the_offsets(
    tokenizers_by_kind: dict[str, PreTrainedTokenizerFast], kind: str, text: str, places: set[int]
):
    tokenizer = tokenizers_by_kind[kind]
    inside = sorted(place for place in places if place <= len(text))
    spans = tuple(zip(inside[::2], inside[1::2], strict=False))
    # Between others: where one's tokens are not its bytes, the others' must be found all the same.
    rendered = [Rendered("é 2", ((1, 3),)), Rendered(text, spans), Rendered("It is 4", ((0, 2), (3, 7)))]
    by_lengths, by_offsets = Encoder(tokenizer, whole_text=False), Encoder(tokenizer, whole_text=False)
    assert by_lengths._bytes_of is not None
    by_offsets._bytes_of = None
    fast, slow = (encoder.locate(rendered, encoder.encode(rendered)) for encoder in (by_lengths, by_offsets))
    assert fast.ids.tolist() == slow.ids.tolist()
    assert fast.lengths.tolist() == slow.lengths.tolist()
    assert fast.trained.tolist() == slow.trained.tolist()


def prefixed_by_a_space(backend: Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def with_other_normalisation(backend: Tokenizer) -> None:
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])


def without_white_space(backend: Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def metaspace(backend: Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.Metaspace()


@pytest.mark.parametrize(
    "change", [prefixed_by_a_space, with_other_normalisation, without_white_space, metaspace]
)
def test_tokens_that_may_be_other_bytes_are_asked_for_offsets(change: Callable[[Tokenizer], None]):
    tokenizer = make_tokenizer()
    change(tokenizer.backend_tokenizer)
    assert Encoder(tokenizer, whole_text=False)._bytes_of is None
