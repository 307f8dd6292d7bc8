"""Evaluation of a trained model on held-out rows: Ray workers generate answers, which are scored by exact match."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from decimal import Decimal
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

import ray
import ray.exceptions
from pydantic import BaseModel, ConfigDict
from ray.util import ActorPool
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from configs.schema import FinetuneConfig
from runs.layout import evaluation_key, run_of
from training.checkpoints.store import CheckpointError, read_manifest
from training.data.answer_marks import AnswerMarks, find_marks
from training.data.chunks import ChunkResult
from training.data.errors import DataError, RowError
from training.data.flags import flag_of
from training.data.prepared import find_prepared, rows_of_run
from training.data.prompting import encode_prompt, stop_tokens, tokens_left_out
from training.data.records import Chat, Example, Filled, Pair, Task, Text, Tokens
from training.data.renderer import Renderer
from training.data.row_pass import Tally
from training.data.rows import RowSchema, rating_of, read_row, recognise
from training.data.sources import find_files, open_file
from training.data.token_files import digest_of
from training.events import WorkersFailedError
from training.inference.checkpoint_model import TrainedModel
from training.launch.cluster import Workers, cluster, lacking, resources_of_device, vitals
from training.launch.failures import classify_failures, describe_failure
from training.models.attention import rope_limit
from training.models.kernels import Device
from training.models.tokenizer import describe_template
from training.planning.endpoints import ClusterTarget
from training.planning.template_date import read_rows
from utils.storage.bucket import BucketError, open_store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Match = Literal["number", "text"]

_POLL_SECONDS = 1.0
_NUMBER = r"(?:(?<![\w.)])[-\u2212])?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"
_MARKED = re.compile(rf"####\s*({_NUMBER})")


@dataclass(frozen=True)
class EvaluationSettings:
    """The settings of an evaluation, in addition to model and data."""

    match: Match
    columns: Mapping[str, str]
    """Maps our column names to the file's."""
    num_devices: int
    device: Device
    target: ClusterTarget
    batch_size: int
    max_new_tokens: int


@dataclass(frozen=True)
class Question:
    """A row to generate an answer for."""

    location: str
    """FILE:ROW."""
    prompt: str
    tokens: Sequence[int]
    expected: str
    digests: frozenset[int]
    """Digests that the row has in prepared rows: as a chat, and as a response with a label."""


class Answer(BaseModel):
    """A line of evaluations/NAME.jsonl."""

    model_config = ConfigDict(frozen=True)

    row: str
    prompt: str
    """Prompt as the model received it."""
    expected: str
    answer: str
    expected_match: str
    """The expected number or text."""
    answer_match: str | None
    """The number or text in the answer; None if there is none."""
    correct: bool
    trained: bool | None
    """True if the row was in the training data; None if unknown."""


class Evaluation(BaseModel):
    """The result of an evaluation."""

    model_config = ConfigDict(frozen=True)

    run_uri: str
    checkpoint: str
    data: str
    match: Match
    rows: int
    correct: int
    exact_match: float
    """Fraction of correct rows, from 0 to 1."""
    without_answer: int
    """Number of answers that contain nothing to compare."""
    trained_rows: int | None
    """Number of rows that were in the training data; None if unknown."""
    exact_match_of_others: float | None
    """Fraction of correct rows among those not in the training data; None if there are none or this is unknown."""
    answers: str
    """URI of the file with the rows and their answers."""


