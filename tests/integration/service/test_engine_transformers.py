"""The transformers engine: answers equal plain `generate`, whatever else is in the batch."""

import asyncio
import shutil
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig, Qwen3NextConfig

from configs.schema import FinetuneConfig
from service.checkpoints import base_checkpoint
from service.engine import ChatRequest, Delta, EngineSettings
from service.prompts import ChatFormat
from service.transformers_engine import TransformersEngine
from tests.support.engines import (
    Reference,
    answer,
    chat_request,
    failure,
    start_engine,
    store_adapter,
    store_full,
)
from tests.support.tiny_model import make_longrope_model, make_model
from training.models.files import ModelError
from utils.storage.bucket import open_store, upload_directory

QUESTIONS = [
    "Ada has 3 apples and buys 4. How many?",
    "Hi",
    "Ben has 12 books. " * 9,
    "How many?",
]
PLAIN, OTHER, WIDE = "plain", "other", "wide"

_RUNNER = asyncio.Runner()
run = _RUNNER.run


@pytest.fixture(scope="module", autouse=True)
def event_loop_of_the_engine() -> Iterator[None]:
    """Close the one event loop in which an engine is used, as in a replica."""
    yield
    _RUNNER.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def adapters(runs: Path, tiny_model: Path) -> dict[str, str]:
    """Return three adapters that share batches: name -> URI of the checkpoint."""
    return {
        PLAIN: store_adapter(runs, PLAIN, tiny_model),
        OTHER: store_adapter(runs, OTHER, tiny_model, r=8, target_modules=["q_proj", "down_proj"]),
        WIDE: store_adapter(
            runs, WIDE, tiny_model, use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 64}
        ),
    }


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[TransformersEngine]:
    engine = start_engine(tiny_model, max_adapters=3)
    yield engine
    engine.close()


def test_greedy_answers_equal_generate_alone_and_in_a_mixed_batch(
    engine: TransformersEngine, adapters: dict[str, str], tiny_model: Path
):
    asked = [
        (checkpoint, question)
        for checkpoint in (None, *adapters.values())
        for question in (QUESTIONS[:2] if checkpoint else QUESTIONS[2:])
    ]
    references = {checkpoint: Reference(tiny_model, checkpoint) for checkpoint, _ in asked}
    expected = [[references[checkpoint].answer(question)] for checkpoint, question in asked]
    assert len({text for (text,) in expected}) == len(asked) == 8, "every model answers differently"

    async def ask() -> tuple[list[list[str]], list[list[str]]]:
        alone = [await answer(engine, chat_request(*request)) for request in asked]
        together = await asyncio.gather(*(answer(engine, chat_request(*request)) for request in asked))
        return alone, list(together)

    alone, together = run(ask())
    assert alone == expected
    assert together == expected


