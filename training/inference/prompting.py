"""Prompts and stop tokens for generation with a trained model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from training.data.templates import Renderer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def stop_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """Return the stop tokens: those of the model and the tokenizer, and the chat template's end-of-turn token."""
    said = model.generation_config.eos_token_id if model.generation_config else None
    stops = set(said if isinstance(said, list) else [] if said is None else [said])
    if isinstance(tokenizer.eos_token_id, int):
        stops.add(tokenizer.eos_token_id)
    end = Renderer(tokenizer, whole_text=False).end_marker
    first = tokenizer.encode(end, add_special_tokens=False)[:1] if end else []
    return sorted(stops | (set(first) & set(tokenizer.added_tokens_decoder)))


def encode_prompt(tokenizer: "PreTrainedTokenizerFast", prompt: str, *, is_laid_out: bool) -> Sequence[int]:
    """Tokenize a prompt, without an EOS token at its end.

    Args:
        is_laid_out: the text was rendered with a chat template, which writes the special tokens itself.
    """
    if is_laid_out:
        return tokenizer.encode(prompt, add_special_tokens=False)
    tokens = tokenizer.encode(prompt)
    return tokens[:-1] if tokens[-1:] == [tokenizer.eos_token_id] else tokens
