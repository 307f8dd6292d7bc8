"""Evaluation of a trained model on a held-out set: Ray workers generate answers, which are scored against the rows' own."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

import ray
import ray.exceptions
from pydantic import BaseModel, ConfigDict
from ray.util import ActorPool

from runs.layout import evaluation_key, run_of
from training.checkpoints.store import CheckpointError, read_manifest
from training.data.errors import DataError, RowError
from training.data.prepared import PREPARED, SUMMARY_FILE, find_prepared
from training.data.records import Chat, Example, Filled
from training.data.rows import RowSchema, read_row, recognise
from training.data.sources import find_files, open_file
from training.data.templates import Renderer
from training.data.token_files import digest_of
from training.events import WorkersFailedError
from training.inference.checkpoint_model import TrainedModel
from training.inference.prompting import encode_prompt, stop_tokens
from training.launch.cluster import Workers, cluster, resources_of_device
from training.launch.failures import causes_of, classify
from training.models.kernels import Device
from training.planning.endpoints import ClusterTarget
from utils.storage.bucket import BucketError, join_uri, open_store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Match = Literal["number", "text"]

_MAX_SHOWN = 5
_NUMBER = r"(?:(?<![\w.)])[-\u2212])?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"
_MARKED = re.compile(rf"####\s*({_NUMBER})")


@dataclass(frozen=True)
class EvaluationSettings:
    """What is asked for beside the model and the data."""

    match: Match
    columns: Mapping[str, str]
    """Our name of a column -> the file's."""
    num_devices: int
    device: Device
    target: ClusterTarget
    batch_size: int
    max_new_tokens: int


@dataclass(frozen=True)
class Question:
    """A row to answer."""

    place: str
    """FILE:ROW."""
    prompt: str
    tokens: Sequence[int]
    expected: str
    digest: int
    """As of prepared rows."""


class Answer(BaseModel):
    """A line of evaluations/NAME.jsonl."""

    model_config = ConfigDict(frozen=True)

    row: str
    prompt: str
    """As the model read it."""
    expected: str
    answer: str
    expected_match: str
    """The number, or the text, that was looked for."""
    answer_match: str | None
    """What was found instead; None: no number at all."""
    correct: bool
    trained: bool | None
    """Whether the row is one that was trained on; None where that cannot be told."""


class Evaluation(BaseModel):
    """What came out."""

    model_config = ConfigDict(frozen=True)

    run_uri: str
    checkpoint: str
    data: str
    match: Match
    rows: int
    correct: int
    exact_match: float
    """The share of rows that are correct, 0 to 1."""
    without_answer: int
    """Answers in which there is nothing to compare."""
    trained_rows: int | None
    """Rows that were trained on; None where that cannot be told."""
    exact_match_of_others: float | None
    """The share among the rows that were not; None where there are none, or that cannot be told."""
    answers: str
    """URI of the rows with their answers."""


def evaluate(
    trained: TrainedModel,
    data: str,
    name: str | None,
    how: EvaluationSettings,
    *,
    progress: Callable[[str, float], None],
) -> Evaluation:
    """Answer and score every row, and write them to the run.

    Args:
        trained: What answers.
        data: URI of the rows.
        name: Of the evaluation in the run; None: that of the file and the step.
        how: What is asked for.
        progress: Called with the current activity and its completed share, 0 to 1.

    Raises:
        DataError: rows that cannot be answered or compared.
        ClusterError: there are too few devices.
        WorkersFailedError: the workers failed.
        ModelError, CheckpointError, BucketError: the model or the rows cannot be read, or the run not written to.
    """
    tokenizer = trained.tokenizer()
    progress("reading the rows", 0)
    questions = read_questions(data, trained, tokenizer, how)
    digests = _trained_digests(trained)
    texts = _answer(questions, trained, how, progress)
    answers = [
        _score(question, text, how.match, None if digests is None else question.digest in digests)
        for question, text in zip(questions, texts, strict=True)
    ]
    file = re.sub(r"[^\w-]+", "-", PurePosixPath(data).name.partition(".")[0])
    key = evaluation_key(name or f"{file}-step-{trained.manifest.step:06d}")
    run = open_store(trained.run_uri)
    run.write(key, "".join(answer.model_dump_json() + "\n" for answer in answers).encode())
    others = [answer.correct for answer in answers if answer.trained is False]
    correct = sum(answer.correct for answer in answers)
    return Evaluation(
        run_uri=trained.run_uri,
        checkpoint=trained.checkpoint,
        data=data,
        match=how.match,
        rows=len(answers),
        correct=correct,
        exact_match=correct / len(answers),
        without_answer=sum(answer.answer_match is None for answer in answers),
        trained_rows=None if digests is None else sum(bool(answer.trained) for answer in answers),
        exact_match_of_others=sum(others) / len(others) if others else None,
        answers=run.uri_of(key),
    )


