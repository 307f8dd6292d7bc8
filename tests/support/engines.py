"""The engine of a tiny model in this process, behind the interface of a Ray Serve handle, with plain transformers to compare with."""

import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.loading import ConfigError
from configs.schema import FinetuneConfig
from runs.layout import checkpoint_uri
from service.chat import chat_router
from service.engine import ChatRequest, Delta, Engine, EngineSettings, Event, Failed, Sampling
from service.errors import ApiError, error_body
from service.models import ServedModel
from service.transformers_engine import TransformersEngine
from service.vllm_engine import vllm_python
from tests.support.trained_runs import STEP, store_adapter_run, store_full_run
from utils.storage.bucket import open_store


def _has_vllm() -> bool:
    try:
        vllm_python()
    except ConfigError:
        return False
    return True


needs_vllm = pytest.mark.skipif(not _has_vllm(), reason="vLLM is not installed: make setup-vllm")

BASE = "tiny"


def start_engine(model: Path, *, max_adapters: int = 4) -> TransformersEngine:
    """Start the engine of a model; the caller closes it."""
    config = FinetuneConfig(model_id=str(model), train_path="rows.jsonl", dtype="fp32", device="cpu")
    return TransformersEngine(EngineSettings(BASE, str(model), config, max_adapters, threads=1))


def store_adapter(directory: Path, name: str, model: Path, **lora: Any) -> str:
    """Store an adapter with random weights; return its checkpoint's URI."""
    lora = {"r": 4, "target_modules": "all-linear"} | lora
    storage = open_store(str(directory))
    run = store_adapter_run(storage, name, model, lora, storage_path=str(directory))
    return checkpoint_uri(run, STEP)


def store_full(directory: Path, name: str, model: Path) -> str:
    """Store a full-parameter checkpoint; return its URI."""
    run = store_full_run(open_store(str(directory)), name, model, storage_path=str(directory))
    return checkpoint_uri(run, STEP)


def chat_request(checkpoint: str | None, question: str, **sampling: Any) -> ChatRequest:
    """Return a greedy request for at most 12 tokens, unless `sampling` overrides it."""
    settings = Sampling(**{"temperature": 0.0, "max_tokens": 12} | sampling)
    messages = [{"role": "user", "content": question}]
    return ChatRequest(ServedModel(checkpoint or BASE, BASE, checkpoint), messages, None, {}, settings)


async def answer(engine: Engine, request: ChatRequest) -> list[str]:
    """Return the texts of the choices."""
    texts = [""] * request.sampling.n
    async for event in engine.chat(request):
        assert not isinstance(event, Failed), event
        if isinstance(event, Delta):
            texts[event.choice] += event.text
    return texts


async def failure(engine: Engine, request: ChatRequest) -> Failed:
    """Return the error of a request that fails."""
    (event,) = [event async for event in engine.chat(request)]
    assert isinstance(event, Failed), event
    return event


class Reference:
    """A model in plain transformers and PEFT."""

    def __init__(self, model: Path, checkpoint: str | None = None, *, is_adapter: bool = True):
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        place = checkpoint if checkpoint and not is_adapter else model
        self.model: Any = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        if checkpoint and is_adapter:
            self.model = peft.PeftModel.from_pretrained(self.model, checkpoint)
        self.model.eval()
        self.model.config.use_cache = True

    def tokens(self, question: str) -> torch.Tensor:
        """Return the prompt's tokens, (1, tokens)."""
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        return torch.tensor([self.tokenizer.encode(text, add_special_tokens=False)])

    def answer(self, question: str, max_new_tokens: int = 12) -> str:
        """Return the greedy answer of `generate`."""
        tokens = self.tokens(question)
        generated = self.model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return str(self.tokenizer.decode(generated[0, tokens.shape[1] :], skip_special_tokens=True))


class LocalHandle:
    """An engine in this process, called as a Ray Serve handle is."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.cancelled = 0

    @property
    def chat(self) -> "LocalHandle":
        return self

    def options(self, *, stream: bool, multiplexed_model_id: str) -> "LocalHandle":
        assert stream
        return self

    def remote(self, request: ChatRequest) -> "_Response":
        return _Response(self, self.engine.chat(request))


class _Response:
    def __init__(self, handle: LocalHandle, events: AsyncGenerator[Event]):
        self._handle, self._events = handle, events

    def __aiter__(self) -> AsyncGenerator[Event]:
        return self._events

    def cancel(self) -> None:
        self._handle.cancelled += 1


def chat_app(handle: Any, checkpoints: Sequence[str] = ()) -> FastAPI:
    """Return an application with the chat route. Models: BASE, and `tuned-0`, `tuned-1`, ... for the checkpoints."""
    models = {BASE: ServedModel(BASE, BASE, None)} | {
        f"tuned-{number}": ServedModel(f"tuned-{number}", BASE, uri) for number, uri in enumerate(checkpoints)
    }

    def resolve(name: str, request: Request) -> ServedModel:
        if name not in models:
            raise ApiError(status=404, message=f"no model {name}", param="model", code="model_not_found")
        return models[name]

    async def show(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return JSONResponse(error_body(error), error.status, error.headers)

    app = FastAPI()
    app.include_router(chat_router(resolve, {BASE: handle}))
    app.add_exception_handler(ApiError, show)
    return app


@contextmanager
def serving(app: FastAPI) -> Iterator[httpx.Client]:
    """Run an application in a real HTTP server; yield a client for it."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive(), "the server did not start"
    (port,) = [socket.getsockname()[1] for own in server.servers for socket in own.sockets]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()