def test_long_prompt_does_not_stop_other_answers(
    engine: TransformersEngine, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    encode, began, may_end = ChatFormat.encode, threading.Event(), threading.Event()

    def slow(self: ChatFormat, request: ChatRequest) -> list[int]:
        if request.messages[0]["content"] == "slow":
            began.set()
            assert may_end.wait(30)
        return encode(self, request)

    monkeypatch.setattr(ChatFormat, "encode", slow)

    async def ask() -> list[str]:
        waiting = asyncio.create_task(answer(engine, chat_request(None, "slow")))
        await asyncio.to_thread(began.wait, 30)
        answered = await answer(engine, chat_request(None, QUESTIONS[0]))
        assert not waiting.done()
        may_end.set()
        await waiting
        return answered

    assert run(ask()) == [Reference(tiny_model).answer(QUESTIONS[0])]


def test_prompts_that_are_encoded_at_the_same_moment_equal_those_alone(engine: TransformersEngine):
    requests = [chat_request(None, f"{number} " * (number % 50 + 1)) for number in range(200)]
    encode = engine._base.format.encode
    alone = [encode(request) for request in requests]

    async def ask() -> list[list[int]]:
        return await asyncio.gather(*(asyncio.to_thread(encode, request) for request in requests))

    assert run(ask()) == alone


def test_requests_join_and_leave_between_tokens(
    engine: TransformersEngine, adapters: dict[str, str], tiny_model: Path
):
    """Rows of different lengths, joining at different times, keep their own answers."""
    checkpoints = [None, *adapters.values()]
    lengths = [30, 3, 17, 1, 24, 8, 2, 40]
    references = {checkpoint: Reference(tiny_model, checkpoint) for checkpoint in checkpoints}

    async def late(number: int, length: int) -> list[str]:
        await asyncio.sleep(0.01 * number)
        request = chat_request(checkpoints[number % 4], QUESTIONS[number % 3], max_tokens=length)
        return await answer(engine, request)

    async def ask() -> list[list[str]]:
        return await asyncio.gather(*(late(number, length) for number, length in enumerate(lengths)))

    for number, answers in enumerate(run(ask())):
        reference = references[checkpoints[number % 4]]
        assert answers == [reference.answer(QUESTIONS[number % 3], lengths[number])]


def test_seed_determines_an_answer_whatever_else_is_in_the_batch(
    engine: TransformersEngine, adapters: dict[str, str]
):
    def seeded(seed: int | None, n: int = 3) -> Any:
        return chat_request(adapters[PLAIN], QUESTIONS[0], temperature=1.0, top_p=0.9, seed=seed, n=n)

    async def ask() -> tuple[list[str], list[str], list[str]]:
        alone = await answer(engine, seeded(7))
        (together, *_) = await asyncio.gather(
            answer(engine, seeded(7)), *(answer(engine, seeded(None)) for _ in range(3))
        )
        return alone, together, await answer(engine, seeded(8))

    alone, together, other = run(ask())
    assert alone == together
    assert alone != other
    assert len(set(alone)) == 3


@pytest.mark.slow
def test_adapters_load_beside_models_that_other_threads_build(runs: Path, tiny_model: Path):
    """PEFT 0.21's low_cpu_mem_usage would leave modules of other threads without weights meanwhile."""
    engine = start_engine(tiny_model, max_adapters=8)
    uris = [store_adapter(runs, f"beside-{number}", tiny_model) for number in range(8)]
    is_answered, empty = threading.Event(), []

    def build() -> None:
        while not is_answered.is_set():
            empty.append(torch.nn.Linear(2, 2).weight.is_meta)

    building = threading.Thread(target=build)
    building.start()
    try:
        for uri in uris:
            run(answer(engine, chat_request(uri, QUESTIONS[0])))
    finally:
        is_answered.set()
        building.join()
        engine.close()
    assert empty.count(False) > 0
    assert empty.count(True) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "lora",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [5, 6, 300]},
    ],
    ids=lambda lora: next(iter(lora)),
)
def test_other_kinds_of_checkpoints_answer_as_peft_beside_the_base(
    engine: TransformersEngine, adapters: dict[str, str], runs: Path, tiny_model: Path, lora: dict[str, Any]
):
    uri = store_adapter(runs, f"kind-{next(iter(lora))}", tiny_model, **lora)
    _assert_beside_others(engine, adapters, tiny_model, uri, Reference(tiny_model, uri))


def test_full_parameter_checkpoint_answers_beside_the_base(
    engine: TransformersEngine, adapters: dict[str, str], runs: Path, tiny_model: Path
):
    uri = store_full(runs, "full", tiny_model)
    _assert_beside_others(engine, adapters, tiny_model, uri, Reference(tiny_model, uri, is_adapter=False))


