"""The engine as a Ray Serve deployment: requests, answers, errors and cancellation cross processes."""

import os
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, aclosing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from configs.loading import load_config
from configs.schema import FinetuneConfig
from service.config import BaseModelSettings
from service.engine import Accepted, ChatRequest, Delta, EngineSettings, Event, engine_deployment, reporting
from service.transformers_engine import TransformersEngine
from tests.support.engines import BASE, Reference, chat_app, serving, store_adapter
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("grpc_reflection") is None, reason="needs ray[serve]: make setup-service"),
]

QUESTION = "Ada has 3 apples and buys 4. How many?"
HOW_MANY = "How many rows does the engine have?"
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> str:
    return store_adapter(tmp_path_factory.mktemp("runs"), "tuned", tiny_model)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tuned: str) -> Iterator[httpx.Client]:
    import ray
    from ray import serve

    directory = tmp_path_factory.mktemp("serve")
    config = directory / "base.yaml"
    settings = {
        "model_id": str(tiny_model),
        "train_path": "rows.jsonl",
        "dtype": "fp32",
        "device": "cpu",
        "storage_path": str(directory / "runs"),
        "output_dir": str(directory / "scratch"),
    }
    config.write_text(yaml.safe_dump(settings))
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(proxy_location="Disabled")
        base = BaseModelSettings(config=str(config), resources={"CPU": 1})
        engine = engine_deployment(BASE, base, load_config(config).config)
        handle = serve.run(engine, name="engine", route_prefix=None)
        with serving(chat_app(handle, [tuned, f"{tuned}-missing"])) as client:
            yield client
        serve.shutdown()
    finally:
        ray.shutdown()


def body(model: str, **parameters: Any) -> dict[str, Any]:
    question = {"role": "user", "content": QUESTION}
    return {"model": model, "messages": [question], "max_tokens": 12, "temperature": 0} | parameters


def test_answers_and_errors_cross_processes(client: httpx.Client, tiny_model: Path, tuned: str):
    for model, checkpoint in ((BASE, None), ("tuned-0", tuned)):
        answer = client.post(PATH, json=body(model)).json()
        expected = Reference(tiny_model, checkpoint).answer(QUESTION)
        assert answer["choices"][0]["message"]["content"] == expected
    too_long = client.post(PATH, json=body(BASE, max_tokens=600))
    assert (too_long.status_code, too_long.json()["error"]["code"]) == (400, "context_length_exceeded")
    missing = client.post(PATH, json=body("tuned-1"))
    assert (missing.status_code, missing.json()["error"]["code"]) == (500, "model_unavailable")


class ProcessIdEngine:
    """An engine whose answers have its process id as the number of prompt tokens."""

    async def chat(self, request: ChatRequest) -> AsyncGenerator[Event]:
        yield Accepted(os.getpid())
        yield Delta(0, "x", finish_reason="stop", completion_tokens=1)


def test_requests_for_a_checkpoint_go_to_the_replica_that_has_it(client: httpx.Client):
    from ray import serve

    engine: Any = serve.deployment(
        reporting(ProcessIdEngine, most=2), name="two", num_replicas=2, ray_actor_options={"num_cpus": 0}
    )
    handle: Any = serve.run(engine.bind(), name="two", route_prefix=None)
    checkpoints = ["a", "b", "c", "d"]
    with serving(chat_app(handle, checkpoints)) as own:

        def process(model: str) -> int:
            return own.post(PATH, json=body(model)).json()["usage"]["prompt_tokens"]

        def has_replica(checkpoint: str) -> bool:
            router = handle._router._asyncio_router.request_router
            return bool(router._multiplexed_model_id_to_replica_ids.get(checkpoint))

        first = {}
        for number, checkpoint in enumerate(checkpoints):
            first[f"tuned-{number}"] = process(f"tuned-{number}")
            wait_until(lambda: has_replica(checkpoint))  # noqa: B023
        assert sorted(map(list(first.values()).count, first.values())) == [2, 2, 2, 2]
        for _ in range(5):
            assert {model: process(model) for model in first} == first
        assert len({process(BASE) for _ in range(20)}) == 2
    serve.delete("two")


class CountingEngine(TransformersEngine):
    """An engine whose complete answers take three minutes, and that answers HOW_MANY with its number of rows as that of prompt tokens."""

    def __init__(self, settings: EngineSettings):
        super().__init__(settings)
        batch: Any = self._shared.batch
        step = batch.step

        def slow_step() -> None:
            time.sleep(0.4)
            step()

        batch.step = slow_step

    async def chat(self, request: ChatRequest) -> AsyncGenerator[Event]:
        if request.messages[0]["content"] == HOW_MANY:
            yield Accepted(len(self._shared.batch.rows))
            yield Delta(0, "x", finish_reason="stop", completion_tokens=1)
            return
        async with aclosing(super().chat(request)) as events:
            async for event in events:
                yield event


def test_disconnected_clients_leave_no_rows_behind(client: httpx.Client, tiny_model: Path):
    from ray import serve

    training = FinetuneConfig(model_id=str(tiny_model), train_path="rows.jsonl", dtype="fp32", device="cpu")
    engine: Any = serve.deployment(
        CountingEngine, name="counting", max_ongoing_requests=100, ray_actor_options={"num_cpus": 0}
    )
    settings = EngineSettings(BASE, str(tiny_model), training, max_adapters=1, threads=1)
    handle = serve.run(engine.bind(settings), name="counting", route_prefix=None)
    with serving(chat_app(handle)) as own:

        def rows() -> int:
            answer = own.post(PATH, json=body(BASE, messages=[{"role": "user", "content": HOW_MANY}]))
            return answer.json()["usage"]["prompt_tokens"]

        with ExitStack() as stack:
            asked = body(BASE, max_tokens=450, stream=True)
            answers = [stack.enter_context(own.stream("POST", PATH, json=asked)) for _ in range(16)]
            assert {answer.status_code for answer in answers} == {200}
            wait_until(lambda: rows() == 16)
        wait_until(lambda: rows() == 0)
    serve.delete("counting")
