"""POST /v1/chat/completions: requests and answers in OpenAI's format, complete or as server-sent events."""

import asyncio
import json
import logging
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from service.engine import Accepted, ChatRequest, Delta, Event, Failed, Sampling, TokenLogprob, ToolCall
from service.errors import ApiError, error_body, invalid
from service.models import ServedModel
from service.requests import check_value, read_body, reject_constant
from training.data.chat_template import SET_BY_RENDERING
from training.data.chats import read_question
from training.data.errors import RowError
from training.data.records import REASONING_KEYS, Chat
from training.data.tools import read_tools

T = TypeVar("T")

MAX_BODY_BYTES = 16_000_000
_MAX_LARGE_BODIES = 8
"""Bodies above 1 MB that a replica holds until they are validated; further ones wait. JSON in memory may take 20 times its bytes."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": (),
    "functions": (),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "verbosity": (),
    "web_search_options": (),
}
"""Parameters of OpenAI that would change the answer -> values that do not."""
_WITHOUT_EFFECT = {
    *("metadata", "prediction", "prompt_cache_key", "prompt_cache_retention"),
    *("safety_identifier", "service_tier", "store", "user"),
}
"""Parameters that do not change the answer."""
_MESSAGE_KEYS = {
    *("role", "content", "name", "tool_calls", "tool_call_id", "function_call", "weight"),
    *REASONING_KEYS,
}

_log = logging.getLogger(__name__)

StopText = Annotated[str, Field(min_length=1, max_length=1000)]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class _Body(_Strict):
    """The parameters that the service reads; null means absent."""

    model: str
    messages: list[Any]
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    stop: Annotated[list[StopText], Field(max_length=4), BeforeValidator(_listed)] = []
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    tools: list[Any] = []
    tool_choice: Literal["auto", "none"] = "auto"
    chat_template_kwargs: dict[str, Any] = {}


def chat_router(resolve: Callable[[str, Request], ServedModel], handles: Mapping[str, Any]) -> APIRouter:
    """Return the route of chat completions.

    Args:
        resolve: Returns the model that a request names, or raises ApiError; may block on the bucket.
        handles: Name of each base model -> Ray Serve handle of its engine.
    """
    router, large_bodies = APIRouter(), asyncio.Semaphore(_MAX_LARGE_BODIES)

    async def accept(request: Request) -> tuple[_Body, ChatRequest]:
        """Read and validate a request."""
        async with AsyncExitStack() as slot:
            content = await read_body(
                request, MAX_BODY_BYTES, on_large=lambda: slot.enter_async_context(large_bodies)
            )

            def read() -> tuple[_Body, ChatRequest]:
                body = _read_body(_parsed(content))
                return body, _chat_request(body, resolve(body.model, request))

            return await run_in_threadpool(read)

    @router.post("/v1/chat/completions")
    async def create(request: Request) -> Response:
        body, asked = await accept(request)
        model = asked.model
        events = _events(handles[model.base], asked)
        try:
            first = await _unless_disconnected(anext(events), request)
        except BaseException:
            await events.aclose()
            raise
        if isinstance(first, Failed):
            await events.aclose()
            raise first.error()
        assert isinstance(first, Accepted)
        answer = _Completion(model.id, first.prompt_tokens)
        if body.stream:
            events = _until_disconnected(events, request)
            chunks = _stream(events, answer, asked, body.stream_options.include_usage)
            return StreamingResponse(
                chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        async with aclosing(events):
            return JSONResponse(await _unless_disconnected(_collect(events, answer, asked), request))

    return router


# --- Requests ---


def _parsed(content: bytes | bytearray) -> Any:
    try:
        parsed = json.loads(content, parse_constant=reject_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(
            status=400,
            message=f"We could not parse the JSON body of your request ({type(error).__name__}: {str(error)[:200]}).",
        ) from error
    check_value(parsed)
    return parsed


def _read_body(value: Any) -> _Body:
    """Validate the parameters; reject those that would change the answer but are not supported."""
    if not isinstance(value, dict):
        raise invalid("The request body must be a JSON object.")
    given = {key: entry for key, entry in value.items() if entry is not None and key not in _WITHOUT_EFFECT}
    for key, neutral in _NEUTRAL.items():
        if key in given and given.pop(key) not in neutral:
            raise invalid(
                f"{key}: this value is not supported. Remove `{key}`.", key, "unsupported_parameter"
            )
    try:
        body = _Body.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = str(first["loc"][0])[:100] if first["loc"] else None
        if first["type"] == "extra_forbidden":
            raise invalid(
                f"Unrecognized request argument supplied: {key}. Remove it.", key, "unknown_parameter"
            ) from error
        raise invalid(f"{key}: {first['msg']}.", key) from error
    for name in body.chat_template_kwargs:
        if name in SET_BY_RENDERING:
            raise invalid(
                f"chat_template_kwargs: {name[:100]!r} is set by the service. Remove it.",
                "chat_template_kwargs",
            )
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs: set logprobs: true, or remove top_logprobs.", "top_logprobs")
    if None not in (body.max_tokens, body.max_completion_tokens):
        raise invalid("max_tokens: remove it, because max_completion_tokens is set.", "max_tokens")
    return body


def _chat_request(body: _Body, model: ServedModel) -> ChatRequest:
    question = _question(body)
    return ChatRequest(
        model=model,
        messages=question.messages,
        tools=question.tools,
        variables=body.chat_template_kwargs,
        sampling=Sampling(
            max_tokens=body.max_completion_tokens or body.max_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            seed=body.seed,
            n=body.n,
            stop=tuple(body.stop),
            top_logprobs=body.top_logprobs if body.logprobs else None,
        ),
    )


def _question(body: _Body) -> Chat:
    """Validate messages and tools by the rules for training rows."""
    for position, message in enumerate(body.messages, start=1):
        keys = message if isinstance(message, dict) else {}
        unknown = [key for key, entry in keys.items() if entry and key not in _MESSAGE_KEYS]
        if unknown:
            raise invalid(
                f"messages: message {position} has `{unknown[0][:100]}`, which is not supported. Remove it.",
                "messages",
            )
    try:
        tools = read_tools(body.tools, "tools", wrap=False) if body.tool_choice == "auto" else None
    except RowError as error:
        raise invalid(f"{error}.", "tools") from error
    for number, tool in enumerate(tools or (), start=1):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict) or not function.get("name"):
            raise invalid(f"tools: tool {number} is not a function with a name.", "tools")
    try:
        return read_question(body.messages, tools)
    except RowError as error:
        raise invalid(f"messages: {error}.", "messages") from error


# --- Answers ---


@dataclass
class _Completion:
    """Fields that all chunks of an answer have."""

    model: str
    prompt_tokens: int
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(16)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def to_json(self, kind: str, choices: list[dict[str, Any]], **others: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        } | others

    def usage(self, completion_tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
        }


async def _events(handle: Any, request: ChatRequest) -> AsyncGenerator[Event]:
    """Yield the events of an engine; cancel the request there if this iterator is closed early."""
    # Serve's router prefers a replica that has this checkpoint; "" stands for none.
    options = handle.options(stream=True, multiplexed_model_id=request.model.checkpoint or "")
    response = options.chat.remote(request)
    is_complete = False
    try:
        async for event in response:
            yield event
        is_complete = True
    except Exception:  # noqa: BLE001
        # Ray Serve raises its own errors for a full queue or a replica that died, and the replica's errors as they are.
        _log.exception("the engine of %s failed", request.model.base)
        message = "The engine of this model is not available at the moment. Retry the request."
        yield Failed(503, message, "server_error")
    finally:
        if not is_complete:
            response.cancel()


async def _unless_disconnected(answer: Awaitable[T], request: Request) -> T:
    """Return the result of an awaitable; cancel it and raise an ApiError if the client disconnects first.

    Args:
        answer: The awaitable, which may wait for an engine that sends nothing.
        request: The request, whose body has been read.
    """

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answering, watching = asyncio.ensure_future(answer), asyncio.create_task(watch())
    try:
        await asyncio.wait((answering, watching), return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            return answering.result()
        watching.result()  # raises what `receive` raised
        raise ApiError(status=499, message="The client closed the connection.")
    finally:
        answering.cancel()
        watching.cancel()
        await asyncio.wait((answering, watching))  # an iterator that is still running cannot be closed


async def _until_disconnected(events: AsyncGenerator[Event], request: Request) -> AsyncGenerator[Event]:
    """Yield events until the client disconnects."""
    async with aclosing(events):
        async for event in events:
            if await request.is_disconnected():
                return
            yield event


async def _collect(
    events: AsyncGenerator[Event], answer: _Completion, request: ChatRequest
) -> dict[str, Any]:
    """Return the complete answer."""
    texts: dict[int, list[str]] = defaultdict(list)
    logprobs: dict[int, list[TokenLogprob]] = defaultdict(list)
    last: dict[int, Delta] = {}
    async for event in events:
        if isinstance(event, Failed):
            raise event.error()
        if isinstance(event, Delta):
            texts[event.choice].append(event.text)
            logprobs[event.choice] += event.logprobs
            if event.finish_reason is not None:
                last[event.choice] = event
    choices = []
    for index, end in sorted(last.items()):
        text = "".join(texts[index])
        message = {"role": "assistant", "content": text if text or not end.tool_calls else None}
        message |= {"refusal": None} | ({"tool_calls": _calls(end.tool_calls)} if end.tool_calls else {})
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": _logprobs(logprobs[index], request),
                "finish_reason": end.finish_reason,
            }
        )
    usage = answer.usage(sum(end.completion_tokens for end in last.values()))
    return answer.to_json("chat.completion", choices, usage=usage)


async def _stream(
    events: AsyncGenerator[Event], answer: _Completion, request: ChatRequest, include_usage: bool
) -> AsyncGenerator[str]:
    """Yield server-sent events."""
    others = {"usage": None} if include_usage else {}

    def chunk(choices: list[dict[str, Any]], **more: Any) -> str:
        written = answer.to_json("chat.completion.chunk", choices, **others | more)
        return f"data: {json.dumps(written)}\n\n"

    tokens = 0
    async with aclosing(events):
        for index in range(request.sampling.n):
            yield chunk([_chunk_choice(index, {"role": "assistant", "content": ""})])
        async for event in events:
            if isinstance(event, Failed):
                yield f"data: {json.dumps(error_body(event.error()))}\n\n"
                return
            if not isinstance(event, Delta):
                continue
            tokens += event.completion_tokens
            delta: dict[str, Any] = {"content": event.text} if event.text else {}
            if event.tool_calls:
                delta["tool_calls"] = [{"index": i} | call for i, call in enumerate(_calls(event.tool_calls))]
            logprobs = _logprobs(event.logprobs, request)
            if delta or event.logprobs:
                yield chunk([_chunk_choice(event.choice, delta, logprobs)])
            if event.finish_reason is not None:
                yield chunk([_chunk_choice(event.choice, {}, finish_reason=event.finish_reason)])
        if include_usage:
            yield chunk([], usage=answer.usage(tokens))
        yield "data: [DONE]\n\n"


def _chunk_choice(
    index: int, delta: dict[str, Any], logprobs: Any = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _calls(calls: tuple[ToolCall, ...]) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in calls
    ]


def _logprobs(entries: Any, request: ChatRequest) -> dict[str, Any] | None:
    if request.sampling.top_logprobs is None:
        return None

    def shown(entry: TokenLogprob) -> dict[str, Any]:
        return {"token": entry.token, "logprob": entry.logprob, "bytes": list(entry.bytes)}

    content = [shown(entry) | {"top_logprobs": [shown(other) for other in entry.top]} for entry in entries]
    return {"content": content, "refusal": None}
