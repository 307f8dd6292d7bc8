"""Chat completions over HTTP: a real server, a real engine, OpenAI's format."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

import service.chat
from service.engine import Accepted, ChatRequest, Delta, Event, Failed
from tests.support.engines import (
    BASE,
    LocalHandle,
    Reference,
    chat_app,
    serving,
    start_engine,
    store_adapter,
)
from tests.support.served import OPENAI, run_client
from tests.support.waiting import wait_until

QUESTION = "Ada has 3 apples and buys 4. How many?"
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> str:
    return store_adapter(tmp_path_factory.mktemp("runs"), "tuned", tiny_model)


@pytest.fixture(scope="module")
def handle(tiny_model: Path) -> Iterator[LocalHandle]:
    engine = start_engine(tiny_model)
    yield LocalHandle(engine)
    engine.close()


@pytest.fixture(scope="module")
def client(handle: LocalHandle, tuned: str) -> Iterator[httpx.Client]:
    with serving(chat_app(handle, [tuned])) as client:
        yield client


def body(model: str = BASE, **parameters: Any) -> dict[str, Any]:
    question = {"role": "user", "content": QUESTION}
    return {"model": model, "messages": [question], "max_tokens": 12, "temperature": 0} | parameters


def ask(client: httpx.Client, *arguments: Any, **parameters: Any) -> dict[str, Any]:
    response = client.post(PATH, json=body(*arguments, **parameters))
    assert response.status_code == 200, response.text
    return response.json()


def stream(client: httpx.Client, *arguments: Any, **parameters: Any) -> list[dict[str, Any]]:
    with client.stream("POST", PATH, json=body(*arguments, stream=True, **parameters)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line for line in response.iter_lines() if line]
    assert all(event.startswith("data: ") for event in events)
    assert events.pop() == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def begin(client: httpx.Client, content: bytes, sent: int | None = None) -> socket.socket:
    """Send a request, of its body only so many bytes, and do not wait for the answer."""
    connection = socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=60)
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content[:sent])
    return connection


def text_of(chunks: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(
        choice["delta"].get("content") or ""
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["index"] == index
    )


def test_complete_answers_of_base_and_tuned_model(client: httpx.Client, tiny_model: Path, tuned: str):
    for model, checkpoint in ((BASE, None), ("tuned-0", tuned)):
        reference = Reference(tiny_model, checkpoint)
        completion = ask(client, model)
        (choice,) = completion["choices"]
        assert completion["object"] == "chat.completion"
        assert completion["model"] == model
        assert choice["message"] == {
            "role": "assistant",
            "content": reference.answer(QUESTION),
            "refusal": None,
        }
        prompt = reference.tokens(QUESTION).shape[1]
        usage = completion["usage"]
        assert usage["prompt_tokens"] == prompt
        assert usage["total_tokens"] == prompt + usage["completion_tokens"]
        assert (choice["finish_reason"], usage["completion_tokens"]) == ("length", 12)


def test_streamed_answer_equals_the_complete_one(client: httpx.Client):
    settings = {"n": 2, "temperature": 1.0, "seed": 4, "stop": "a", "max_tokens": 40}
    complete = ask(client, **settings)
    chunks = stream(client, **settings, stream_options={"include_usage": True})
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    for index, choice in enumerate(complete["choices"]):
        assert text_of(chunks, index) == choice["message"]["content"]
        assert "a" not in choice["message"]["content"]
        reasons = [
            entry["finish_reason"]
            for chunk in chunks
            for entry in chunk["choices"]
            if entry["index"] == index and entry["finish_reason"]
        ]
        assert reasons == [choice["finish_reason"]]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == complete["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert not any("usage" in chunk for chunk in stream(client, max_tokens=2))


def test_logprobs_cover_the_answer_and_name_the_likeliest_tokens(client: httpx.Client):
    completion = ask(client, logprobs=True, top_logprobs=5, max_completion_tokens=6, max_tokens=None)
    (choice,) = completion["choices"]
    entries = choice["logprobs"]["content"]
    assert len(entries) == 6
    raw = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert raw.decode(errors="replace") == choice["message"]["content"]
    for entry in entries:
        assert len(entry["top_logprobs"]) == 5
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"], "greedy: the likeliest"
        assert entry["logprob"] < 0
    streamed = [
        entry
        for chunk in stream(client, logprobs=True, top_logprobs=5, max_tokens=6)
        for choice in chunk["choices"]
        for entry in (choice["logprobs"] or {}).get("content", ())
    ]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in entries]


def test_errors_of_the_engine_have_their_status_and_parameter(client: httpx.Client):
    response = client.post(PATH, json=body(max_tokens=600, stream=True))
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    response = client.post(PATH, json=body(tools=[tool]))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")
    assert ask(client, tools=[tool], tool_choice="none")["choices"][0]["finish_reason"] == "length"


def test_parameters_without_effect_are_accepted(client: httpx.Client):
    neutral = {
        "user": "ann",
        "store": True,
        "metadata": {"a": "b"},
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": None,
        "response_format": {"type": "text"},
        "parallel_tool_calls": True,
        "top_p": 1,
        "seed": None,
    }
    assert ask(client, **neutral)["choices"] == ask(client)["choices"]


def test_disconnected_client_frees_its_slot(
    client: httpx.Client, handle: LocalHandle, monkeypatch: pytest.MonkeyPatch
):
    engine: Any = handle.engine
    batch, before = engine._shared.batch, handle.cancelled
    step = batch.step

    def slow_step() -> None:
        time.sleep(0.4)  # so that the complete answer takes three minutes
        step()

    monkeypatch.setattr(batch, "step", slow_step)
    with client.stream("POST", PATH, json=body(max_tokens=450, stream=True)) as response:
        next(response.iter_lines())
    wait_until(lambda: batch.rows == [])
    wait_until(lambda: handle.cancelled == before + 1)


def test_eight_streams_at_once_keep_their_own_answers(client: httpx.Client):
    models = [BASE, "tuned-0"] * 4
    alone = [ask(client, model, max_tokens=5 + number) for number, model in enumerate(models)]

    async def ask_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=client.base_url, timeout=60) as together:
            return await asyncio.gather(
                *(
                    together.post(PATH, json=body(model, max_tokens=5 + number))
                    for number, model in enumerate(models)
                )
            )

    answers = [response.json() for response in asyncio.run(ask_all())]
    assert [each["choices"] for each in answers] == [each["choices"] for each in alone]


def test_large_bodies_wait_for_each_other(client: httpx.Client, monkeypatch: pytest.MonkeyPatch):
    large = json.dumps(body(messages=[{"role": "nobody", "content": "a " * 700_000}])).encode()
    read_body, known, admitted = service.chat.read_body, list[int](), list[int]()

    async def recorded(request: Any, most: int, on_large: Callable[[], Any]) -> bytearray:
        async def on_known() -> None:
            known.append(1)
            await on_large()
            admitted.append(1)

        return await read_body(request, most, on_large=on_known)

    monkeypatch.setattr(service.chat, "read_body", recorded)
    with ExitStack() as stack:
        begun = [stack.enter_context(begin(client, large, sent=-1)) for _ in range(8)]
        wait_until(lambda: len(admitted) == 8)
        ninth = stack.enter_context(begin(client, large))
        wait_until(lambda: len(known) == 9)
        assert ask(client)["choices"]
        assert len(admitted) == 8, "the ninth waits, also while other requests are answered"
        begun[0].sendall(large[-1:])
        assert b'"param":"messages"' in b"".join(iter(lambda: ninth.recv(65_536), b""))


class SayingEngine:
    """An engine that answers with a text."""

    def __init__(self, text: str):
        self._text = text

    async def chat(self, request: ChatRequest) -> AsyncGenerator[Event]:
        yield Accepted(5)
        yield Delta(0, self._text, finish_reason="stop", completion_tokens=1)


def test_no_character_of_an_answer_splits_a_server_sent_event():
    # Clients that use Python's `splitlines` split lines at all of these.
    text = "one\u2028two\u2029three\x85four\x0b\x0c\x1c\x1d\x1e\r\nfive 🙂"
    with serving(chat_app(LocalHandle(SayingEngine(text)))) as client:
        assert text_of(stream(client)) == text
        assert ask(client)["choices"][0]["message"]["content"] == text


class BreakingEngine:
    """An engine that fails before or within an answer."""

    async def chat(self, request: ChatRequest) -> AsyncGenerator[Event]:
        if request.sampling.max_tokens != 1:
            yield Accepted(5)
            yield Delta(0, "Seven")
        yield Failed(400, "the rest is missing", param="top_logprobs", code="broken")


class SilentEngine:
    """An engine that sends nothing, or nothing after `Accepted`."""

    def __init__(self, events: list[Event]):
        self._events = events
        self.asked, self.closed = threading.Event(), threading.Event()

    async def chat(self, request: ChatRequest) -> AsyncGenerator[Event]:
        try:
            for event in self._events:
                yield event
            self.asked.set()
            await asyncio.sleep(120)  # longer than the test waits
        finally:
            self.closed.set()


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("events", [[], [Accepted(5)]], ids=["waiting", "accepted"])
def test_client_that_disconnects_before_the_first_token_ends_its_request(
    events: list[Event], is_streamed: bool
):
    engine = SilentEngine(events)
    handle: Any = LocalHandle(engine)
    with serving(chat_app(handle)) as client:
        with begin(client, json.dumps(body(stream=is_streamed)).encode()):
            assert engine.asked.wait(60)
        assert engine.closed.wait(60)
    assert handle.cancelled == 1


CLIENT = """
import asyncio, json, sys
import openai

