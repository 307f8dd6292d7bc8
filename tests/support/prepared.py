"""Helpers that prepare examples and files as training rows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from training.data.encoding import Encoder
from training.data.prepare import prepare_data
from training.data.prepared import PreparedData
from training.data.records import Example, Pair, Task
from training.data.renderer import Renderer
from training.data.request import DataRequest
from training.data.sources import find_files
from training.data.token_files import RenderedRow, RowTokenizer


def request(*paths: Path | str, **changes: Any) -> DataRequest:
    """Return a request for files, with the defaults of a YAML."""
    defaults = DataRequest(
        paths=tuple(map(str, paths)),
        files=tuple(file for number, path in enumerate(paths) for file in find_files(str(path), number)),
        weights=None,
        task="instruction_tuning",
        data_format="auto",
        columns=(),
        ignore_columns=(),
        prompt_template=None,
        chat_template=None,
        chat_template_kwargs=(),
        turns="auto",
        labels=(),
        unpaired=False,
        context_length=None,
        max_context=None,
        long_rows="truncate",
        bad_rows="error",
        seed=42,
    )
    return replace(defaults, **changes)


def encode(
    tokenizer: PreTrainedTokenizerFast, example: Example, task: Task = "instruction_tuning"
) -> tuple[list[int], ...]:
    """Return the token columns of an example that becomes one row of data.arrow."""
    (row,) = encode_all(tokenizer, example, task)
    return row


def encode_all(
    tokenizer: PreTrainedTokenizerFast, example: Example, task: Task = "instruction_tuning"
) -> list[tuple[list[int], ...]]:
    """Return the token columns of all rows of data.arrow that an example becomes."""
    rendered = Renderer(tokenizer, whole_text=task == "causal_lm").render(example)
    rows = [rendered] if isinstance(example, Pair) else [(sequence,) for sequence in rendered]
    encoder = Encoder(tokenizer, whole_text=task == "causal_lm")
    tokenized = RowTokenizer(request(task=task), encoder).tokenize(
        [RenderedRow(0, 1, row, 0) for row in rows]
    )
    written = tokenized.data.to_pylist()
    return [tuple(ids for name, ids in row.items() if name != "label") for row in written]


def prepare(data: DataRequest, tokenizer: PreTrainedTokenizerFast, model: Path, cache: Path) -> PreparedData:
    """Prepare data on this node, without a bucket."""
    return prepare_data(data, tokenizer, model, cache)


def rows_of(prepared: PreparedData) -> list[dict[str, Any]]:
    """Return every row of an epoch: its tokens and its columns of the index."""
    index = prepared.index
    columns = ("file", "row", "tokens", "trained_tokens", "length")
    return [
        tokens | {name: int(getattr(index, name)[row]) for name in columns}
        for row, tokens in enumerate(prepared.dataset())
    ]
