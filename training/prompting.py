"""How a trained model is spoken to: the tokens that an answer follows, and those that end it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from training.data.templates import Renderer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def stop_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """What ends an answer: what the model and the tokenizer say, and the mark that the chat template puts behind answers."""
    said = model.generation_config.eos_token_id if model.generation_config else None
    stops = set(said if isinstance(said, list) else [] if said is None else [said])
    if isinstance(tokenizer.eos_token_id, int):
        stops.add(tokenizer.eos_token_id)
    end = Renderer(tokenizer, whole_text=False).end_marker
    first = tokenizer.encode(end, add_special_tokens=False)[:1] if end else []
    return sorted(stops | (set(first) & set(tokenizer.added_tokens_decoder)))


def encode_prompt(tokenizer: "PreTrainedTokenizerFast", prompt: str, *, is_laid_out: bool) -> Sequence[int]:
    """The tokens that an answer follows.

    Args:
        tokenizer: The model's.
        prompt: Text.
        is_laid_out: By a chat template, which writes the special tokens itself.
    """
    if is_laid_out:
        return tokenizer.encode(prompt, add_special_tokens=False)
    tokens = tokenizer.encode(prompt)
    return tokens[:-1] if tokens[-1:] == [tokenizer.eos_token_id] else tokens
