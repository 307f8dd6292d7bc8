import copy
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.support.tiny_model import write_data
from training.data.prepare import IGNORED, DataRequest, PreparedData, prepare_data, tokenize
from training.data.rows import Conversation, DataError

LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system role here') }}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
# Only the last answer keeps its reasoning, as in some thinking models.
FORGETFUL = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{{ message['content'] if loop.last else message['content'].split('</think>')[-1] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

ONE_TURN = [("Ada buys 3 apples for $2 each.", "3 * 2 = $6.\n#### 6")]
THREE_TURNS = [("2 + 2?", "4"), ("And 3 more?", "It is 7.\n\nSure."), ("Über 7? 🍎", "  8, naïvely 🍏")]


@pytest.fixture(scope="session")
def chatml(tiny_model: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tiny_model)


def with_template(
    tokenizer: PreTrainedTokenizerFast, template: str, *special: str
) -> PreTrainedTokenizerFast:
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"additional_special_tokens": list(special)})
    changed.chat_template = template
    return changed


def chat(turns: list[tuple[str, str]], *, system: str | None = None) -> Conversation:
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(1, messages=tuple(messages))


def request(path: Path | None = None, **changes: Any) -> DataRequest:
    plain = DataRequest(
        source="s3://data/train.jsonl",
        path=str(path) if path else None,
        columns={},
        task="instruction_tuning",
        context_length=None,
        max_context=None,
        long_rows="truncate",
    )
    return replace(plain, **changes)


def trained_pieces(tokenizer: PreTrainedTokenizerFast, conversation: Conversation) -> list[str]:
    """The text of each run of tokens that the loss looks at."""
    (ids,), (labels,) = tokenize([conversation], tokenizer, request())
    assert len(ids) == len(labels)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    whole = tokenizer.apply_chat_template(list(conversation.messages), tokenize=False)
    assert ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
    pieces: list[list[int]] = [[]]
    for label in labels:
        if label != IGNORED:
            pieces[-1].append(label)
        elif pieces[-1]:
            pieces.append([])
    return [tokenizer.decode(piece) for piece in pieces if piece]


@pytest.mark.parametrize("turns", [ONE_TURN, THREE_TURNS])
@pytest.mark.parametrize("system", [None, "Answer as briefly as you can."])
def test_chatml_trains_the_answers_and_their_end_marker(
    chatml: PreTrainedTokenizerFast, turns: list[tuple[str, str]], system: str | None
):
    pieces = trained_pieces(chatml, chat(turns, system=system))
    assert pieces == [f"{answer}<|im_end|>" for _, answer in turns]


