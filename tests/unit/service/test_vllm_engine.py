"""Requests to vLLM's server and its answers, without vLLM."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from configs.schema import FinetuneConfig
from service.checkpoints import Checkpoint, base_checkpoint, read_checkpoint
from service.engine import Accepted, ChatRequest, Delta, EngineSettings, Event, Failed, Sampling
from service.errors import ApiError
from service.models import ServedModel
from service.prompts import ChatFormat
from service.vllm_engine import VllmEngine
from tests.support.engines import store_full
from tests.support.tiny_model import make_longrope_model, make_tokenizer


@pytest.fixture(scope="module")
def chat_format() -> ChatFormat:
    return ChatFormat(make_tokenizer(), variables={}, context=512, model="tiny")


def generate(
    chat_format: ChatFormat, answer: httpx.Response, **sampling: Any
) -> tuple[dict[str, Any], list[Event]]:
    """Return the request that a server gets, and the events of its answer."""
    bodies: list[dict[str, Any]] = []

    def serve(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return answer

    engine = VllmEngine.__new__(VllmEngine)
    tokenizer: Any = chat_format.tokenizer
    engine._stop_tokens = frozenset({tokenizer.eos_token_id})
    engine._client = httpx.AsyncClient(transport=httpx.MockTransport(serve), base_url="http://vllm")
    checkpoint: Any = Checkpoint.__new__(Checkpoint)
    object.__setattr__(checkpoint, "format", chat_format)
    request = ChatRequest(ServedModel("tiny", "tiny", None), [], None, {}, Sampling(**sampling))

    events: list[Event] = []

    async def collect() -> None:
        try:
            async for event in engine._generate(request, checkpoint, [1, 2], "tiny"):
                events.append(event)
        except ApiError as error:
            events.append(Failed.of(error))

    asyncio.run(collect())
    return bodies[0], events


def stream(*choices: dict[str, Any]) -> httpx.Response:
    lines = [f"data: {json.dumps({'choices': [choice]})}\n\n" for choice in choices]
    return httpx.Response(200, text="".join([*lines, "data: [DONE]\n\n"]))


def texts(events: list[Event], n: int) -> list[str]:
    deltas = [event for event in events if isinstance(event, Delta)]
    return ["".join(delta.text for delta in deltas if delta.choice == choice) for choice in range(n)]


@pytest.mark.parametrize("temperature", [0.0, 9e-6])
def test_greedy_choices_are_asked_once_and_are_the_same(chat_format: ChatFormat, temperature: float):
    tokens = chat_format.tokenizer.encode("4 apples", add_special_tokens=False)
    chunks = stream(
        {"index": 0, "token_ids": tokens[:1]}, {"index": 0, "token_ids": tokens[1:], "finish_reason": "stop"}
    )
    body, events = generate(chat_format, chunks, n=3, temperature=temperature)
    assert body["n"] == 1
    assert texts(events, 3) == ["4 apples"] * 3
    ends = [event for event in events if isinstance(event, Delta) and event.finish_reason]
    assert [(end.choice, end.finish_reason, end.completion_tokens) for end in ends] == [
        (choice, "stop", len(tokens) + 1) for choice in range(3)
    ]


def test_sampled_choices_are_asked_together_and_differ(chat_format: ChatFormat):
    one, two = (chat_format.tokenizer.encode(text, add_special_tokens=False) for text in ("one", "two"))
    chunks = stream(
        {"index": 1, "token_ids": two, "finish_reason": "stop"},
        {"index": 0, "token_ids": one, "finish_reason": "stop"},
    )
    body, events = generate(chat_format, chunks, n=2, temperature=1.0)
    assert body["n"] == 2
    assert texts(events, 2) == ["one", "two"]


REJECTED = {"error": {"message": "too many logprobs", "type": "BadRequestError", "code": 400}}
LOST = {"error": {"message": "engine died", "type": "InternalServerError", "code": 500}}


@pytest.mark.parametrize(
    ("answer", "status", "message"),
    [
        (httpx.Response(400, json=REJECTED), 400, "too many logprobs"),
        (httpx.Response(500, json=LOST), 500, "engine died"),
        (httpx.Response(502, text="<html>"), 500, "<html>"),
        (httpx.Response(502, text="[]"), 500, "[]"),
    ],
)
def test_error_of_vllm_keeps_its_status_and_is_the_only_event(
    chat_format: ChatFormat, answer: httpx.Response, status: int, message: str
):
    kind = "invalid_request_error" if status == 400 else "server_error"
    _, events = generate(chat_format, answer)
    assert events == [Failed(status, f"vLLM rejected the request: {message}", kind)]


def test_mistake_that_vllm_finds_in_its_stream_is_the_only_event(chat_format: ChatFormat):
    _, events = generate(chat_format, httpx.Response(200, text=f"data: {json.dumps(REJECTED)}\n\n"))
    assert events == [Failed(400, "vLLM rejected the request: too many logprobs", "invalid_request_error")]


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (f"data: {json.dumps(LOST)}\n\n", "vLLM rejected the request: engine died"),
        ("data: [DONE]\n\n", "vLLM ended the answer before it was complete. Retry the request."),
        ("", "vLLM ended the answer before it was complete. Retry the request."),
    ],
)
def test_answer_that_vllm_does_not_complete_ends_with_an_error(
    chat_format: ChatFormat, rest: str, message: str
):
    tokens = chat_format.tokenizer.encode("4 apples", add_special_tokens=False)
    first = {"choices": [{"index": 0, "token_ids": tokens[:1]}]}
    _, events = generate(chat_format, httpx.Response(200, text=f"data: {json.dumps(first)}\n\n{rest}"))
    assert events == [Accepted(2), Delta(0, "4"), Failed(500, message, "server_error")]


@pytest.mark.parametrize(("has_fixed_rope", "context"), [(True, 128), (False, 512)])
def test_context_of_vllm_ends_where_rope_changes(has_fixed_rope: bool, context: int, tmp_path: Path):
    """Above it, vLLM 0.32 would compute shorter requests, too, with the frequencies of longer sequences."""
    model = make_longrope_model(tmp_path / "model", 128)
    config = FinetuneConfig(
        model_id=str(model), train_path="rows.jsonl", device="cpu", output_dir=str(tmp_path / "scratch")
    )
    settings = EngineSettings("phi", str(model), config, 1, threads=1, has_fixed_rope=has_fixed_rope)
    assert base_checkpoint(settings).format.context == context
    checkpoint = store_full(tmp_path / "runs", "run", model)
    assert read_checkpoint(checkpoint, settings, {}).format.context == context


def test_line_separators_in_a_text_do_not_split_an_event(chat_format: ChatFormat):
    tokens = chat_format.tokenizer.encode("4 apples", add_special_tokens=False)
    choice = {"index": 0, "token_ids": tokens, "text": "4\u2028apples\x85", "finish_reason": "stop"}
    written = json.dumps({"choices": [choice]}, ensure_ascii=False)
    answer = httpx.Response(200, text=f"data: {written}\n\ndata: [DONE]\n\n")
    _, events = generate(chat_format, answer)
    assert texts(events, 1) == ["4 apples"]
