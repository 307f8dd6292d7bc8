"""The vLLM engine: vLLM's server as a child process, which gets prompts as tokens and returns tokens.

vLLM has an environment of its own, because its pins differ from those of training. Rendering, stop texts and tool calls are
those of the transformers engine, so that both engines ask a model in the same way.
"""

import asyncio
import hashlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

from configs.loading import ConfigError
from configs.schema import FinetuneConfig
from service.answers import Answer, Sampled
from service.checkpoints import (
    Checkpoint,
    CheckpointCache,
    base_checkpoint,
    failed_event,
    mixes_with_others,
)
from service.engine import Accepted, ChatRequest, EngineSettings, Event
from service.errors import ApiError
from service.least_recently_used import LeastRecentlyUsed
from training.checkpoints.store import read_manifest
from training.data.prompting import stop_tokens
from training.inference.vllm_environment import (
    LARGEST_RANK,
    PYTHON_VARIABLE,
    max_lora_rank,
    python_of_vllm,
    variables_of_vllm,
)
from training.planning.exportable import check_vllm_adapter
from training.planning.paths import make_scratch_directory
from utils.errors import AnnealError
from utils.processes import die_with

_PROJECT = Path(__file__).resolve().parents[1]
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_CACHE_GIGABYTES = 2
_RANK_WITHOUT_LORA = 16  # the base YAML sets no ranks, jobs do
_START_SECONDS = 1800
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def vllm_python() -> Path:
    """Return the Python of vLLM's environment; raise ConfigError if it does not exist."""
    python = python_of_vllm()
    if not python.exists():
        # Ray unpacks the code on other nodes without an environment beside it.
        is_packaged = not (_PROJECT / "Makefile").exists()
        fix = f"set {PYTHON_VARIABLE} to the Python of a vLLM environment on every node"
        fix = fix if is_packaged else f"run `make setup-vllm` on every node, or {fix}"
        raise ConfigError(f"engine: vllm: {python} does not exist: {fix}.")
    return python