def evaluate(
    trained: TrainedModel,
    data: str,
    name: str | None,
    settings: EvaluationSettings,
    *,
    progress: Callable[[str, float], None],
) -> Evaluation:
    """Generate and score an answer for every row, and write the answers to the run.

    Args:
        trained: The model to evaluate.
        data: URI of the rows.
        name: Name of the evaluation in the run; None means the file's name and the step.
        settings: Scoring, device and generation settings.
        progress: Called with the current phase and its completed fraction, from 0 to 1.
    """
    tokenizer = trained.tokenizer()
    progress("reading the rows", 0)
    questions = read_questions(data, trained, tokenizer, settings)
    marks = _marks_of(trained.config, tokenizer)
    digests = _trained_digests(trained)
    texts = _answer(questions, trained, settings, progress)
    answers = [
        score(
            question,
            text,
            settings.match,
            marks,
            None if digests is None else not question.digests.isdisjoint(digests),
        )
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
        match=settings.match,
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
    data: str, trained: TrainedModel, tokenizer: "PreTrainedTokenizerFast", settings: EvaluationSettings
) -> list[Question]:
    """Read the rows and render their prompts as in training. Raise an error that lists rows that cannot be evaluated."""
    dated = read_rows(trained.run_uri)
    renderer = Renderer(
        tokenizer,
        whole_text=False,
        turns="last",
        variables=trained.config.chat_template_kwargs,
        today=date.fromisoformat(dated.day) if dated else date.today(),
    )
    marks = find_marks(renderer)
    limit = _max_tokens(trained)
    questions: list[Question] = []
    files, tally = find_files(data, 0), Tally()
    for index, file in enumerate(files):
        result = ChunkResult(index)
        for number, row in open_file(file, trained.cache / "data").rows:
            result.read += 1
            try:
                if isinstance(row, RowError):
                    raise row
                question = _question(
                    f"{file.uri}:{number}", row, trained, tokenizer, renderer, marks, settings
                )
                if limit and len(question.tokens) + settings.max_new_tokens > limit:
                    raise RowError(
                        "too long",
                        f"the prompt has {len(question.tokens):,} tokens, which with --max-new-tokens {settings.max_new_tokens:,} exceeds the "
                        f"model's limit of {limit:,} tokens",
                    )
                questions.append(question)
            except RowError as error:
                result.faults.append((number, error.kind, str(error)))
        tally.add(result)
    if tally.kinds:
        template = describe_template(trained.config, trained.base or trained.config.model_id)
        raise DataError(
            "\n".join([*tally.describe_faults(files, "evaluated", template), "Fix or remove these rows."])
        )
    if not questions:
        raise DataError(f"{data}: contains no rows. Use a file with at least one row.")
    return questions


def _question(
    location: str,
    row: dict[str, Any],
    trained: TrainedModel,
    tokenizer: "PreTrainedTokenizerFast",
    renderer: Renderer,
    marks: AnswerMarks,
    settings: EvaluationSettings,
) -> Question:
    row = {name: value for name, value in row.items() if name not in trained.config.ignore_columns}
    example = read_row(row, _schema_of(row, trained.config, settings.columns))
    if isinstance(example, Chat) and not tokenizer.chat_template:
        raise RowError("template", "conversations need a chat template, but the model has none")
    if isinstance(example, Tokens):
        raise RowError(
            "wrong format",
            "has `input_ids`, but an answer is compared as text. Use rows with a question and an answer",
        )
    expected = _expected(example)
    if _comparable(marks.answer_in(expected), settings.match) is None:
        raise RowError(
            "no number",
            f"the answer contains no number ({expected[:40]!r}); compare complete texts with --match text",
        )
    example = replace(example, untrained=()) if isinstance(example, Chat) else example
    rendered = renderer.render(example)[0]  # of a pair, its chosen answer
    prompt = rendered.text[: rendered.spans[-1][0]]
    return Question(
        location=location,
        prompt=prompt,
        tokens=encode_prompt(tokenizer, prompt, is_rendered=not rendered.ends_the_text),
        expected=expected,
        digests=_digests_of_row(example, renderer),
    )


def _digests_of_row(example: Chat | Text | Filled | Pair, renderer: Renderer) -> frozenset[int]:
    """Return the digests that a row has in prepared rows: a chat with a label ends before what the template writes after its answer."""
    if isinstance(example, Pair):
        example = Chat([*example.prompt, *example.chosen], example.tools, variables=example.variables)
    rendered = renderer.render(example)[-1]
    labelled = replace(rendered, text=rendered.text[: rendered.spans[-1][1]])
    return frozenset(digest_of([each]) for each in (rendered, labelled))


