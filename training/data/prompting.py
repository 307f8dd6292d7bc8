"""Prompt encoding, stop tokens and hidden tokens for generation with a trained model."""

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from training.data.chat_template import ChatTemplate
from training.data.template_traits import TemplateTraits

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerFast


def stop_tokens(settings: "GenerationConfig | None", tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """Return the ids of the stop tokens: EOS of model and tokenizer, and the chat template's end-of-turn tokens.

    Args:
        settings: The model's generation config.
        tokenizer: Its tokenizer, with the chat template used in training.
    """
    configured: Any = settings.eos_token_id if settings else None
    stops = set(configured if isinstance(configured, list) else [] if configured is None else [configured])
    if isinstance(tokenizer.eos_token_id, int):
        stops.add(tokenizer.eos_token_id)
    return sorted(stops | set(end_of_turn(tokenizer)))


def end_of_turn(tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """Return the ids of the special tokens with which the chat template ends a turn; empty if it ends turns with other text.

    It is one token, or the first ones of the turns that may follow (GLM-4.5).
    """
    traits = TemplateTraits(ChatTemplate(tokenizer), tokenizer)
    if traits.next_headers:
        return [tokenizer.get_vocab()[token] for token in traits.next_headers.values()]
    end = traits.end_marker
    tokens = tokenizer.encode(end, add_special_tokens=False) if end else []
    special = [*tokenizer.added_tokens_decoder, tokenizer.eos_token_id]
    return [token for token in tokens if token in special][:1]


def encode_prompt(tokenizer: "PreTrainedTokenizerFast", prompt: str, *, is_rendered: bool) -> Sequence[int]:
    """Tokenize a prompt, without an EOS token at its end.

    Args:
        is_rendered: True if the chat template rendered the prompt, which then contains its special tokens.
    """
    if is_rendered:
        return tokenizer.encode(prompt, add_special_tokens=False)
    tokens = tokenizer.encode(prompt)
    return tokens[:-1] if tokens[-1:] == [tokenizer.eos_token_id] else tokens


def tokens_left_out(
    tokenizer: "PreTrainedTokenizerFast", stops: Iterable[int], shown: Collection[str]
) -> frozenset[int]:
    """Return the special tokens that are no part of an answer.

    Args:
        tokenizer: The tokenizer.
        stops: The tokens that end an answer.
        shown: Other special tokens that answers contain: marks of reasoning, and the run's `new_special_tokens`.
    """
    others = {
        token
        for token, added in tokenizer.added_tokens_decoder.items()
        if added.special and added.content not in shown
    }
    return frozenset(others | set(stops))