@pytest.mark.parametrize("turns", [ONE_TURN, THREE_TURNS])
@pytest.mark.parametrize("system", [None, "Answer as briefly as you can."])
def test_llama_3_trains_the_answers_and_their_end_marker(
    chatml: PreTrainedTokenizerFast, turns: list[tuple[str, str]], system: str | None
):
    llama_3 = with_template(chatml, LLAMA_3, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    pieces = trained_pieces(llama_3, chat(turns, system=system))
    assert pieces == [f"{answer.strip()}<|eot_id|>" for _, answer in turns]


@pytest.mark.parametrize("turns", [ONE_TURN, THREE_TURNS])
def test_mistral_trains_the_answers_and_their_end_marker(
    chatml: PreTrainedTokenizerFast, turns: list[tuple[str, str]]
):
    mistral = with_template(chatml, MISTRAL, "[INST]", "[/INST]")
    assert trained_pieces(mistral, chat(turns)) == [f" {answer}<|im_end|>" for _, answer in turns]


def test_labels_agree_with_the_mask_of_a_template_that_marks_its_generations(chatml: PreTrainedTokenizerFast):
    marked = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    conversation = chat(THREE_TURNS, system="Be brief.")
    expected = with_template(chatml, marked).apply_chat_template(
        list(conversation.messages), return_dict=True, return_assistant_tokens_mask=True
    )
    (ids,), (labels,) = tokenize([conversation], chatml, request())
    assert ids == expected["input_ids"]
    assert [int(label != IGNORED) for label in labels] == expected["assistant_masks"]


def test_a_template_that_changes_earlier_turns_is_refused(chatml: PreTrainedTokenizerFast):
    forgetful = with_template(chatml, FORGETFUL)
    turns = [("2 + 2?", "<think>easy</think>4"), ("3 + 3?", "<think>easy</think>6")]
    assert trained_pieces(forgetful, chat(turns[:1])) == ["<think>easy</think>4<|im_end|>"]
    with pytest.raises(
        DataError, match=r"s3://data/train.jsonl:1: .* renders message 2 differently .* one assistant turn"
    ):
        tokenize([chat(turns)], forgetful, request())


def test_what_the_template_refuses_is_told_with_its_row(chatml: PreTrainedTokenizerFast):
    with pytest.raises(DataError, match=r"train.jsonl:1: .*refuses the row \(no system role here\)"):
        tokenize([chat(ONE_TURN, system="x")], with_template(chatml, MISTRAL), request())
    with pytest.raises(DataError, match=r"chat template is broken .*line 1 of it"):
        tokenize([chat(ONE_TURN)], with_template(chatml, "{% for %}"), request())


def test_causal_lm_trains_every_token(chatml: PreTrainedTokenizerFast):
    rows = [Conversation(1, text="Once upon a time"), chat(ONE_TURN)]
    ids, labels = tokenize(rows, chatml, request(task="causal_lm"))
    assert labels == ids
    assert chatml.decode(ids[0]) == "Once upon a time<|im_end|>"
    assert chatml.decode(ids[1]) == chatml.apply_chat_template(list(rows[1].messages), tokenize=False)


# --- prepare_data ---


def prepare(data: DataRequest, tokenizer: PreTrainedTokenizerFast, model: Path, cache: Path) -> PreparedData:
    return prepare_data(data, tokenizer, model, cache)


def table(prepared: PreparedData) -> list[dict[str, Any]]:
    with pa.memory_map(str(prepared.arrow_file)) as source:
        return pa.ipc.open_stream(source).read_all().to_pylist()


def write_chats(path: Path, *conversations: Conversation) -> Path:
    path.write_text(
        "".join(json.dumps({"messages": conversation.messages}) + "\n" for conversation in conversations)
    )
    return path


def test_the_file_holds_what_the_summary_says(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    train, _ = write_data(tmp_path)
    prepared = prepare(request(train), chatml, tiny_model, tmp_path / "cache")
    rows, summary = table(prepared), prepared.summary
    assert [row["row"] for row in rows] == list(range(1, 41))
    assert summary.rows == 40
    assert summary.tokens == sum(len(row["input_ids"]) for row in rows) == sum(row["tokens"] for row in rows)
    trained = [sum(label != IGNORED for label in row["labels"]) for row in rows]
    assert [row["trained_tokens"] for row in rows] == trained
    assert summary.trained_tokens == sum(trained)
    assert summary.longest == max(row["tokens"] for row in rows)
    assert (summary.truncated_rows, summary.dropped_rows) == (0, 0)
    first = json.loads(train.read_text().splitlines()[0])["messages"]
    assert "".join(text for text, _ in summary.example) == chatml.apply_chat_template(first, tokenize=False)
    assert [text for text, is_trained in summary.example if is_trained] == [
        f"{first[1]['content']}<|im_end|>"
    ]


@pytest.fixture
def short_and_long(chatml: PreTrainedTokenizerFast, tmp_path: Path) -> tuple[Path, int, int]:
    """(file of a short row, a long answer and a long question; length of the first, of the second)."""
    rows = [chat([("2 + 2?", "4")]), chat([("Count.", "1 2 3 " * 60)]), chat([("1 2 3 " * 60, "So?")])]
    ids, _ = tokenize(rows, chatml, request())
    return write_chats(tmp_path / "rows.jsonl", *rows), len(ids[0]), len(ids[1])


@pytest.mark.parametrize("limit", ["context_length", "max_context"])
def test_long_rows_are_cut_and_counted(
    chatml: PreTrainedTokenizerFast,
    tiny_model: Path,
    tmp_path: Path,
    short_and_long: tuple[Path, int, int],
    limit: str,
):
    path, short, long = short_and_long
    tokens = (short + long) // 2
    prepared = prepare(request(path, **{limit: tokens}), chatml, tiny_model, tmp_path / "cache")
    rows = table(prepared)
    whole = table(prepare(request(path), chatml, tiny_model, tmp_path / "cache"))
    assert [(row["row"], row["tokens"]) for row in rows] == [(1, short), (2, tokens)]
    assert rows[1]["input_ids"] == whole[1]["input_ids"][:tokens]
    assert rows[1]["labels"] == whole[1]["labels"][:tokens]
    # The third row's answer lies behind the cut: nothing of it can be learned.
    assert (prepared.summary.truncated_rows, prepared.summary.dropped_rows) == (2, 1)


def test_long_rows_are_dropped_and_counted(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path, short_and_long: tuple[Path, int, int]
):
    path, short, _ = short_and_long
    data = request(path, context_length=short, long_rows="drop")
    prepared = prepare(data, chatml, tiny_model, tmp_path / "cache")
    assert [row["row"] for row in table(prepared)] == [1]
    assert (prepared.summary.truncated_rows, prepared.summary.dropped_rows) == (0, 2)


def test_long_rows_are_an_error_that_names_them(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path, short_and_long: tuple[Path, int, int]
):
    path, short, long = short_and_long
    data = request(path, context_length=short, long_rows="error")
    with pytest.raises(DataError) as refused:
        prepare(data, chatml, tiny_model, tmp_path / "cache")
    assert f"of its rows 2 exceed {short} tokens" in str(refused.value)
    assert f"s3://data/train.jsonl:2: {long} tokens" in str(refused.value)
    assert "Raise context_length" in str(refused.value)
    assert [found.suffix for found in (tmp_path / "cache" / "prepared").iterdir()] == [".lock"]
    assert (
        prepare(replace(data, context_length=1000), chatml, tiny_model, tmp_path / "cache").summary.rows == 3
    )


def test_nothing_left_to_learn_is_refused(chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path):
    train, _ = write_data(tmp_path)
    with pytest.raises(DataError, match=r"no row has a trained token within 4 tokens \(40 rows dropped\)"):
        prepare(request(train, context_length=4), chatml, tiny_model, tmp_path / "cache")


def test_data_is_prepared_once(chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path):
    train, _ = write_data(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        prepared = list(
            pool.map(lambda _: prepare(request(train), chatml, tiny_model, tmp_path / "cache"), range(4))
        )
    assert all(other == prepared[0] for other in prepared)
    written = prepared[0].arrow_file.stat()
    elsewhere = tmp_path / "copy.jsonl"
    shutil.copy(train, elsewhere)
    again = prepare(
        request(elsewhere, source="/somewhere/else.jsonl"), chatml, tiny_model, tmp_path / "cache"
    )
    assert again == prepared[0]
    assert again.arrow_file.stat() == written
    name = again.arrow_file.parent.name
    left = {found.name for found in (tmp_path / "cache" / "prepared").iterdir()}
    assert left == {name, f"{name}.lock"}


def test_what_decides_the_tokens_decides_the_copy(
    chatml: PreTrainedTokenizerFast, tiny_model: Path, tmp_path: Path
):
    train, _ = write_data(tmp_path)
    other_model = shutil.copytree(tiny_model, tmp_path / "model")
    (other_model / "chat_template.jinja").write_text(MISTRAL)
    changed = tmp_path / "changed.jsonl"
    changed.write_text(train.read_text() + train.read_text().splitlines()[0] + "\n")
    plain = request(train)
    copies = [
        prepare(data, chatml, model, tmp_path / "cache").summary.fingerprint
        for data, model in [
            (plain, tiny_model),
            (plain, other_model),
            (request(changed), tiny_model),
            (replace(plain, context_length=60), tiny_model),
            (replace(plain, context_length=60, long_rows="drop"), tiny_model),
            (replace(plain, task="causal_lm"), tiny_model),
        ]
    ]
    assert len(set(copies)) == len(copies)
