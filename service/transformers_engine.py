"""The transformers engine: one base model in memory, adapters loaded on demand, and continuous batching across all of them."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import peft
import psutil
import torch

from service.answers import Answer
from service.batching import (
    BASE,
    Batch,
    Request,
    Row,
    apply_adapters_by_row,
    cache_bytes_per_token,
    generator_of,
)
from service.checkpoints import (
    Checkpoint,
    CheckpointCache,
    base_checkpoint,
    failed_event,
    mixes_with_others,
)
from service.engine import Accepted, ChatRequest, Delta, EngineSettings, Event, Failed
from service.errors import ApiError
from service.least_recently_used import LeastRecentlyUsed
from training.data.prompting import stop_tokens
from training.models.kernels import Device, device_here
from training.models.torch_provider import load_weights

MAX_ROWS = 64
"""Maximum number of choices that one model generates at a time."""
_DEFAULT_MAX_TOKENS = 4096
"""Longest answer of a request without max_tokens, because its memory is reserved when it joins a batch."""
_OWN_MODELS = 1
"""Complete models in memory beside the base: full-parameter checkpoints, and adapters that cannot share a batch."""
_CACHE_SHARE = 0.4
"""Share of the free memory, after the base model was loaded, for its KV cache."""

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Model:
    """A model that the engine steps."""

    batch: Batch
    stop_tokens: frozenset[int]
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)


@dataclass(frozen=True)
class _Loaded:
    """A checkpoint in memory: its model, and its adapter's name in it."""

    model: _Model
    adapter: str