async def errors():
    plain, concurrent = openai.OpenAI(base_url=sys.argv[1]), openai.AsyncOpenAI(base_url=sys.argv[1])
    for tokens in (1, 2):
        how = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": tokens, "stream": True}
        text = []
        try:
            for chunk in plain.chat.completions.create(**how):
                text.append(chunk.choices[0].delta.content)
        except openai.APIError as error:
            yield [type(error).__name__, error.message, error.body, "".join(text)]
        text = []
        try:
            async for chunk in await concurrent.chat.completions.create(**how):
                text.append(chunk.choices[0].delta.content)
        except openai.APIError as error:
            yield [type(error).__name__, error.message, error.body, "".join(text)]

async def main():
    print(json.dumps([each async for each in errors()]))

asyncio.run(main())
"""


@pytest.mark.skipif(not OPENAI.is_dir(), reason="OpenAI's client is not installed: make setup-dev")
def test_openai_client_raises_an_error_that_occurs_within_a_stream(tmp_path: Path):
    program = tmp_path / "client.py"
    program.write_text(CLIENT)
    body = {
        "message": "the rest is missing",
        "type": "invalid_request_error",
        "param": "top_logprobs",
        "code": "broken",
    }
    with serving(chat_app(LocalHandle(BreakingEngine()))) as client:
        received: Any = run_client(f"{client.base_url}/v1", "key", program=program)
    before = ["BadRequestError", "Error code: 400 - the rest is missing", body, ""]
    within = ["APIError", body["message"], body, "Seven"]
    assert received == [before, before, within, within]
