"""Tokens that a run adds to the vocabulary: in the tokenizer, and as rows of the embedding and the LM head."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from configs.loading import ConfigError
from configs.schema import FinetuneConfig, LoraConfig
from training.models.architecture import MetaModel, is_embedding, is_head
from training.models.files import ModelFacts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

_POSITIONS = re.compile(r"(wpe|embed_positions)\.")


@dataclass(frozen=True)
class NewTokens:
    """The tokens that a run adds, with the start of their rows."""

    ids: tuple[int, ...]
    parts: tuple[tuple[int, ...], ...]
    """For each token, the ids that its text has without it."""
    ends: tuple[str, ...] = ()
    """Names of the modules whose rows an adapter trains: the embedding, and an LM head that is not tied to it."""

    @property
    def rows(self) -> int:
        """Return the rows that an embedding needs."""
        return max(self.ids) + 1


def add_tokens(config: FinetuneConfig, tokenizer: "PreTrainedTokenizerFast", source: str) -> NewTokens | None:
    """Add the tokens of the YAML to a tokenizer in place; return None if it has none.

    Args:
        config: The YAML.
        tokenizer: The model's tokenizer.
        source: Hub id, directory or URI of the tokenizer, in messages.

    Raises:
        ConfigError: A token exists already, or the tokenizer makes nothing of its text.
    """
    from tokenizers import AddedToken

    if not config.added_tokens:
        return None
    known = tokenizer.get_vocab()
    parts = []
    for token in config.added_tokens:
        key = "new_tokens" if token in config.new_tokens else "new_special_tokens"
        if token in known:
            raise ConfigError(
                f"{key}: {token!r} exists already in the tokenizer of {source}, with the id {known[token]}. Remove it from {key}."
            )
        parts.append(tuple(tokenizer.encode(token, add_special_tokens=False)))
        if not parts[-1]:
            raise ConfigError(
                f"{key}: the tokenizer of {source} removes the text {token!r}, so its row has no start. Choose another spelling."
            )
    for tokens, special in ((config.new_tokens, False), (config.new_special_tokens, True)):
        added: Any = [AddedToken(token, special=special, normalized=False) for token in tokens]
        tokenizer.add_tokens(added, special_tokens=special)
    ids = tokenizer.convert_tokens_to_ids(list(config.added_tokens))
    assert isinstance(ids, list)
    return NewTokens(tuple(ids), tuple(parts))


def trained_ends(new: NewTokens, base: MetaModel) -> NewTokens:
    """Return the tokens with the modules whose rows an adapter trains.

    Args:
        new: The tokens.
        base: The base model.

    Raises:
        ConfigError: The LM head has a bias, which PEFT drops where it trains rows of the head.
    """
    model: Any = base.model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ConfigError(
            f"new_tokens: the LM head of {base.source} has a bias, which PEFT drops where it trains the rows of tokens. Remove lora_config "
            "to train all parameters, or choose another model."
        )
    is_tied = (
        head is None or head.weight is embedding.weight or model.config.get_text_config().tie_word_embeddings
    )
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    ends = [embedding] if is_tied else [embedding, head]
    return replace(new, ends=tuple(names[id(end)] for end in ends))


def with_token_rows(lora: LoraConfig, new: NewTokens | None) -> LoraConfig:
    """Return an adapter's settings that also train the rows of new tokens."""
    if new is None:
        return lora
    own = lora.trainable_token_indices or []
    assert isinstance(own, list)
    ids = list(new.ids)
    rows: Any = [*own, *ids] if len(new.ends) == 1 else {new.ends[0]: [*own, *ids], new.ends[1]: ids}
    return lora.model_copy(update={"trainable_token_indices": rows})


def with_grown_vocabulary(facts: ModelFacts, rows: int) -> ModelFacts:
    """Return a model's facts with at least this many rows in the embedding and the LM head."""
    ends = _ends(facts)
    vocabulary = vocabulary_rows(facts, rows)
    if rows <= vocabulary:
        return facts
    grown = {
        name: (rows, *facts.parameter_shapes[name][1:])
        for name in ends
        if facts.parameter_shapes[name][0] == vocabulary
    }
    return replace(facts, parameter_shapes=facts.parameter_shapes | grown)


def vocabulary_rows(facts: ModelFacts, default: int) -> int:
    """Return the rows of a model's embedding, or the default if its files do not name it."""
    return max((facts.parameter_shapes[name][0] for name in _ends(facts)), default=default)


def embedding_tensor(facts: ModelFacts) -> str:
    """Return the name of the token embedding's weight, as the model's files or else its architecture name it."""
    names = [*facts.tensors, *facts.parameter_shapes]
    return next((name for name in names if _is_token_embedding(name)), "the token embedding")


def _ends(facts: ModelFacts) -> list[str]:
    return [name for name in facts.parameter_shapes if _is_token_embedding(name) or is_head(name)]


def _is_token_embedding(name: str) -> bool:
    return is_embedding(name) and not _POSITIONS.search(name)


def rows_needed(indices: Sequence[int] | Mapping[str, Sequence[int]] | None) -> int:
    """Return the rows that an embedding needs for an adapter's `trainable_token_indices`."""
    lists = indices.values() if isinstance(indices, Mapping) else [indices or []]
    return max((max(each) + 1 for each in lists if each), default=0)


def grow_vocabulary(model: Any, rows: int) -> None:
    """Give the embedding and the LM head at least this many rows; rows that are added are 0. Random states are unchanged."""
    import torch

    weight = model.get_input_embeddings().weight
    before = getattr(weight, "ds_shape", weight.shape)[0]
    if rows <= before:
        return
    with torch.random.fork_rng([weight.device] if weight.device.type == "cuda" else []):
        model.resize_token_embeddings(rows, mean_resizing=False)
    with _whole(model) as weights, torch.no_grad():
        for each in weights:
            each[before:] = 0


def start_rows(model: Any, new: NewTokens) -> None:
    """Add rows for new tokens to a model. Each starts as the mean of the rows that the token's text had before.

    The result depends on the model's weights only: it is the same on every rank and after a resume.
    """
    import torch

    grow_vocabulary(model, new.rows)
    with _whole(model) as weights, torch.no_grad():
        for weight in weights:
            for token, parts in zip(new.ids, new.parts, strict=True):
                weight[token] = weight[list(parts)].float().mean(0).to(weight.dtype)


@contextmanager
def _whole(model: Any) -> "Iterator[list[torch.nn.Parameter]]":
    """Yield the weights of embedding and LM head; under ZeRO-3 gathered, and changed on all ranks as on rank 0."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = list({id(end.weight): end.weight for end in ends if end is not None}.values())
    sharded = [weight for weight in weights if hasattr(weight, "ds_id")]
    if not sharded:
        yield weights
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0):
        yield weights