class TransformersEngine:
    """One base model and the checkpoints that were trained from it.

    Adapters with plain LoRA matrices share batches with each other and with the base. Every other checkpoint is loaded as a
    model of its own. One thread runs all models, so the models' states need no locks.
    """

    def __init__(self, settings: EngineSettings):
        """Load the base model on the first GPU if there is one, else on the CPU."""
        self._device: Device = device_here()
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        elif self._device == "cpu":
            torch.set_num_threads(psutil.cpu_count(logical=False) or 1)
        self._settings = settings
        self._base = base_checkpoint(settings)
        model = load_weights(
            self._base.directory,
            dtype=settings.config.dtype,
            device=self._device,
            load_in_4bit=settings.config.load_in_4bit,
            trust_remote_code=settings.config.trust_remote_code,
        )
        self._shared = self._model(model.eval(), self._base)
        self._models = [self._shared]
        self._adapted: Any = None
        """The shared model as PEFT's PeftModel, once an adapter was loaded."""
        self._names = count(1)
        self._adapters = LeastRecentlyUsed[_Loaded](
            settings.max_adapters, self._load_adapter, self._unload_adapter
        )
        self._own_models = LeastRecentlyUsed[_Loaded](_OWN_MODELS, self._load_model, self._unload_model)
        self._checkpoints = CheckpointCache(settings)
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # --- Requests ---

    async def chat(self, request: ChatRequest) -> AsyncGenerator[Event]:
        """Answer a request; see `Engine.chat`."""
        try:
            uri = request.model.checkpoint
            checkpoint = self._base if uri is None else await self._checkpoints.get(uri)
            prompt = await asyncio.to_thread(checkpoint.format.encode, request)
            async with aclosing(self._generate(request, checkpoint, prompt)) as events:
                async for event in events:
                    yield event
        except Exception as error:  # noqa: BLE001
            yield failed_event(error)

    async def _generate(
        self, request: ChatRequest, checkpoint: Checkpoint, prompt: list[int]
    ) -> AsyncGenerator[Event]:
        if checkpoint.uri is None:
            async for event in self._stream(request, checkpoint, prompt, _Loaded(self._shared, BASE)):
                yield event
            return
        pool = self._adapters if mixes_with_others(checkpoint, self._settings) else self._own_models
        async with pool.use(checkpoint.uri) as loaded:
            async for event in self._stream(request, checkpoint, prompt, loaded):
                yield event

    async def _stream(
        self, request: ChatRequest, checkpoint: Checkpoint, prompt: list[int], loaded: _Loaded
    ) -> AsyncGenerator[Event]:
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def emit(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed, so no caller waits for the event
                loop.call_soon_threadsafe(events.put_nowait, event)

        rows = self._rows(request, checkpoint, len(prompt), loaded, emit)
        asked = Request(prompt, rows, on_error=lambda error: emit(failed_event(error)))
        self._submit(loaded.model, asked)
        try:
            yield Accepted(len(prompt))
            unfinished = len(rows)
            while unfinished:
                event = await events.get()
                yield event
                if isinstance(event, Failed):
                    return
                unfinished -= isinstance(event, Delta) and event.finish_reason is not None
        finally:
            asked.is_cancelled = True
            for row in rows:
                row.is_cancelled = True

    def _rows(
        self,
        request: ChatRequest,
        checkpoint: Checkpoint,
        prompt_tokens: int,
        loaded: _Loaded,
        emit: Callable[[Event], None],
    ) -> list[Row]:
        """Return one row per choice; raise ApiError if they do not fit into memory together."""
        sampling, batch = request.sampling, loaded.model.batch
        most_tokens = min(checkpoint.format.context, batch.max_tokens // sampling.n)
        wanted = sampling.max_tokens or min(_DEFAULT_MAX_TOKENS, most_tokens - prompt_tokens)
        end = prompt_tokens + wanted
        if wanted < 1 or end > most_tokens or sampling.n > batch.max_rows:
            raise ApiError(
                status=400,
                message=f"n: this model generates at most {batch.max_rows} choices with {batch.max_tokens} tokens in all at a "
                f"time; you requested {sampling.n} with {end} tokens each. Reduce `n` or `max_tokens`.",
                param="n",
            )
        return [
            Row(
                Answer(
                    choice,
                    checkpoint.format,
                    sampling,
                    stop_tokens=loaded.model.stop_tokens,
                    max_tokens=wanted,
                    may_call=bool(request.tools),
                ),
                sampling,
                loaded.adapter,
                end,
                emit,
                generator=generator_of(sampling, choice, torch.device(self._device)),
            )
            for choice in range(sampling.n)
        ]

    # --- Models ---

    def _model(self, model: Any, checkpoint: Checkpoint) -> _Model:
        free = torch.cuda.mem_get_info()[0] if self._device == "cuda" else psutil.virtual_memory().available
        tokens = int(free * _CACHE_SHARE) // cache_bytes_per_token(model)
        batch = Batch(model, max_rows=MAX_ROWS, max_tokens=tokens)
        return _Model(batch, frozenset(stop_tokens(model.generation_config, checkpoint.format.tokenizer)))

    async def _load_adapter(self, uri: str) -> _Loaded:
        """Add an adapter to the shared model, between two steps."""
        checkpoint = await self._checkpoints.get(uri)
        name = f"adapter_{next(self._names)}"

        def attach() -> None:
            batch = self._shared.batch
            # PEFT adds its layers to the base model itself, which the batch keeps calling. Its low_cpu_mem_usage would replace a method
            # of torch.nn.Module in all threads, and break a model that another thread is loading (0.21.2).
            if self._adapted is None:
                self._adapted = peft.PeftModel.from_pretrained(batch.model, checkpoint.directory, name)
            else:
                self._adapted.load_adapter(str(checkpoint.directory), name)
            batch.model.eval()
            apply_adapters_by_row(batch.model, batch.adapters)

        await self._between_steps(attach)
        return _Loaded(self._shared, name)

    async def _unload_adapter(self, loaded: _Loaded) -> None:
        assert self._adapted is not None
        adapted = self._adapted
        await self._between_steps(lambda: adapted.delete_adapter(loaded.adapter))

    async def _load_model(self, uri: str) -> _Loaded:
        """Load a checkpoint with its own copy of the base model."""
        checkpoint = await self._checkpoints.get(uri)
        trained = checkpoint.trained
        assert trained is not None
        model = await asyncio.to_thread(lambda: self._model(trained.load(self._device), checkpoint))
        await self._between_steps(lambda: self._models.append(model))
        return _Loaded(model, BASE)

    async def _unload_model(self, loaded: _Loaded) -> None:
        await self._between_steps(lambda: self._models.remove(loaded.model))

    # --- The thread that runs the models ---

    def check_health(self) -> None:
        """Raise an error if the thread died, so that Ray Serve replaces the replica."""
        if not self._thread.is_alive():
            raise RuntimeError("the engine's thread died")

    def close(self) -> None:
        """Stop the thread; unanswered requests get no further events."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    async def _between_steps(self, call: Callable[[], Any]) -> None:
        done: Future[Any] = Future()
        with self._changed:
            self._calls.append((call, done))
            self._changed.notify()
        await asyncio.wrap_future(done)

    def _submit(self, model: _Model, request: Request) -> None:
        with self._changed:
            model.waiting.append(request)
            self._changed.notify()

    def _run(self) -> None:
        while self._wait_for_work():
            self._remove_finished()
            self._run_calls()
            for model in self._models:
                _advance(model)

    def _remove_finished(self) -> None:
        with self._changed:
            for model in self._models:
                model.batch.remove_finished()
                model.running = [
                    each for each in model.running if any(row in model.batch.rows for row in each.rows)
                ]
                model.waiting = deque(each for each in model.waiting if not each.is_cancelled)

    def _wait_for_work(self) -> bool:
        """Wait for a request or a call; return False once the engine is closed."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_closed or self._calls or any(m.waiting or m.running for m in self._models)
            )
            return not self._is_closed

    def _run_calls(self) -> None:
        while self._calls:
            call, done = self._calls.popleft()
            if not done.set_running_or_notify_cancel():
                continue
            self._remove_finished()  # an adapter leaves after the rows that used it
            try:
                done.set_result(call())
            except Exception as error:  # noqa: BLE001
                done.set_exception(error)


def _advance(model: _Model) -> None:
    """Let waiting requests join, and generate one token for every row of a model."""
    batch = model.batch
    try:
        if joining := batch.take(model.waiting):
            model.running += joining
            batch.join(joining)
            batch.remove_finished()
        if batch.rows:
            batch.step()
    except Exception as error:  # noqa: BLE001
        _log.exception("a batch of %d requests failed", len(model.running))
        for request in model.running:
            request.on_error(error)
        model.running.clear()
        batch.clear()