def _schema_of(row: dict[str, Any], config: FinetuneConfig, columns: Mapping[str, str]) -> RowSchema:
    """Return how a row is read: as in training, but a run of preference tuning also answers rows without a rating."""
    task: Task = "classification" if config.task == "classification" else "instruction_tuning"
    labels = tuple(config.classifier_config.label_tokens) if config.classifier_config else ()
    preferred = None if config.data_format == "auto" else config.data_format
    detect = partial(recognise, row, columns, prompt_template=config.prompt_template, preferred=preferred)
    if config.task == "preference_tuning":
        found = detect(task=config.task, unpaired=True)
        if found == "preference" or flag_of(rating_of(row, columns)) is not None:
            return RowSchema(config.task, found, columns, config.prompt_template, labels, unpaired=True)
    found = detect(task=task)
    return RowSchema(task, found, columns, config.prompt_template, labels)


def _expected(example: Example) -> str:
    if isinstance(example, Filled):
        return example.answer
    if isinstance(example, Pair):
        if not example.chosen:
            raise RowError(
                "bad answer", "has a label that says that its answer is bad, so no answer is expected"
            )
        answer = example.chosen[-1]
    else:
        assert isinstance(example, Chat), "other formats do not have exactly one answer"
        answer = example.messages[-1]
    if answer.get("tool_calls"):
        raise RowError(
            "call", "ends with a call, which evaluate cannot compare. End the row with the answer after it"
        )
    return str(answer["content"])


def _max_tokens(trained: TrainedModel) -> int | None:
    """Return the maximum sequence length of the model in tokens, if its configuration has one."""
    from transformers import AutoConfig

    from training.checkpoints.weights import fetch_model
    from training.models.architecture import most_positions
    from training.models.files import is_tokenizer_file

    directory = (
        trained.fetch_base(is_tokenizer_file)
        if trained.base
        else fetch_model(trained.checkpoint, trained.cache, is_tokenizer_file)
    )
    config: Any = AutoConfig.from_pretrained(directory, trust_remote_code=trained.config.trust_remote_code)
    return most_positions(config)


def _trained_digests(trained: TrainedModel) -> set[int] | None:
    """Return the digests of the training rows of the run and its ancestors; None if they are unknown."""
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
        return None  # an ancestor was deleted or is not accessible


def _digests_of(run_uri: str, fingerprint: str, cache: Path) -> set[int] | None:
    """Return the digests of a run's prepared rows; None if the rows were deleted, are preference pairs or were pretokenised."""
    stored = rows_of_run(run_uri, fingerprint)
    if stored is None:
        return None
    key, bucket = stored
    rows = find_prepared(key, cache, bucket)
    assert rows is not None, "the summary was just read"
    has_no_texts = any(source.format in ("preference", "tokens") for source in rows.summary.sources)
    return None if has_no_texts else set(rows.index.digest.tolist())


# --- Answers ------------------------------------------------------------------------------------------------------