class VllmEngine:
    """One base model in a vLLM server, and the adapters that were trained from it."""

    def __init__(self, settings: EngineSettings):
        """Start the server and wait until it answers."""
        python = vllm_python()
        settings = replace(settings, has_fixed_rope=True)
        self._settings = settings
        self._base = base_checkpoint(settings)
        self._checkpoints = CheckpointCache(settings)
        self._adapters = LeastRecentlyUsed[str](
            settings.max_adapters, self._load_adapter, self._unload_adapter
        )
        self._stop_tokens = frozenset(_stop_tokens(self._base))
        self._scratch = make_scratch_directory(settings.config)
        key, port = secrets.token_urlsafe(32), _free_port()
        self._log = self._scratch / "logs" / f"vllm-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._server = self._start(python, key, port)
        self._client = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}",
            headers={"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(None, connect=10),
            limits=httpx.Limits(max_connections=None),
        )
        self._wait_until_ready(port)

    def _start(self, python: Path, key: str, port: int) -> subprocess.Popen[bytes]:
        settings = self._settings
        arguments = {
            "--model": self._base.directory,
            "--served-model-name": settings.base,
            "--host": "127.0.0.1",
            "--port": port,
            "--dtype": _DTYPES[settings.config.dtype],
            "--max-model-len": self._base.format.context,
            "--max-lora-rank": _max_rank(settings.config),
            # On CPU a row without an adapter uses the last slot: with no slot more than adapters, it gets an adapter's answer.
            "--max-loras": settings.max_adapters + 1,
            "--max-cpu-loras": settings.max_adapters + 1,
            # Sampling settings in the model's generation_config.json would apply to requests that do not name them.
            "--generation-config": "vllm",
        }
        environment = variables_of_vllm(_CACHE_GIGABYTES) | {
            "VLLM_API_KEY": key,  # not an argument, which `ps` shows
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        }
        flags = ["--enable-lora", "--enforce-eager"]
        words = [str(word) for pair in arguments.items() for word in pair]
        with self._log.open("wb") as log:
            return subprocess.Popen(
                [str(python), "-m", "vllm.entrypoints.openai.api_server", *words, *flags],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with(os.getpid()),
            )

    def _wait_until_ready(self, port: int) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            self.check_health()
            with suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=10).is_success:
                    return
            time.sleep(0.5)
        self.close()
        raise ConfigError(
            f"engine: vllm: the server did not start within {_START_SECONDS} s. See {self._log}."
        )

    def check_health(self) -> None:
        """Raise an error if the server exited, so that Ray Serve replaces the replica."""
        if self._server.poll() is not None:
            raise ConfigError(
                f"engine: vllm: the server exited with code {self._server.returncode}. See {self._log}."
            )

    def close(self) -> None:
        """Stop the server."""
        self._server.terminate()
        self._server.wait()

    # --- Requests ---

    async def chat(self, request: ChatRequest) -> AsyncGenerator[Event]:
        """Answer a request; see `Engine.chat`."""
        try:
            uri = request.model.checkpoint
            checkpoint = self._base if uri is None else await self._checkpoints.get(uri)
            prompt = await asyncio.to_thread(checkpoint.format.encode, request)
            async with aclosing(self._answer(request, checkpoint, prompt)) as events:
                async for event in events:
                    yield event
        except httpx.HTTPError as error:
            yield failed_event(
                ApiError(
                    status=503,
                    message=f"The engine of this model does not answer ({type(error).__name__}). Retry the request.",
                    type="server_error",
                )
            )
        except Exception as error:  # noqa: BLE001
            yield failed_event(error)

    async def _answer(
        self, request: ChatRequest, checkpoint: Checkpoint, prompt: list[int]
    ) -> AsyncGenerator[Event]:
        if checkpoint.uri is None:
            async for event in self._generate(request, checkpoint, prompt, self._settings.base):
                yield event
            return
        self._check_supported(checkpoint)
        async with self._adapters.use(checkpoint.uri) as name:
            async for event in self._generate(request, checkpoint, prompt, name):
                yield event

    async def _generate(
        self, request: ChatRequest, checkpoint: Checkpoint, prompt: list[int], name: str
    ) -> AsyncGenerator[Event]:
        sampling = request.sampling
        max_tokens = sampling.max_tokens or checkpoint.format.context - len(prompt)
        answers = [
            Answer(
                choice,
                checkpoint.format,
                sampling,
                stop_tokens=self._stop_tokens,
                max_tokens=max_tokens,
                may_call=bool(request.tools),
            )
            for choice in range(sampling.n)
        ]
        body = {
            "model": name,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "n": 1
            if sampling.is_greedy
            else sampling.n,  # vLLM rejects several greedy choices, which are the same
            "logprobs": sampling.top_logprobs,
            "stop_token_ids": sorted(self._stop_tokens),
            "stream": True,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        async with self._client.stream("POST", "/v1/completions", json=body) as response:
            if response.is_error:
                raise _rejected(await response.aread())
            is_accepted = False
            async for choice in _choices(response):
                # vLLM finds some mistakes only after it has begun its stream; before `Accepted`, they keep their status.
                if not is_accepted:
                    yield Accepted(len(prompt))
                    is_accepted = True
                for answer in answers if sampling.is_greedy else [answers[choice["index"]]]:
                    for sampled in self._sampled(choice, answer, sampling.top_logprobs):
                        if (delta := answer.push(sampled)) is not None:
                            yield delta
                if all(answer.is_finished for answer in answers):
                    return  # a stop text ended it: closing the connection frees its place
            raise ApiError(
                status=500,
                message="vLLM ended the answer before it was complete. Retry the request.",
                type="server_error",
            )

    def _sampled(self, choice: dict[str, Any], answer: Answer, top_logprobs: int | None) -> Iterator[Sampled]:
        """Yield the tokens of a chunk; vLLM may omit the stop token that ended the answer."""
        tokens = choice.get("token_ids") or []
        logprobs = choice.get("logprobs")
        for place, token in enumerate(tokens):
            if answer.is_finished:
                return
            if logprobs is None or token in self._stop_tokens:
                yield Sampled(token)
                continue
            top = [
                (int(written.removeprefix("token_id:")), value)
                for written, value in (logprobs["top_logprobs"][place] or {}).items()
            ]
            top.sort(key=lambda entry: -entry[1])  # vLLM adds the chosen token
            yield Sampled(token, logprobs["token_logprobs"][place], tuple(top[:top_logprobs]))
        if choice.get("finish_reason") == "stop" and not answer.is_finished:
            yield Sampled(min(self._stop_tokens))

    def _check_supported(self, checkpoint: Checkpoint) -> None:
        """Reject checkpoints that vLLM does not load, or for which it would skip weights without an error."""
        reason = None
        adapter = checkpoint.adapter
        if adapter is None:
            reason = "it is a complete model"
        elif not mixes_with_others(checkpoint, self._settings):
            reason = "it has more than plain LoRA matrices for this base model"
        elif adapter.largest_rank > _max_rank(self._settings.config):
            reason = f"its rank {adapter.largest_rank} is above {_max_rank(self._settings.config)}"
        else:
            try:
                check_vllm_adapter(adapter.lora, adapter.parameter_shapes)
            except AnnealError as error:
                reason = str(error).rstrip(".")
        if reason:
            raise ApiError(
                status=400,
                message=f"The vLLM engine cannot serve this checkpoint: {reason}. Serve it with `engine: transformers`, or "
                "export it merged.",
                param="model",
                code="unsupported_model",
            )

    # --- Adapters ---

    async def _load_adapter(self, uri: str) -> str:
        checkpoint = await self._checkpoints.get(uri)
        name = _version(uri)
        # vLLM reuses cached keys and values of an adapter's earlier version under the same name and path.
        directory = self._scratch / "vllm-adapters" / name
        directory.mkdir(parents=True, exist_ok=True)
        for file in _ADAPTER_FILES:
            shutil.copyfile(checkpoint.directory / file, directory / file)
        await self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(directory)})
        return name

    async def _unload_adapter(self, name: str) -> None:
        await self._post("/v1/unload_lora_adapter", {"lora_name": name})
        await asyncio.to_thread(shutil.rmtree, self._scratch / "vllm-adapters" / name)

    async def _post(self, path: str, body: dict[str, str]) -> None:
        response = await self._client.post(path, json=body)
        if response.is_error:
            raise _rejected(response.content)