# --- Rows ---------------------------------------------------------------------------------------------------------


def read_questions(
    data: str, trained: TrainedModel, tokenizer: "PreTrainedTokenizerFast", how: EvaluationSettings
) -> list[Question]:
    """The rows as the model was trained to read them, up to where it answers.

    Raises:
        DataError: some have no answer to compare with, or are too long; the message names the first.
        BucketError: they cannot be read.
    """
    renderer = Renderer(tokenizer, whole_text=False)
    limit = _longest(trained)
    questions: list[Question] = []
    faults: list[str] = []
    for place, row in _rows(data, trained):
        try:
            if isinstance(row, RowError):
                raise row
            question = _question(place, row, trained, tokenizer, renderer, how)
            if limit and len(question.tokens) + how.max_new_tokens > limit:
                raise RowError(
                    "too long",
                    f"has {len(question.tokens):,} tokens before its answer, and with --max-new-tokens {how.max_new_tokens:,} that is more "
                    f"than the {limit:,} that the model takes",
                )
            questions.append(question)
        except RowError as error:
            faults.append(f"{place}: {error}")
    if faults:
        more = f"\n… and {len(faults) - _MAX_SHOWN:,} more rows" if len(faults) > _MAX_SHOWN else ""
        raise DataError(
            f"{len(faults):,} of {len(faults) + len(questions):,} rows cannot be evaluated:\n"
            + "\n".join(faults[:_MAX_SHOWN])
            + f"{more}\nFix or remove these rows."
        )
    if not questions:
        raise DataError(f"{data}: holds no rows. Name a file with at least one.")
    return questions


def _rows(data: str, trained: TrainedModel) -> Iterator[tuple[str, Any]]:
    for file in find_files(data, 0):
        for number, row in open_file(file, trained.cache / "data").rows:
            yield f"{file.uri}:{number}", row


def _question(
    place: str,
    row: dict[str, Any],
    trained: TrainedModel,
    tokenizer: "PreTrainedTokenizerFast",
    renderer: Renderer,
    how: EvaluationSettings,
) -> Question:
    config = trained.config
    task = "classification" if config.task == "classification" else "instruction_tuning"
    labels = tuple(config.classifier_config.label_tokens) if config.classifier_config else ()
    data_format = recognise(row, how.columns, task, config.prompt_template)
    example = read_row(row, RowSchema(task, data_format, how.columns, config.prompt_template, labels))
    if isinstance(example, Chat) and not tokenizer.chat_template:
        raise RowError("template", "is a chat, and the model has no chat template to lay it out")
    expected = _expected(example)
    if _looked_for(expected, how.match) is None:
        raise RowError(
            "no number",
            f"has an answer without a number ({expected[:40]!r}). Compare whole texts: --match text",
        )
    (rendered,) = renderer.render(replace(example, untrained=()) if isinstance(example, Chat) else example)
    prompt = rendered.text[: rendered.spans[-1][0]]
    return Question(
        place=place,
        prompt=prompt,
        tokens=encode_prompt(tokenizer, prompt, is_laid_out=not rendered.ends_the_text),
        expected=expected,
        digest=digest_of((rendered,)),
    )


def _expected(example: Example) -> str:
    if isinstance(example, Filled):
        return example.answer
    assert isinstance(example, Chat), "no other format has one answer"
    return str(example.messages[-1]["content"])


def _longest(trained: TrainedModel) -> int | None:
    """Tokens that the model's positions reach."""
    from transformers import AutoConfig

    from training.checkpoints.weights import fetch_model
    from training.models.files import is_tokenizer_file

    directory = fetch_model(trained.base or trained.checkpoint, trained.cache, is_tokenizer_file)
    config: Any = AutoConfig.from_pretrained(directory, trust_remote_code=trained.config.trust_remote_code)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _trained_digests(trained: TrainedModel) -> set[int] | None:
    """Of the rows that the run, and those whose weights it started from, were trained on; None where they cannot be known."""
    found = set[int]()
    checkpoint, manifest = trained.checkpoint, trained.manifest
    try:
        while True:
            digests = _digests_of(run_of(checkpoint), manifest.data.train, trained.cache)
            if digests is None:
                return None
            found |= digests
            if manifest.parent is None or not run_of(manifest.parent):
                return found
            checkpoint = manifest.parent
            manifest = read_manifest(checkpoint)
    except (CheckpointError, BucketError):
        return None  # a run that this one started from was removed, or is out of reach