class _Worker:
    """A Ray actor with one model on one device."""

    def __init__(self, trained: TrainedModel, settings: EvaluationSettings):
        import torch
        from transformers import GenerationConfig

        if settings.device == "cpu":
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // settings.num_devices))
        self._tokenizer = trained.tokenizer()
        self._model: Any = trained.load(settings.device)
        stops = stop_tokens(self._model.generation_config, self._tokenizer)
        marks = _marks_of(trained.config, self._tokenizer)
        shown = marks.tokens.union(trained.config.new_special_tokens)
        self._left_out = tokens_left_out(self._tokenizer, stops, shown)
        limit = rope_limit(self._model.config)
        self._longest_in_batch = None if limit is None else limit - settings.max_new_tokens
        # Greedy decoding, independent of the model's own settings for sampling and repetition.
        self._model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=stops,
            pad_token_id=self._tokenizer.pad_token_id,
        )

    def answer(
        self, rows: Sequence[int], prompts: Sequence[Sequence[int]]
    ) -> tuple[Sequence[int], list[str]]:
        """Generate answers for a batch; return (the row numbers, their answers).

        Where RoPE would change for all rows of the batch, each is generated alone.
        """
        together = self._longest_in_batch is None or max(map(len, prompts)) <= self._longest_in_batch
        batches = [prompts] if together else [[prompt] for prompt in prompts]
        return rows, [answer for batch in batches for answer in self._generate(batch)]

    def _generate(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Return the answers to prompts that are computed together."""
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
        answers = [
            [token for token in answer if token not in self._left_out]
            for answer in generated[:, width:].tolist()
        ]
        return self._tokenizer.batch_decode(answers)


def _marks_of(config: FinetuneConfig, tokenizer: "PreTrainedTokenizerFast") -> AnswerMarks:
    return find_marks(Renderer(tokenizer, whole_text=False, variables=config.chat_template_kwargs))


def _answer(
    questions: Sequence[Question],
    trained: TrainedModel,
    settings: EvaluationSettings,
    progress: Callable[[str, float], None],
) -> list[str]:
    # Sort by length, so that batches need little padding and the slowest batches run first.
    order = sorted(range(len(questions)), key=lambda row: -len(questions[row].tokens))
    batches = [
        order[begin : begin + settings.batch_size] for begin in range(0, len(order), settings.batch_size)
    ]
    each = resources_of_device(settings.device)
    answers: dict[int, str] = {}
    workers = Workers(settings.num_devices, settings.num_devices, settings.device, each, trained.run_uri)
    progress("starting the workers", 0)
    with cluster(workers, settings.target, progress=lambda text: progress(text, 0)):
        try:
            pool = _start_workers(trained, settings, workers, progress, count=len(batches))
            for rows in batches:
                pool.submit(_answer_rows, (rows, [questions[row].tokens for row in rows]))
            for rows, texts in _results(pool):
                answers.update(zip(rows, texts, strict=True))
                progress("generating", len(answers) / len(questions))
        except ray.exceptions.RayError as error:
            vitals().raise_if_lost()
            raise WorkersFailedError(describe_failure(classify_failures(error), [])) from error
    return [answers[row] for row in range(len(questions))]


def _start_workers(
    trained: TrainedModel,
    settings: EvaluationSettings,
    workers: Workers,
    progress: Callable[[str, float], None],
    count: int,
) -> ActorPool:
    """Reserve the workers' resources, report what is missing meanwhile, and start at most `count` workers."""
    group = placement_group([workers.each] * min(workers.count, count))
    since, reserved = "", group.ready()
    while not ray.wait([reserved], timeout=_POLL_SECONDS)[0]:
        if vitals().is_answering and (waits_for := lacking(workers)):
            since = since or f"{datetime.now():%H:%M:%S}"
            progress(f"{waits_for}, since {since}", 0)
    progress("starting the workers", 0)
    actor: Any = ray.remote(_Worker).options(
        num_cpus=workers.each["CPU"],
        num_gpus=workers.each.get("GPU", 0),
        scheduling_strategy=PlacementGroupSchedulingStrategy(group),
    )
    return ActorPool([actor.remote(trained, settings) for _ in group.bundle_specs])


def _answer_rows(worker: Any, batch: tuple[list[int], list[Sequence[int]]]) -> Any:
    return worker.answer.remote(*batch)


def _results(pool: ActorPool) -> Iterator[Any]:
    """Yield the results of a pool, in any order."""
    while pool.has_next():
        yield pool.get_next_unordered()


# --- Scores -------------------------------------------------------------------------------------------------------


def final_number(text: str) -> str | None:
    """Return the number after the first `####` (GSM8K's marker), else the last number in the text; None if there is none.

    Thousands separators, currency signs and trailing zeros are removed, so that equal numbers are equal texts.
    """
    marked = _MARKED.search(text)
    numbers = [marked[1]] if marked else re.findall(_NUMBER, text)
    if not numbers:
        return None
    number = Decimal(numbers[-1].replace("\u2212", "-").replace("$", "").replace(",", ""))
    plain = f"{number:f}"
    plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
    return "0" if Decimal(plain) == 0 else plain


def _comparable(text: str, match: Match) -> str | None:
    return final_number(text) if match == "number" else text.strip()


def score(
    question: Question, text: str, match: Match, marks: AnswerMarks, was_trained: bool | None
) -> Answer:
    """Compare a generated answer with the expected one, both without their reasoning."""
    expected = _comparable(marks.answer_in(question.expected), match)
    found = _comparable(marks.answer_in(text, question.prompt), match)
    assert expected is not None
    return Answer(
        row=question.location,
        prompt=question.prompt,
        expected=question.expected,
        answer=text,
        expected_match=expected,
        answer_match=found or None,
        correct=found == expected,
        trained=was_trained,
    )