def _version(uri: str) -> str:
    """Return a name that no other checkpoint, and no other version of this one, has."""
    version = f"{uri} {read_manifest(uri).model_dump_json()}"
    return f"adapter-{hashlib.sha256(version.encode()).hexdigest()[:16]}-{secrets.token_hex(4)}"


async def _choices(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in _lines(response):
        if not line.startswith(b"data: ") or line == b"data: [DONE]":
            continue
        chunk = json.loads(line.removeprefix(b"data: "))
        if "error" in chunk:
            raise _rejected(json.dumps(chunk).encode())
        for choice in chunk["choices"]:
            yield choice


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """Yield lines; `aiter_lines` would also split a text at characters such as U+2028, which JSON does not escape."""
    rest = b""
    async for block in response.aiter_bytes():
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r")
    yield rest


def _rejected(content: bytes) -> ApiError:
    """Return the error for vLLM's answer: 400 if vLLM reports a mistake in the request, else 500."""
    try:
        error = json.loads(content)["error"]
        is_mistake, message = error["code"] == 400, str(error["message"])
    except (ValueError, KeyError, TypeError):
        is_mistake, message = False, content.decode(errors="replace")
    return ApiError(
        status=400 if is_mistake else 500,
        message=f"vLLM rejected the request: {message[:300]}",
        type="invalid_request_error" if is_mistake else "server_error",
    )


def _max_rank(config: FinetuneConfig) -> int:
    lora = config.lora_config
    wanted = max([lora.r, *(lora.rank_pattern or {}).values()]) if lora else _RANK_WITHOUT_LORA
    rank = max_lora_rank(wanted)
    if rank is None:
        raise ConfigError(
            f"engine: vllm: the largest rank of lora_config is {wanted}, but vLLM supports at most {LARGEST_RANK}. Use engine: transformers."
        )
    return rank


def _stop_tokens(base: Checkpoint) -> list[int]:
    from transformers import AutoConfig, GenerationConfig

    if (base.directory / "generation_config.json").exists():
        generation = GenerationConfig.from_pretrained(base.directory)
    else:
        generation = GenerationConfig.from_model_config(AutoConfig.from_pretrained(base.directory))
    return stop_tokens(generation, base.format.tokenizer)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
