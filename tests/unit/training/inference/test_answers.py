"""Tests of the answers of `main.py evaluate`."""

import pytest

from configs.schema import FinetuneConfig
from runs.layout import checkpoint_uri
from tests.support.tiny_model import make_longrope_model
from tests.support.trained_runs import STEP, store_full_run
from training.checkpoints.store import read_manifest
from training.inference.checkpoint_model import TrainedModel
from training.inference.evaluate import EvaluationSettings, _Worker
from training.planning.endpoints import ClusterTarget
from utils.storage.bucket import open_store

LIMIT, NEW_TOKENS = 16, 6


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> _Worker:
    """Return a worker with a model whose RoPE changes above LIMIT tokens."""
    directory = tmp_path_factory.mktemp("longrope")
    model = make_longrope_model(directory / "model", LIMIT)
    run = store_full_run(open_store(str(directory)), "run", model)
    checkpoint = checkpoint_uri(run, STEP)
    config = FinetuneConfig(model_id=str(model), train_path="rows.jsonl", dtype="fp32", device="cpu")
    trained = TrainedModel(checkpoint, read_manifest(checkpoint), config, None, None, directory / "cache")
    settings = EvaluationSettings("text", {}, 1, "cpu", ClusterTarget(None), 4, NEW_TOKENS)
    return _Worker(trained, settings)


@pytest.mark.parametrize("lengths", [(8, 20, 5), (LIMIT - 2, 6, 3)], ids=["prompt", "answer"])
def test_answers_do_not_depend_on_rows_above_the_rope_limit(worker: _Worker, lengths: tuple[int, ...]):
    prompts = [[(7 * place + length) % 90 + 5 for place in range(length)] for length in lengths]
    alone = [worker.answer([0], [prompt])[1][0] for prompt in prompts]
    assert worker.answer(range(len(prompts)), prompts) == (range(len(prompts)), alone)


def test_rows_below_the_rope_limit_are_generated_together(worker: _Worker, monkeypatch: pytest.MonkeyPatch):
    sizes, generate = [], worker._model.generate

    def count(**inputs: object) -> object:
        sizes.append(len(inputs["input_ids"]))  # type: ignore[arg-type]
        return generate(**inputs)

    monkeypatch.setattr(worker._model, "generate", count)
    worker.answer([0, 1], [[5] * (LIMIT - NEW_TOKENS), [6] * 3])
    worker.answer([0, 1], [[5] * (LIMIT - NEW_TOKENS + 1), [6] * 3])
    assert sizes == [2, 1, 1]
