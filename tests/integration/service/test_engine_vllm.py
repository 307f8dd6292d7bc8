"""The vLLM engine with real vLLM on CPU: it answers as transformers, without the traps in which vLLM uses another model's words."""

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.schema import FinetuneConfig
from service.engine import Accepted, Delta, EngineSettings
from service.vllm_engine import VllmEngine
from tests.support.engines import (
    BASE,
    Reference,
    answer,
    chat_request,
    failure,
    needs_vllm,
    store_adapter,
    store_full,
)
from tests.support.tiny_model import make_model

QUESTIONS = ["Ada has 3 apples and buys 4. How many?", "Hi", "How many books has Ben?"]

_RUNNER = asyncio.Runner()
run = _RUNNER.run


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    needs_vllm,
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("vllm") / "model", head_dim=64)


@pytest.fixture(scope="module")
def adapters(model: Path) -> list[str]:
    return [store_adapter(model.parent / "runs", f"run-{number}", model, r=4 + number) for number in range(2)]


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[VllmEngine]:
    """Start vLLM with places for one adapter."""
    config = FinetuneConfig(
        model_id=str(model),
        train_path="rows.jsonl",
        dtype="fp32",
        device="cpu",
        storage_path=str(model.parent / "runs"),
        output_dir=str(model.parent / "scratch"),
        lora_config={"r": 8},  # type: ignore[arg-type]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        engine = VllmEngine(EngineSettings(BASE, str(model), config, max_adapters=1, threads=None))
    yield engine
    engine.close()
    _RUNNER.close()


def test_base_beside_an_adapter_in_one_batch(engine: VllmEngine, model: Path, adapters: list[str]):
    """With as many slots as adapters, vLLM on CPU answers for the base with the adapter, without an error."""
    asked = [(checkpoint, question) for question in QUESTIONS for checkpoint in (None, adapters[0])]
    references = {checkpoint: Reference(model, checkpoint) for checkpoint in (None, adapters[0])}

    async def ask() -> list[list[str]]:
        return await asyncio.gather(*(answer(engine, chat_request(*each)) for each in asked))

    expected = [[references[checkpoint].answer(question)] for checkpoint, question in asked]
    assert expected[0] != expected[1]
    assert run(ask()) == expected


def test_adapter_in_a_reused_slot_starts_with_an_empty_cache(
    engine: VllmEngine, model: Path, adapters: list[str]
):
    """vLLM continues an adapter under a known name and path from cached keys and values of the earlier files."""
    paths = engine._scratch / "vllm-adapters"

    async def ask() -> tuple[list[list[str]], set[str]]:
        texts, names = [], set[str]()
        for checkpoint in (*adapters, *adapters):
            texts.append(await answer(engine, chat_request(checkpoint, QUESTIONS[0])))
            loaded = [path.name for path in paths.iterdir()]
            assert len(loaded) == 1, "the adapter before was unloaded and deleted"
            names |= set(loaded)
        return texts, names

    texts, names = run(ask())
    expected = [[Reference(model, checkpoint).answer(QUESTIONS[0])] for checkpoint in adapters]
    assert texts == expected * 2
    assert len(names) >= 3, "every load has a name and a path of its own"


def test_adapter_with_patterns_answers_as_peft_does(engine: VllmEngine, model: Path):
    """vLLM reads `rank_pattern` and `alpha_pattern` since 0.32."""
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 64}}
    uri = store_adapter(model.parent / "runs", "patterns", model, **patterns)
    asked = run(answer(engine, chat_request(uri, QUESTIONS[0])))
    assert asked == [Reference(model, uri).answer(QUESTIONS[0])]


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    ("lora", "word"),
    [
        ({"trainable_token_indices": [5, 6]}, "plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, "plain LoRA"),
        ({"target_modules": ["q_proj", "lm_head"]}, "plain LoRA"),
        ({"use_dora": True}, "plain LoRA"),
        ({"r": 64}, "rank 64"),
        ({"rank_pattern": {"q_proj": 32}}, "rank 32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_adapter_that_vllm_would_load_without_some_weights_is_rejected(
    engine: VllmEngine, model: Path, lora: dict[str, Any], word: str
):
    uri = store_adapter(model.parent / "runs", f"rejected-{next(iter(lora))}", model, **lora)
    failed = run(failure(engine, chat_request(uri, "Hi")))
    assert (failed.status, failed.code, failed.param) == (400, "unsupported_model", "model")
    assert word in failed.message


def test_complete_model_is_rejected(engine: VllmEngine, model: Path):
    uri = store_full(model.parent / "runs", "full", model)
    failed = run(failure(engine, chat_request(uri, "Hi")))
    assert (failed.status, failed.code) == (400, "unsupported_model")


def test_stop_texts_logprobs_and_choices_are_read_from_tokens(engine: VllmEngine, model: Path):
    """Stop texts, log probabilities and several choices are read from vLLM's tokens."""
    text = Reference(model).answer(QUESTIONS[0], 20)
    stop = text[4:6]

    async def ask(**sampling: Any) -> list[Any]:
        request = chat_request(None, QUESTIONS[0], max_tokens=20, **sampling)
        return [event async for event in engine.chat(request)]

    accepted, *deltas = run(ask(stop=(stop,), top_logprobs=3))
    assert isinstance(accepted, Accepted)
    assert "".join(delta.text for delta in deltas) == text[: text.index(stop)]
    assert deltas[-1].finish_reason == "stop"
    entries = [entry for delta in deltas for entry in delta.logprobs]
    assert all(len(entry.top) == 3 and entry.logprob == entry.top[0].logprob for entry in entries)

    first, second = (run(ask(n=2, temperature=1.0, seed=3)) for _ in range(2))
    ends = [event for event in first if isinstance(event, Delta) and event.finish_reason]
    assert sorted(end.choice for end in ends) == [0, 1]
    texts = [
        ["".join(e.text for e in events if isinstance(e, Delta) and e.choice == n) for n in (0, 1)]
        for events in (first, second)
    ]
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


def test_greedy_choices_are_the_same(engine: VllmEngine, model: Path):
    """vLLM itself rejects `n` above 1 with temperature 0."""
    expected = Reference(model).answer(QUESTIONS[0])
    assert run(answer(engine, chat_request(None, QUESTIONS[0], n=3))) == [expected] * 3


def test_request_that_vllm_rejects_is_400(engine: VllmEngine):
    async def ask(**sampling: Any) -> list[Any]:
        return [event async for event in engine.chat(chat_request(None, "Hi", **sampling))]

    (failed,) = run(ask(temperature=1.0, top_p=2.0))
    assert (failed.status, failed.type) == (400, "invalid_request_error")
    assert "top_p" in failed.message
    # vLLM finds this mistake only after it has begun its stream.
    (failed,) = run(ask(top_logprobs=1000))
    assert (failed.status, failed.type) == (400, "invalid_request_error")
    assert "1000" in failed.message


def test_key_of_the_server_is_not_in_its_arguments(engine: VllmEngine):
    key = engine._client.headers["authorization"].removeprefix("Bearer ")
    shown = subprocess.run(
        ["ps", "-ww", "-o", "args", "-p", str(engine._server.pid)], capture_output=True, text=True, check=True
    )
    assert "vllm" in shown.stdout
    assert key not in shown.stdout