def _assert_beside_others(
    engine: TransformersEngine, adapters: dict[str, str], model: Path, uri: str, reference: Reference
) -> None:
    asked = [None, uri, adapters[PLAIN], uri]

    async def ask() -> list[list[str]]:
        return await asyncio.gather(*(answer(engine, chat_request(each, QUESTIONS[0])) for each in asked))

    base, first, plain, second = run(ask())
    assert base == [Reference(model).answer(QUESTIONS[0])]
    assert plain == [Reference(model, adapters[PLAIN]).answer(QUESTIONS[0])]
    assert first == second == [reference.answer(QUESTIONS[0])]
    assert first != base


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (MistralConfig, {"sliding_window": 8}),
        (
            Qwen3NextConfig,
            {
                "layer_types": ["linear_attention", "full_attention"],
                "linear_num_value_heads": 2,
                "linear_num_key_heads": 1,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "head_dim": 16,
                "num_experts": 0,
                "mlp_only_layers": [0, 1],
            },
        ),
    ],
    ids=["sliding window", "linear attention"],
)
def test_other_attention_answers_as_generate(tmp_path: Path, kind: Any, settings: dict[str, Any]):
    model = make_model(tmp_path / "model", kind=kind, **settings)
    engine = start_engine(model)

    async def ask() -> list[list[str]]:
        return await asyncio.gather(*(answer(engine, chat_request(None, question)) for question in QUESTIONS))

    try:
        reference = Reference(model)
        assert run(ask()) == [[reference.answer(question)] for question in QUESTIONS]
    finally:
        engine.close()


@pytest.mark.slow
def test_requests_above_the_rope_limit_answer_alone_as_generate(tmp_path: Path):
    """One prompt is longer than the limit, one answer passes it, and the other requests share a batch."""
    limit = 48
    model = make_longrope_model(tmp_path / "model", limit)
    reference = Reference(model)
    # transformers 5.17 forgets the prompt where RoPE changes; see _recompute_at in training/models/torch_provider.py.
    reference.model.generation_config.use_cache = False
    lengths = [len(reference.tokens(question)[0]) for question in QUESTIONS]
    asked = [(question, 8, 2) for question in QUESTIONS] + [
        (QUESTIONS[0], limit - lengths[0] + 8, 2),
        (QUESTIONS[0] * 4, 8, 1),
        (QUESTIONS[1], 8, 1),
    ]
    engine = start_engine(model)
    batch, sizes = engine._shared.batch, set[tuple[int, bool]]()
    step = batch.step

    def counted_step() -> None:
        sizes.add((len(batch.rows), max(row.end for row in batch.rows) > limit))
        step()

    batch.step = counted_step  # type: ignore[method-assign]

    async def ask() -> list[list[str]]:
        requests = [chat_request(None, text, max_tokens=tokens, n=count) for text, tokens, count in asked]
        return await asyncio.gather(*(answer(engine, request) for request in requests))

    try:
        answers = run(ask())
    finally:
        engine.close()
    assert answers == [[reference.answer(text, tokens)] * count for text, tokens, count in asked]
    assert max(rows for rows, is_long in sizes if not is_long) > 2
    assert {rows for rows, is_long in sizes if is_long} == {1, 2}


def test_least_recently_used_adapter_is_removed_unless_in_use(tiny_model: Path, adapters: dict[str, str]):
    """With one place, a second adapter waits for the answer that uses the first; the base does not wait."""
    engine = start_engine(tiny_model, max_adapters=1)
    pool: Any = engine._adapters
    batch: Any = engine._shared.batch
    use, step, entered, order = pool.use, batch.step, list[str](), list[str]()

    @asynccontextmanager
    async def recorded_use(uri: str) -> AsyncIterator[Any]:
        entered.append(uri)
        async with use(uri) as loaded:
            yield loaded

    def slow_step() -> None:
        if len(entered) > 2 and not order:
            time.sleep(0.05)  # the base answers before the first request, whose answer is long
        step()

    pool.use, batch.step = recorded_use, slow_step

    async def ask(name: str, checkpoint: str | None, length: int) -> list[str]:
        texts = await answer(engine, chat_request(checkpoint, QUESTIONS[0], max_tokens=length))
        order.append(name)
        return texts

    async def ask_all() -> list[list[str]]:
        for checkpoint in (adapters[OTHER], adapters[PLAIN]):
            await answer(engine, chat_request(checkpoint, QUESTIONS[0]))
        tasks = []
        for name, checkpoint, length in (
            ("first", adapters[PLAIN], 450),
            ("second", adapters[OTHER], 5),
            ("first again", adapters[PLAIN], 5),
            ("base", None, 5),
        ):
            tasks.append(asyncio.create_task(ask(name, checkpoint, length)))
            # Requests wait in the order in which they enter.
            while checkpoint and len(entered) < 2 + len(tasks):
                await asyncio.sleep(0.005)
        return list(await asyncio.gather(*tasks))

    try:
        first, second, again, base = run(ask_all())
    finally:
        engine.close()
    assert order == ["base", "first", "second", "first again"]
    plain, other = Reference(tiny_model, adapters[PLAIN]), Reference(tiny_model, adapters[OTHER])
    assert first == [plain.answer(QUESTIONS[0], 450)]
    assert second == [other.answer(QUESTIONS[0], 5)]
    assert again == [plain.answer(QUESTIONS[0], 5)]
    assert base == [Reference(tiny_model).answer(QUESTIONS[0], 5)]


