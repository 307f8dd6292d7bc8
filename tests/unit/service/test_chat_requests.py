"""Requests that the chat route rejects: each names the parameter."""

import json
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from service.engine import ChatRequest, Event, Failed
from tests.support.engines import BASE, chat_app, serving


class Unreachable:
    """A handle that no rejected request may reach."""

    def options(self, **_: Any) -> Any:
        raise AssertionError("the request reached the engine")


@pytest.fixture(scope="module")
def client():
    with serving(chat_app(Unreachable())) as client:
        yield client


USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize(
    ("parameters", "param", "word"),
    [
        ({"temperature": 3}, "temperature", "2"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "0"),
        ({"n": 0}, "n", "1"),
        ({"n": True}, "n", "integer"),
        ({"n": 10**9}, "n", "128"),
        ({"max_tokens": 0}, "max_tokens", "1"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "max_completion_tokens"),
        ({"stop": [""]}, "stop", "character"),
        ({"stop": ["a"] * 5}, "stop", "4"),
        ({"seed": 2**70}, "seed", "9223372036854775808"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "Remove"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "Remove"),
        ({"response_format": {"type": "json_object"}}, "response_format", "Remove"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls", "Remove"),
        ({"tool_choice": "required"}, "tool_choice", "auto"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools", "tool 1"),
        ({"tools": "f"}, "tools", "list"),
        ({"top_k": 5}, "top_k", "Remove"),
        ({"stream_options": {"include_all": True}}, "stream_options", "Remove"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "tools"),
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, "chat_template_kwargs", "Remove"),
        ({"chat_template_kwargs": {"strftime_now": "x"}}, "chat_template_kwargs", "strftime_now"),
        ({"messages": []}, "messages", "empty"),
        ({"messages": "hi"}, "messages", "list"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages", "wizard"),
        ({"messages": [USER | {"prefix": True}]}, "messages", "prefix"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "image_url"),
        ({"messages": [USER, {"role": "tool", "content": "4"}]}, "messages", "tool_calls"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_rejected_parameter_is_named(client: httpx.Client, parameters: dict[str, Any], param: str, word: str):
    response = client.post("/v1/chat/completions", json={"model": BASE, "messages": [USER]} | parameters)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert word in error["message"]


class Busy:
    """The handle of an engine that accepts no request, and its response."""

    def __init__(self):
        self.asked: list[ChatRequest] = []

    def options(self, **_: Any) -> Any:
        return SimpleNamespace(chat=SimpleNamespace(remote=self._ask))

    def _ask(self, request: ChatRequest) -> "Busy":
        self.asked.append(request)
        return self

    async def __aiter__(self) -> AsyncGenerator[Event]:
        yield Failed(503, "The engine is busy.", "server_error")

    def cancel(self) -> None:
        """Do nothing: no request runs."""


@pytest.mark.parametrize("name", ["documents", "bos_token", "tokenize"])
def test_variables_that_rows_may_set_reach_the_engine(name: str):
    """The renderings of rows and of requests set the same variables themselves, and no others."""
    engine = Busy()
    with serving(chat_app(engine)) as client:
        response = client.post(
            "/v1/chat/completions",
            json={"model": BASE, "messages": [USER], "chat_template_kwargs": {name: []}},
        )
    assert response.status_code == 503
    assert [request.variables for request in engine.asked] == [{name: []}]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"[" * 100_000, b'{"model": NaN}', b"\xff"])
def test_body_that_is_no_json_object_is_rejected(client: httpx.Client, body: bytes):
    response = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert "JSON" in response.json()["error"]["message"]


def test_large_body_is_rejected(client: httpx.Client):
    body = json.dumps({"model": BASE, "messages": [USER | {"content": "a" * 17_000_000}]})
    response = client.post("/v1/chat/completions", content=body)
    assert response.status_code == 413


def test_unknown_model_is_not_found(client: httpx.Client):
    response = client.post("/v1/chat/completions", json={"model": "other", "messages": [USER]})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("message", [{"\ud800": 1}, {"content": "\ud800"}, {"content": "\x00"}])
def test_text_that_is_not_unicode_is_rejected(client: httpx.Client, message: dict[str, Any]):
    body = json.dumps({"model": BASE, "messages": [USER | message]})
    response = client.post("/v1/chat/completions", content=body)
    assert response.status_code == 400
    assert "Unicode" in response.json()["error"]["message"]
