"""Samples of validation prompts: their choice, and generation that leaves training as it was."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerControl, TrainerState, set_seed

from runs.layout import EvalSample
from tests.support import varlen_on_cpu  # noqa: F401  # registers the kernels
from tests.support.prepared import prepare, request
from tests.support.tiny_model import write_data
from training.loop.samples import Prompt, Sampling, choose_prompts, split_row
from training.models.varlen_attention import NAME as VARLEN
from training.world import World

ALONE = World(0, 0, 1, 1, 0)
ARGUMENTS: Any = SimpleNamespace(use_cpu=True, device=torch.device("cpu"))
PROMPTS = [Prompt(f"valid.jsonl:{row}", [5, 6, 7 + row], [9, 10]) for row in range(3)]


def sampling(model: Path, written: list[str], prompts: list[Prompt] = PROMPTS, **changes: Any) -> Sampling:
    arguments: dict[str, Any] = {
        "max_new_tokens": 5,
        "world": ALONE,
        "autocast": nullcontext,
        "is_sharded": False,
        "write": lambda step, text: written.append(text),
        "on_progress": lambda _: None,
    }
    return Sampling(prompts, AutoTokenizer.from_pretrained(model), **arguments | changes)


def load(model: Path, **arguments: Any) -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attention_dropout=0.1, **arguments
    )
    loaded.config.use_cache = False
    return loaded


def test_prompts_are_rendered_as_in_training_and_chosen_by_seed(tiny_model: Path, tmp_path: Path):
    _, valid = write_data(tmp_path, train_rows=2, valid_rows=11)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = prepare(request(valid), tokenizer, tiny_model, tmp_path / "cache")
    chosen = choose_prompts(rows, 3, seed=1, most_tokens=None)
    assert choose_prompts(rows, 3, seed=1, most_tokens=None) == chosen
    assert choose_prompts(rows, 3, seed=2, most_tokens=None) != chosen
    assert len(choose_prompts(rows, 100, seed=1, most_tokens=None)) == 11
    lines = [json.loads(line)["messages"] for line in valid.read_text().splitlines()]
    for prompt in chosen:
        messages = lines[int(prompt.row.rpartition(":")[2]) - 1]
        asked = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(prompt.tokens) == asked
        assert messages[-1]["content"] in tokenizer.decode(prompt.reference)
    shortest = min(len(prompt.tokens) for prompt in choose_prompts(rows, 100, seed=1, most_tokens=None))
    assert choose_prompts(rows, 3, seed=1, most_tokens=shortest) == []


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, -100, 4, 5]}, ([1, 2, 3], [4, 5])),
        ({"input_ids": [1, 2, 3], "labels": [-100, 2, -100]}, ([1], [2])),
        ({"input_ids": [1, 2], "labels": [1, 2]}, ([], [1, 2])),
        ({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}, ([1], [2])),
    ],
)
def test_a_row_is_cut_before_its_last_answer(row: dict[str, list[int]], parts: tuple[list[int], list[int]]):
    assert split_row(row) == parts


@pytest.mark.parametrize("with_adapter", [True, False])
def test_sampling_does_not_change_training(with_adapter: bool, tiny_model: Path):
    trained = []
    for samples in (False, True):
        set_seed(3)
        model = load(tiny_model)
        if with_adapter:
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2))
        model.train()
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], 1e-2)
        written: list[str] = []
        for step in range(3):
            if samples:
                sampling(tiny_model, written).on_evaluate(
                    ARGUMENTS, TrainerState(global_step=step), TrainerControl(), model=model
                )
            tokens = torch.arange(20)[None] + step
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert len(written) == 3 * samples
        assert all(module.training for module in model.modules())
        assert not model.config.use_cache
        trained.append([parameter.detach() for parameter in model.parameters()])
    assert all(map(torch.equal, *trained))


def test_answers_are_those_of_greedy_generation(tiny_model: Path):
    model, written = load(tiny_model), []
    sampling(tiny_model, written).on_evaluate(
        ARGUMENTS, TrainerState(global_step=40), TrainerControl(), model=model
    )
    samples = [EvalSample.model_validate_json(line) for line in written[0].splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        tokens = torch.tensor([prompt.tokens])
        for _ in range(5):
            tokens = torch.cat([tokens, model.eval()(tokens).logits[:, -1:].argmax(-1)], 1)
        assert (sample.step, sample.row, sample.tokens, sample.ended) == (40, prompt.row, 5, False)
        assert sample.completion == tokenizer.decode(tokens[0, 3:])
        assert sample.reference == tokenizer.decode([9, 10])


def test_every_rank_of_sharded_weights_runs_the_same_number_of_prompts(tiny_model: Path):
    for ranks in (1, 2, 4, 5):
        shares = [
            sampling(tiny_model, [], world=World(rank, rank, ranks, ranks, 0), is_sharded=True)._mine()
            for rank in range(ranks)
        ]
        assert len({len(share) for share in shares}) == 1
        assert {index for share in shares for index in share} == {0, 1, 2}


def test_attention_for_packed_rows_is_replaced_during_generation(tiny_model: Path):
    """Its kernels take no KV cache."""
    plain, packed = load(tiny_model), load(tiny_model, attn_implementation=VARLEN)
    texts: list[str] = []
    for model in (plain, packed):
        sampling(tiny_model, texts).on_evaluate(ARGUMENTS, TrainerState(), TrainerControl(), model=model)
    assert texts[0] == texts[1]
    assert packed.config._attn_implementation == VARLEN


def test_long_texts_are_cut(tiny_model: Path):
    written: list[str] = []
    prompts = [Prompt("valid.jsonl:1", [400] * 500, [401] * 3000)]
    sampling(tiny_model, written, prompts, max_new_tokens=64).on_evaluate(
        ARGUMENTS, TrainerState(), TrainerControl(), model=load(tiny_model)
    )
    sample = EvalSample.model_validate_json(written[0])
    assert sample.prompt.startswith("…") or len(sample.prompt) <= 2000
    assert len(sample.reference) == 2001
    assert sample.reference.endswith("…")
    assert sample.tokens == 12, "the model has 512 positions"
