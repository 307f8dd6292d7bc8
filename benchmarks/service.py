"""Measure chat with the transformers engine on CPU: `make bench-service` prints four figures.

- Tokens/s of one stream against plain `generate`: same model, prompt and greedy tokens, in one process.
- Tokens/s of eight streams at once against one stream.
- Its limit: eight times the time of a forward pass of one token, divided by that of eight rows of one token, in plain
  transformers.
- Time to the first token of an adapter that is not loaded, minus that of a loaded one.

Each round measures all of them one after the other, in rotating order; ratios are taken within a round. HTTP and Ray Serve are
not part of the figures.
"""

import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from benchmarks.report import rounds_parser, spread, write_report
from configs.schema import FinetuneConfig
from cookbooks.quickstart import prepare
from runs.layout import checkpoint_uri
from service.engine import Accepted, ChatRequest, Delta, EngineSettings, Sampling
from service.models import ServedModel
from service.transformers_engine import TransformersEngine
from tests.support.trained_runs import STEP, store_adapter_run
from utils.storage.bucket import open_store, sync_to_node
from utils.storage.embedded_bucket import embedded_bucket

TOKENS, STREAMS = 32, 8
QUESTIONS = [
    f"Write a long story about {hero}."
    for hero in ("a fox", "two sailors", "a clock", "a baker", "the moon", "a train", "an old map", "a river")
]


def main() -> None:
    rounds = rounds_parser(__doc__).parse_args().rounds
    prepare.main()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        with embedded_bucket():
            model = sync_to_node(f"{prepare.HOME}/smollm2-135m", directory / "model")
        measured = asyncio.run(measure(directory, model, rounds))
    summary = {
        "one_stream_ratio": spread([r["one_stream"] / r["generate"] for r in measured]),
        "eight_streams_ratio": spread([r["eight_streams"] / r["one_stream"] for r in measured]),
        "eight_rows_ratio": spread([STREAMS * r["forward_of_one"] / r["forward_of_eight"] for r in measured]),
        "cold_adapter_seconds": spread([r["cold_adapter"] - r["warm_adapter"] for r in measured]),
    }
    write_report("service", summary, measured)


async def measure(directory: Path, model: Path, rounds: int) -> list[dict[str, Any]]:
    """Return the rounds: tokens/s, and seconds to the first token of an adapter."""
    plain: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    adapters = store_adapters(directory, model, rounds + 1)
    config = FinetuneConfig(
        model_id=str(model),
        train_path="rows.jsonl",
        dtype="fp32",
        device="cpu",
        storage_path=str(directory),
        output_dir=str(directory / "scratch"),
    )
    engine = TransformersEngine(
        EngineSettings("smollm2-135m", str(model), config, max_adapters=2, threads=None)
    )
    warm, *cold = adapters

    figures: dict[str, Callable[[], Awaitable[float]]] = {
        "generate": lambda: asyncio.to_thread(generate_speed, plain, tokenizer),
        "one_stream": lambda: speed(engine, 1),
        "forward_of_one": lambda: asyncio.to_thread(forward_seconds, plain, 1),
        "forward_of_eight": lambda: asyncio.to_thread(forward_seconds, plain, STREAMS),
        "eight_streams": lambda: speed(engine, STREAMS),
        "warm_adapter": lambda: first_token(engine, warm),
        "cold_adapter": lambda: first_token(engine, cold.pop()),
    }
    for name in ("generate", "one_stream", "warm_adapter"):
        await figures[name]()
    names = list(figures)
    measured: list[dict[str, Any]] = []
    for number in range(rounds):
        begin = number % len(names)
        await figures["warm_adapter"]()  # so that the other adapter leaves for the cold one
        measured.append({name: await figures[name]() for name in names[begin:] + names[:begin]})
        print(json.dumps(measured[-1]), flush=True)
    engine.close()
    return measured


def store_adapters(directory: Path, model: Path, count: int) -> list[str]:
    """Store adapters of rank 8 with random weights; return their checkpoints' URIs."""
    storage = open_store(str(directory / "runs"))
    lora = {"r": 8, "target_modules": "all-linear"}
    runs = [
        store_adapter_run(storage, f"run-{number}", model, lora, storage_path=str(directory))
        for number in range(count)
    ]
    return [checkpoint_uri(run, STEP) for run in runs]


def generate_speed(model: Any, tokenizer: Any) -> float:
    """Return the tokens/s of `generate` for the first question."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTIONS[0]}], tokenize=False, add_generation_prompt=True
    )
    tokens = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    start = time.perf_counter()
    with torch.inference_mode():
        generated = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=TOKENS,
            pad_token_id=tokenizer.pad_token_id,
        )
    return (generated.shape[1] - tokens.shape[1]) / (time.perf_counter() - start)


def forward_seconds(model: Any, rows: int) -> float:
    """Return the median seconds of a forward pass of one token for each row, after 50 tokens."""
    cache = DynamicCache(config=model.config)
    seconds = []
    with torch.inference_mode():
        model(input_ids=torch.ones(rows, 50, dtype=torch.long), past_key_values=cache, logits_to_keep=1)
        for _ in range(9):
            start = time.perf_counter()
            model(input_ids=torch.ones(rows, 1, dtype=torch.long), past_key_values=cache)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


async def speed(engine: TransformersEngine, streams: int) -> float:
    """Return the tokens/s of streams that are asked for at once."""
    start = time.perf_counter()
    counts = await asyncio.gather(*(count_tokens(engine, question) for question in QUESTIONS[:streams]))
    return sum(counts) / (time.perf_counter() - start)


async def count_tokens(engine: TransformersEngine, question: str) -> int:
    """Stream an answer; return its number of tokens."""
    events = [event async for event in engine.chat(request(None, question))]
    last = events[-1]
    assert isinstance(last, Delta), last
    return last.completion_tokens


async def first_token(engine: TransformersEngine, checkpoint: str) -> float:
    """Return the seconds until the first text of an adapter's answer."""
    start = time.perf_counter()
    seconds = 0.0
    async for event in engine.chat(request(checkpoint, QUESTIONS[0], max_tokens=4)):
        assert isinstance(event, Accepted | Delta), event
        if isinstance(event, Delta) and not seconds:
            seconds = time.perf_counter() - start
    return seconds


def request(checkpoint: str | None, question: str, max_tokens: int = TOKENS) -> ChatRequest:
    """Return a greedy request."""
    model = ServedModel("model", "smollm2-135m", checkpoint)
    sampling = Sampling(max_tokens=max_tokens, temperature=0)
    return ChatRequest(model, [{"role": "user", "content": question}], None, {}, sampling)


if __name__ == "__main__":
    main()