def _digests_of(run_uri: str, fingerprint: str, cache: Path) -> set[int] | None:
    """Of the prepared rows beside a run; None where they were removed, or are pairs, which are no row with one answer."""
    prepared = join_uri(run_uri.rpartition("/")[0], PREPARED)
    store = open_store(prepared)
    for key in store.directories():
        summary = store.read_if_exists(f"{key}/{SUMMARY_FILE}")
        if summary and json.loads(summary)["fingerprint"] == fingerprint:
            rows = find_prepared(key, cache, prepared)
            assert rows is not None, "its summary was just read"
            is_of_pairs = any(source.format == "preference" for source in rows.summary.sources)
            return None if is_of_pairs else set(rows.index.digest.tolist())
    return None


# --- Answers ------------------------------------------------------------------------------------------------------


class _Worker:
    """One model on one device."""

    def __init__(self, trained: TrainedModel, how: EvaluationSettings):
        import torch
        from transformers import GenerationConfig

        if how.device == "cpu":
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // how.num_devices))
        self._tokenizer = trained.tokenizer()
        self._model: Any = trained.load(how.device)
        # Greedy: whatever the model's own settings say of sampling and of repetitions.
        self._model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=how.max_new_tokens,
            eos_token_id=stop_tokens(self._model, self._tokenizer),
            pad_token_id=self._tokenizer.pad_token_id,
        )

    def answer(
        self, rows: Sequence[int], prompts: Sequence[Sequence[int]]
    ) -> tuple[Sequence[int], list[str]]:
        """(the rows' numbers as given, their answers)."""
        import torch

        width = max(map(len, prompts))
        tokens = torch.full((len(prompts), width), int(self._tokenizer.pad_token_id))  # pyright: ignore[reportArgumentType]
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        device = self._model.device
        with torch.inference_mode():
            generated = self._model.generate(input_ids=tokens.to(device), attention_mask=mask.to(device))
        return rows, self._tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)


def _answer(
    questions: Sequence[Question],
    trained: TrainedModel,
    how: EvaluationSettings,
    progress: Callable[[str, float], None],
) -> list[str]:
    # Prompts of about one length together: little is padded, and the slowest batches come first.
    order = sorted(range(len(questions)), key=lambda row: -len(questions[row].tokens))
    batches = [order[begin : begin + how.batch_size] for begin in range(0, len(order), how.batch_size)]
    each = resources_of_device(how.device)
    answers: dict[int, str] = {}
    workers = Workers(how.num_devices, how.num_devices, how.device, each, trained.run_uri)
    progress("starting the workers", 0)
    with cluster(workers, how.target, progress=lambda text: progress(text, 0)):
        actor: Any = ray.remote(_Worker).options(num_cpus=each["CPU"], num_gpus=each.get("GPU", 0))
        pool = ActorPool([actor.remote(trained, how) for _ in range(min(how.num_devices, len(batches)))])
        try:
            for rows, texts in pool.map_unordered(
                lambda worker, rows: worker.answer.remote(rows, [questions[row].tokens for row in rows]),
                batches,
            ):
                answers.update(zip(rows, texts, strict=True))
                progress("generating", len(answers) / len(questions))
        except ray.exceptions.RayError as error:
            raise WorkersFailedError(classify(causes_of(error), [])) from error
    return [answers[row] for row in range(len(questions))]


# --- Scores -------------------------------------------------------------------------------------------------------


def final_number(text: str) -> str | None:
    """The number behind the first `####`, as GSM8K marks its answers; else the last number there is.

    Without thousands separators, currency signs and trailing zeros, so that equal numbers are equal texts; None where there is none.
    """
    marked = _MARKED.search(text)
    numbers = [marked[1]] if marked else re.findall(_NUMBER, text)
    if not numbers:
        return None
    number = Decimal(numbers[-1].replace("\u2212", "-").replace("$", "").replace(",", ""))
    plain = f"{number:f}"
    plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
    return "0" if Decimal(plain) == 0 else plain


def _looked_for(text: str, match: Match) -> str | None:
    return final_number(text) if match == "number" else text.strip()


def _score(question: Question, text: str, match: Match, was_trained: bool | None) -> Answer:
    expected, found = _looked_for(question.expected, match), _looked_for(text, match)
    assert expected is not None
    return Answer(
        row=question.place,
        prompt=question.prompt,
        expected=question.expected,
        answer=text,
        expected_match=expected,
        answer_match=found or None,
        correct=found == expected,
        trained=was_trained,
    )