def test_closed_stream_frees_its_rows_and_its_adapter(tiny_model: Path, adapters: dict[str, str]):
    engine = start_engine(tiny_model, max_adapters=1)

    async def ask() -> list[str]:
        events = engine.chat(chat_request(adapters[PLAIN], QUESTIONS[0], max_tokens=400))
        async for event in events:
            if isinstance(event, Delta):
                break
        await events.aclose()  # type: ignore[attr-defined]
        async with asyncio.timeout(60):
            return await answer(engine, chat_request(adapters[OTHER], QUESTIONS[0]))

    try:
        assert run(ask()) == [Reference(tiny_model, adapters[OTHER]).answer(QUESTIONS[0])]
        run(engine._between_steps(lambda: None))  # the rows of finished answers leave before it
        assert engine._shared.batch.rows == []
    finally:
        engine.close()


def test_damaged_and_uncommitted_checkpoints_are_named(
    engine: TransformersEngine, runs: Path, tiny_model: Path
):
    damaged = Path(store_adapter(runs, "damaged", tiny_model))
    weights = damaged / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    uncommitted = Path(store_adapter(runs, "uncommitted", tiny_model))
    (uncommitted / "MANIFEST.json").unlink()

    async def ask() -> None:
        for uri, word in ((damaged, "adapter_model.safetensors"), (uncommitted, "uncommitted")):
            failed = await failure(engine, chat_request(str(uri), "Hi"))
            assert (failed.status, failed.code) == (500, "model_unavailable")
            assert word in failed.message
        await answer(engine, chat_request(None, "Hi"))  # the engine still answers

    run(ask())


def test_prompt_above_the_context_is_rejected(engine: TransformersEngine):
    async def ask() -> None:
        for request in (
            chat_request(None, "apples " * 600),
            chat_request(None, "Hi", max_tokens=600),
        ):
            failed = await failure(engine, request)
            assert (failed.status, failed.code) == (400, "context_length_exceeded")
            assert "512" in failed.message

    run(ask())


@pytest.mark.slow
def test_answer_without_max_tokens_ends_at_the_context(engine: TransformersEngine):
    async def ask() -> Delta:
        events = [event async for event in engine.chat(chat_request(None, QUESTIONS[2], max_tokens=None))]
        last = events[-1]
        assert isinstance(last, Delta)
        prompt = events[0].prompt_tokens  # type: ignore[union-attr]
        assert last.finish_reason == "stop" or prompt + last.completion_tokens == 512
        return last

    run(ask())


def test_a_base_model_with_an_adapter_beside_it_raises_an_error_with_its_uri(
    tiny_model: Path, tmp_path: Path, bucket_uri: str
):
    """transformers would load the adapter into the base model without a word."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "adapter_config.json").write_text("{}")
    upload_directory(model, open_store(bucket_uri), "", [path.name for path in model.iterdir()])
    config = FinetuneConfig(
        model_id=bucket_uri, train_path="rows.jsonl", output_dir=str(tmp_path / "scratch")
    )
    with pytest.raises(ModelError, match=rf"^model {bucket_uri}: has an adapter beside the model"):
        base_checkpoint(EngineSettings("tiny", bucket_uri, config, 1, threads=1))
