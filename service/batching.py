"""Continuous batching: rows join and leave a batch between two tokens, each with its own length, settings and adapter."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch.nn.functional import linear
from transformers import Cache, DynamicCache, TemperatureLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import DynamicLayer

from service.answers import Answer, Sampled
from service.engine import Delta, Failed, Sampling
from training.models.adapter import base_of
from training.models.attention import rope_limit

BASE = "__base__"
"""The adapter of rows without one."""

_ROOM = 128
"""Tokens by which the cache grows at a time."""
_JOINING_TOKENS = 512
"""Most tokens of prompts, padding included, that are computed between two steps; a longer prompt joins alone."""
_BATCHED_LAYERS = {"full_attention", "sliding_attention"}


class _GrowingLayer(DynamicLayer):
    """Keys and values in buffers with spare capacity, because appending with `torch.cat` copies all of them for every token.

    Rows end at the same position: shorter ones are padded with zeros on the left, which the attention mask excludes.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the states of new tokens; return all of them, (rows, heads, tokens, head size)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [key_states.new_empty(0), value_states.new_empty(0)]
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        if begin == 0 or end > self._buffers[0].shape[-2]:
            self._buffers = [
                _padded(old if begin else new[:, :, :0], 0, _ROOM + new.shape[-2])
                for old, new in ((self.keys, key_states), (self.values, value_states))
            ]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, begin:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def replace(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply a change of rows or padding to keys and values."""
        self._buffers = [
            _padded(change(part), 0, _ROOM) for part in (self.keys, self.values) if part is not None
        ]
        end = self._buffers[0].shape[-2] - _ROOM
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)


def _padded(states: Any, left: int, right: int) -> torch.Tensor:
    return torch.nn.functional.pad(states, (0, 0, left, right))


@dataclass
class Adapters:
    """The adapters of the rows that a model computes, for `apply_adapters_by_row`."""

    groups: list[tuple[str, torch.Tensor | None]] = field(default_factory=list)
    """PEFT's names of adapters, and the indices of the rows that use each; None: all rows."""
    shape: tuple[int, int] = (0, 0)
    """(rows, tokens of each)."""

    def assign(self, names: Sequence[str], tokens: int, device: torch.device) -> None:
        """Set the adapter of each row."""
        self.shape = (len(names), tokens)
        self.groups = []
        for name in dict.fromkeys(names):
            rows = [row for row, other in enumerate(names) if other == name]
            if name != BASE:
                is_shared = len(rows) < len(names)
                self.groups.append((name, torch.tensor(rows, device=device) if is_shared else None))


@dataclass(eq=False)
class Row:
    """One choice of a request in a batch."""

    answer: Answer
    sampling: Sampling
    adapter: str
    """PEFT's name of its adapter, or BASE."""
    end: int
    """Longest possible length in tokens, prompt included."""
    emit: Callable[[Delta | Failed], None]
    length: int = 0
    """Tokens in the cache."""
    tokens: list[int] = field(default_factory=list, repr=False)
    """Prompt and answer, the next input token included."""
    generator: torch.Generator | None = field(default=None, repr=False)
    is_cancelled: bool = False


@dataclass(eq=False)
class Request:
    """A prompt and its choices."""

    prompt: list[int]
    rows: list[Row]
    on_error: Callable[[BaseException], None]
    is_cancelled: bool = False


class Batch:
    """The rows that one model steps together, with their KV cache."""

    def __init__(self, model: Any, *, max_rows: int, max_tokens: int):
        """Start an empty batch.

        Args:
            model: The model, in evaluation mode.
            max_rows: Most rows at a time. Models with layers other than attention over a KV cache get one row.
            max_tokens: Most cached tokens, padding included.
        """
        self.adapters = Adapters()
        self.rows: list[Row] = []
        self.model = model
        config = model.config.get_text_config()
        self._rope_limit = rope_limit(model.config)
        self._is_batched = set(getattr(config, "layer_types", None) or _BATCHED_LAYERS) <= _BATCHED_LAYERS
        self.max_rows = max_rows if self._is_batched else 1
        self.max_tokens = max_tokens
        self._cache = self._new_cache()
        accepted = signature(base_of(model).forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def fits(self, rows: Sequence[Row], joining: Sequence[Row]) -> bool:
        """Return whether the rows of a request may join now, after others that join.

        A request that may exceed the RoPE limit runs alone: it would change the frequencies of the other rows.
        """
        before = [*self.rows, *joining]
        everyone = [*before, *rows]
        longest = max(row.end for row in everyone)
        fits = len(everyone) * longest <= self.max_tokens
        keeps_rope = self._rope_limit is None or longest <= self._rope_limit
        return not before or (len(everyone) <= self.max_rows and fits and keeps_rope)

    def take(self, waiting: deque[Request]) -> list[Request]:
        """Remove and return the requests that may join now, in their order."""
        taken: list[Request] = []
        while waiting:
            longest = max(len(request.prompt) for request in (*taken, waiting[0]))
            joining = [row for request in taken for row in request.rows]
            if taken and (len(taken) + 1) * longest > _JOINING_TOKENS:
                break
            if not self.fits(waiting[0].rows, joining):
                break
            taken.append(waiting.popleft())
        return taken

    @torch.inference_mode()
    def join(self, requests: Sequence[Request]) -> None:
        """Compute the prompts of requests, add their rows to the batch and emit their first tokens."""
        self._join([request.prompt for request in requests], [request.rows for request in requests])

    def _join(self, prompts: Sequence[list[int]], rows_by_prompt: Sequence[list[Row]]) -> None:
        cache, device = self._new_cache(), self.model.device
        longest = max(map(len, prompts))
        padded = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
        lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
        positions = torch.arange(longest, device=device)[None] - (longest - lengths)
        is_padded = any(len(prompt) < longest for prompt in prompts)
        mask = (positions >= 0).long() if is_padded else None
        self.adapters.assign([rows[0].adapter for rows in rows_by_prompt], longest, device)
        logits = self._forward(torch.tensor(padded, device=device), mask, positions.clamp(min=0), cache)
        for prompt, rows in zip(prompts, rows_by_prompt, strict=True):
            for row in rows:
                row.length, row.tokens = len(prompt), list(prompt)
        counts = torch.tensor([len(rows) for rows in rows_by_prompt], device=device)
        if not self._is_batched:
            self._cache = cache
        else:
            self._merge(cache, counts)
        rows = [row for group in rows_by_prompt for row in group]
        self.rows += rows
        self._push(rows, logits.repeat_interleave(counts, 0))

    @torch.inference_mode()
    def step(self) -> None:
        """Generate one token for every row."""
        if self._width() == self._rope_limit:
            self._rejoin()
            return
        device = self.model.device
        self.adapters.assign([row.adapter for row in self.rows], 1, device)
        tokens = torch.tensor([[row.tokens[-1]] for row in self.rows], device=device)
        lengths = torch.tensor([[row.length] for row in self.rows], device=device)
        width = self._width() + 1
        mask = None
        if any(row.length + 1 != width for row in self.rows):
            mask = (torch.arange(width, device=device)[None] >= width - 1 - lengths).long()
        logits = self._forward(tokens, mask, lengths, self._cache)
        for row in self.rows:
            row.length += 1
        self._push(self.rows, logits)

    def _rejoin(self) -> None:
        """Generate a token for every row without the cache, whose keys have the frequencies of shorter sequences.

        Phi 3 does the same in `generate`. All rows belong to one request and have the same length.
        """
        rows = self.rows
        self.clear()
        for row in rows:  # one after the other, because a prompt needs more memory than its keys
            self._join([row.tokens], [[row]])

    def remove_finished(self) -> None:
        """Remove rows whose answer is finished or whose request was cancelled."""
        kept = [index for index, row in enumerate(self.rows) if not _is_over(row)]
        if len(kept) == len(self.rows):
            return
        if not kept:
            self.clear()
            return
        before = self._width()
        self.rows = [self.rows[index] for index in kept]
        cut = before - self._width()
        index = torch.tensor(kept, device=self.model.device)
        for layer in self._cache.layers:
            layer.replace(lambda states: states[:, :, cut:].index_select(0, index))  # type: ignore[attr-defined]

    def clear(self) -> None:
        """Remove all rows."""
        self.rows = []
        self._cache = self._new_cache()

    def _width(self) -> int:
        return max((row.length for row in self.rows), default=0)

    def _new_cache(self) -> Cache:
        if self._is_batched:
            return Cache(layer_class_to_replicate=_GrowingLayer)
        return DynamicCache(config=self.model.config)

    def _merge(self, new: Cache, counts: torch.Tensor) -> None:
        """Append cached prompts, each as often as its count says, and pad the shorter side on the left."""
        width, added = self._width(), new.get_seq_length()
        if not self.rows:
            self._cache = new
            for layer in new.layers:
                layer.replace(lambda states: states.repeat_interleave(counts, 0))  # type: ignore[attr-defined]
            return
        longest = max(width, added)
        for layer, other in zip(self._cache.layers, new.layers, strict=True):
            parts = iter((other.keys, other.values))  # pyright: ignore[reportAttributeAccessIssue]

            def joined(states: torch.Tensor, parts: Any = parts) -> torch.Tensor:
                own = _padded(states, longest - width, 0)
                others = _padded(next(parts), longest - added, 0)
                return torch.cat([own, others.repeat_interleave(counts, 0)])

            layer.replace(joined)  # type: ignore[attr-defined]

    def _forward(self, tokens: Any, mask: Any, positions: Any, cache: Cache) -> torch.Tensor:
        """Return the logits after the last token of each row, (rows, vocabulary)."""
        options = self._options | ({"position_ids": positions} if self._takes_positions else {})
        output = self.model(
            input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True, **options
        )
        return output.logits[:, -1]

    def _push(self, rows: Sequence[Row], logits: torch.Tensor) -> None:
        largest, likeliest = logits.max(-1)
        # A maximum is NaN or infinite if no token can be drawn: that row fails alone, since its neighbours are other requests.
        drawable = largest.isfinite().tolist()
        for row, scores, best, is_drawable in zip(rows, logits, likeliest.tolist(), drawable, strict=True):
            if not is_drawable:
                row.is_cancelled = True
                row.emit(Failed(500, "The model computed logits that are not finite.", "server_error"))
                continue
            sampled = _sample(row, scores, best)
            row.tokens.append(sampled.token)
            if (delta := row.answer.push(sampled)) is not None:
                row.emit(delta)


def _is_over(row: Row) -> bool:
    return row.is_cancelled or row.answer.is_finished


def _sample(row: Row, logits: torch.Tensor, likeliest: int) -> Sampled:
    """Choose the next token of a row by its own settings and random numbers.

    Args:
        row: The row.
        logits: Its logits, (vocabulary,).
        likeliest: Index of the largest logit.
    """
    settings, token = row.sampling, likeliest
    if not settings.is_greedy:
        scores = TemperatureLogitsWarper(settings.temperature)(None, logits[None].float())  # pyright: ignore
        if settings.top_p < 1:
            scores = TopPLogitsWarper(settings.top_p)(None, scores)  # pyright: ignore
        drawn = torch.multinomial(scores.softmax(-1), 1, generator=row.generator)
        token = int(drawn)
    if settings.top_logprobs is None:
        return Sampled(token)
    logprobs = logits.float().log_softmax(-1)
    top = logprobs.topk(settings.top_logprobs)
    return Sampled(
        token,
        float(logprobs[token]),
        tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
    )


def generator_of(sampling: Sampling, choice: int, device: torch.device) -> torch.Generator | None:
    """Return the random numbers of one choice: determined by `seed` alone, whatever else is in the batch."""
    if sampling.is_greedy:
        return None
    generator = torch.Generator(device=device)
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed((sampling.seed + choice) % 2**63)
    return generator


def apply_adapters_by_row(model: Any, adapters: Adapters) -> None:
    """Make the LoRA layers of a PEFT model compute the adapter of each row. Call this again after an adapter was added.

    PEFT's argument `adapter_names` does the same, with a hook for every layer in every step.

    Args:
        model: The model that PEFT has changed; its adapters have plain LoRA matrices.
        adapters: Which rows use which adapter; changed before each step.
    """
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer) and "forward" not in vars(module):
            module.forward = partial(_forward_by_row, module, adapters)  # pyright: ignore


def _forward_by_row(layer: Any, adapters: Adapters, inputs: torch.Tensor) -> torch.Tensor:
    """Return `base(x) + scaling * B(A(x))`, with the matrices of each row's adapter (Hu et al. 2021, arXiv 2106.09685, eq. 3)."""
    result = layer.base_layer(inputs)
    for name, rows in adapters.groups:
        if name not in layer.lora_A:
            continue
        first, second = layer.lora_A[name].weight, layer.lora_B[name].weight
        part = inputs if rows is None else _by_row(inputs, adapters)[rows]
        change = linear(linear(part.to(first.dtype), first), second) * layer.scaling[name]
        if rows is None:
            result = result + change.to(result.dtype)
        else:
            _by_row(result, adapters).index_add_(0, rows, change.to(result.dtype))
    return result


def _by_row(states: torch.Tensor, adapters: Adapters) -> torch.Tensor:
    """Return a view of shape (rows, tokens, size): the experts that all tokens share get the tokens of all rows in one dimension."""
    return states if states.dim() > 2 else states.unflatten(0, adapters.shape)


def cache_bytes_per_token(model: Any) -> int:
    """Return the bytes of keys and values of one token: `2 * layers * KV heads * head size * bytes per number`."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize
