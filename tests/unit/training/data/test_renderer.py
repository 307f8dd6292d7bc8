"""Loss tokens decode to the assistant turns and end markers that each chat template renders."""

import copy
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from configs.prompt_format import to_chat_template
from tests.support.prepared import encode, encode_all
from training.data import renderer as rendering
from training.data.errors import DataError, RowError
from training.data.records import Chat, Filled, Message, Pair, Task, Text
from training.data.renderer import Renderer
from training.data.row_index import IGNORED

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
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
# Tools in the first turn, calls as JSON between tags, tool results as user turns; reasoning only after the last question.
QWEN = (
    "{% if tools %}{{ '<|im_start|>system\\n' + (messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '') }}"
    "{{ '# Tools\\n' }}{% for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% elif messages[0]['role'] == 'system' %}{{ '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|im_start|>user\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% elif message['role'] == 'tool' %}{{ '<|im_start|>user\\n<tool_response>\\n' + message['content'] + '\\n</tool_response><|im_end|>\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{% if loop.last and not message['tool_calls'] %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '<tool_call>\\n' + call['function'] | tojson + '\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Only the last answer retains its reasoning, as in some reasoning models.
LAST_REASONING_ONLY = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{{ message['content'] if loop.last else message['content'].split('</think>')[-1] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

# Functions, filters, statements and special tokens that transformers provides to a template in addition to the row.
ALL_TEMPLATE_FEATURES = (
    "{{ bos_token }}{{ strftime_now('%Y') }}{{ 'no tools' if tools is none }}{{ 'no documents' if documents is none }}"
    "{{ 'no names' if xyz is not defined }}{% set count = namespace(turns=0) %}{% for message in messages %}"
    "{% if message['role'] == 'narrator' %}{% continue %}{% endif %}{% set count.turns = count.turns + 1 %}"
    "{{ count.turns }} {{ message | tojson }}{% generation %}{{ message['content'] }}{% endgeneration %}{{ eos_token }}"
    "{% endfor %}{{ range(2) | list }}"
)

ANSWER_4, ANSWER_5 = ({"role": "assistant", "content": text} for text in ("4", "5"))
ONE_TURN = [("Ada buys 3 apples for $2 each.", "3 * 2 = $6.\n#### 6")]
THREE_TURNS = [("2 + 2?", "4"), ("And 3 more?", "It is 7.\n\nSure."), ("Über 7? 🍎", "  8, naïvely 🍏")]


Turns = list[tuple[str, str]]


def with_template(
    tokenizer: PreTrainedTokenizerFast, template: str, *special: str
) -> PreTrainedTokenizerFast:
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"additional_special_tokens": list(special)})
    changed.chat_template = template
    return changed


@pytest.fixture(scope="session")
def styles(chatml: PreTrainedTokenizerFast) -> dict[str, PreTrainedTokenizerFast]:
    return {
        "chatml": chatml,
        "smollm2": with_template(chatml, SMOLLM2),
        "llama_3": with_template(chatml, LLAMA_3, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "qwen": with_template(chatml, QWEN),
        "mistral": with_template(chatml, MISTRAL, "[INST]", "[/INST]"),
    }


def expected_answers(style: str, answers: list[str]) -> list[str]:
    """Return the assistant turns as the template renders them, with their end marker."""
    match style:
        case "llama_3":
            return [f"{answer.strip()}<|eot_id|>" for answer in answers]
        case "mistral":
            return [f" {answer}<|im_end|>" for answer in answers]
    return [f"{answer}<|im_end|>" for answer in answers]


def chat(turns: Turns, *, system: str | None = None, **details: Any) -> Chat:
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Chat(messages, **details)


def loss_pieces(tokenizer: PreTrainedTokenizerFast, conversation: Chat) -> list[str]:
    """Return the text of each run of loss tokens, and check the ids against those of transformers' renderings."""
    messages = conversation.messages
    texts = [
        tokenizer.apply_chat_template(messages[: index + 1], tools=conversation.tools, tokenize=False)
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    pieces: list[list[int]] = []
    for ids, labels in encode_all(tokenizer, conversation):
        assert ids in expected
        assert len(ids) == len(labels)
        assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
        pieces.append([])
        for label in labels:
            if label != IGNORED:
                pieces[-1].append(label)
            elif pieces[-1]:
                pieces.append([])
    return [tokenizer.decode(piece) for piece in pieces if piece]


STYLES = ["chatml", "smollm2", "llama_3", "qwen", "mistral"]
SYSTEMS = [None, "Answer as briefly as you can."]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("turns", [ONE_TURN, THREE_TURNS])
@pytest.mark.parametrize("system", SYSTEMS)
def test_loss_tokens_are_the_answers_with_their_end_marker(
    styles: dict[str, PreTrainedTokenizerFast], style: str, turns: Turns, system: str | None
):
    if style == "mistral" and system:
        with pytest.raises(RowError, match=r"chat template.*no system role here"):
            encode(styles[style], chat(turns, system=system))
        return
    pieces = loss_pieces(styles[style], chat(turns, system=system))
    assert pieces == expected_answers(style, [answer for _, answer in turns])


# Texts of many kinds, including the markers that templates render, as message content.
_text = st.lists(
    st.text(min_size=1, max_size=6)
    | st.sampled_from(
        [
            " ",
            "\n",
            "é",
            "🍎",
            "👩‍👩‍👧",
            "e\u0301",
            "\u200b",
            "مرحبا",
            "你好",
            "\ufeff",
            "a b",
            "12",
            "assistant",
            "[INST]",
        ]
    )
    | st.sampled_from(
        ["<|im_start|>assistant\n", "<|im_end|>", "<|im_end|>\n<|im_start|>user\n", "<|eot_id|>", "</think>"]
    ),
    min_size=1,
    max_size=5,
).map("".join)
# A text that begins as the template's turns do, or ends one and begins an answer, is rendered already, and an end token that an answer brings is removed.
_content = _text.filter(
    lambda text: (
        bool(text.strip())
        and not text.strip().startswith(("<|im_start|>", "[INST]"))
        and not ("<|im_end|>" in text and "<|im_start|>assistant" in text)
        and not text.strip().endswith(("<|im_end|>", "<|eot_id|>"))
    )
)


def _without_markers(renderer: Renderer) -> Renderer:
    """Return a copy without the detected markers, which locates each turn by rendering the turns before it."""
    slow = copy.copy(renderer)
    slow.traits = copy.copy(renderer.traits)
    slow.traits.header = slow.traits.end_marker = ""
    return slow


@given(turns=st.lists(st.tuples(_content, _content), min_size=1, max_size=3), system=st.none() | _content)
@pytest.mark.parametrize("style", STYLES)
def test_answers_with_any_content_are_located_in_the_text(
    styles: dict[str, PreTrainedTokenizerFast], style: str, turns: Turns, system: str | None
):
    tokenizer = styles[style]
    conversation = chat(turns, system=None if style == "mistral" else system)
    renderer = Renderer(tokenizer, whole_text=False)
    sequences = renderer.render(conversation)
    assert sequences[-1].text == tokenizer.apply_chat_template(conversation.messages, tokenize=False)
    assert _without_markers(renderer).render(conversation) == sequences
    expected = expected_answers(style, [answer for _, answer in turns])
    located = [sequence.text[begin:end] for sequence in sequences for begin, end in sequence.spans]
    assert [text.strip() for text in located] == [text.strip() for text in expected]
    for sequence, (ids, labels) in zip(sequences, encode_all(tokenizer, conversation), strict=True):
        assert ids == tokenizer(sequence.text, add_special_tokens=False)["input_ids"]
        assert [label for label in labels if label != IGNORED] == ids_of_spans(
            tokenizer, sequence.text, sequence.spans
        )


def ids_of_spans(
    tokenizer: PreTrainedTokenizerFast, text: str, spans: tuple[tuple[int, int], ...]
) -> list[int]:
    """Return the ids of the tokens whose offsets overlap a span."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [
        token
        for token, (begin, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        if any(begin < last and end > first for first, last in spans)
    ]


def test_renderer_provides_every_template_feature_of_transformers(chatml: PreTrainedTokenizerFast):
    tokenizer = with_template(chatml, ALL_TEMPLATE_FEATURES)
    conversation = chat(THREE_TURNS, system="Be brief.")
    (rendered,) = Renderer(tokenizer, whole_text=True).render(conversation)
    assert rendered.text == tokenizer.apply_chat_template(conversation.messages, tokenize=False)
    assert "no toolsno documentsno names1 {" in rendered.text


def test_tool_calls_are_trained_and_tool_results_are_not(styles: dict[str, PreTrainedTokenizerFast]):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
    messages: list[Message] = [
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "It is 5."},
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"a": "int", "b": "int"}}}]
    conversation = Chat(messages, tools)
    pieces = loss_pieces(styles["qwen"], conversation)
    rendered_call = '{"name": "add", "arguments": {"a": 2, "b": 3}}'
    assert pieces == [
        f"<tool_call>\n{rendered_call}\n</tool_call><|im_end|>",
        "It is 5.<|im_end|>",
    ]
    rendered = Renderer(styles["qwen"], whole_text=False).render(conversation)[-1]
    assert '# Tools\n{"type": "function", "function": {"name": "add"' in rendered.text


@pytest.mark.parametrize("style", ["smollm2", "llama_3"])
def test_tools_that_the_template_does_not_render_raise_an_error(
    styles: dict[str, PreTrainedTokenizerFast], style: str
):
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    with_tools = chat(ONE_TURN, tools=[call])
    with pytest.raises(RowError, match=r"`tools`.*chat template"):
        encode(styles[style], with_tools)
    with_call = Chat(
        [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    )
    with pytest.raises(RowError, match=r"message 2 .*chat template.*'add'"):
        encode(styles[style], with_call)


def test_a_message_of_weight_0_is_not_trained(styles: dict[str, PreTrainedTokenizerFast]):
    conversation = chat(THREE_TURNS, untrained=(1, 5))
    assert loss_pieces(styles["chatml"], conversation) == ["It is 7.\n\nSure.<|im_end|>"]


def test_labels_match_the_generation_mask_of_a_template(chatml: PreTrainedTokenizerFast):
    template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    conversation = chat(THREE_TURNS, system="Be brief.")
    expected = with_template(chatml, template).apply_chat_template(
        conversation.messages, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, labels = encode(chatml, conversation)
    assert ids == expected["input_ids"]
    assert [int(label != IGNORED) for label in labels] == expected["assistant_masks"]


def test_a_template_that_changes_earlier_turns_splits_a_chat(chatml: PreTrainedTokenizerFast):
    tokenizer = with_template(chatml, LAST_REASONING_ONLY)
    turns = [("2 + 2?", "<think>easy</think>4"), ("3 + 3?", "<think>easy</think>6")]
    assert loss_pieces(tokenizer, chat(turns[:1])) == ["<think>easy</think>4<|im_end|>"]
    first, last = encode_all(tokenizer, chat(turns))
    assert "easy" in tokenizer.decode(first[0])
    assert tokenizer.decode(last[0]).count("easy") == 1, "the context of the last turn has no reasoning"
    with pytest.raises(RowError, match=r"2 sequences.*turns: auto"):
        Renderer(tokenizer, whole_text=False, turns="all").render(chat(turns))
    (only,) = Renderer(tokenizer, whole_text=False, turns="last").render(chat(turns))
    assert only.text == tokenizer.apply_chat_template(chat(turns).messages, tokenize=False)


def test_a_broken_template_raises_an_error_with_its_line(chatml: PreTrainedTokenizerFast):
    with pytest.raises(DataError, match=r"chat template .*line 1"):
        encode(with_template(chatml, "{% for %}"), chat(ONE_TURN))


CONTENT_IN_PARTS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize("task", ["instruction_tuning", "causal_lm"])
def test_a_template_that_reads_content_parts_gets_them(chatml: PreTrainedTokenizerFast, task: Task):
    tokenizer = with_template(chatml, CONTENT_IN_PARTS)
    ids, _ = encode(tokenizer, chat(ONE_TURN), task)
    assert [ids] == [encode(chatml, chat(ONE_TURN), task)[0]]


@pytest.mark.parametrize("task", ["instruction_tuning", "causal_lm"])
def test_a_template_without_the_answers_raises_an_error(chatml: PreTrainedTokenizerFast, task: Task):
    template = (
        "{% for message in messages if message['role'] == 'user' %}{{ message['content'] }}{% endfor %}"
    )
    tokenizer = with_template(chatml, template)
    with pytest.raises(RowError, match=r"chat template.*message 2|message 2.*chat template"):
        encode(tokenizer, chat(ONE_TURN), task)
    ids, _ = encode(tokenizer, Filled("Q: 1 A: ", "2"), task)
    assert ids, "a row with a prompt template needs no chat template"


def test_a_template_without_the_questions_raises_an_error(chatml: PreTrainedTokenizerFast):
    template = str(chatml.chat_template)
    answers_alone = template.replace(
        "message['content']", "(message['content'] if message['role'] == 'assistant' else '')"
    )
    assert answers_alone != template
    with pytest.raises(RowError, match=r"message 1 \(user\): the chat template drops content .*'Ada buys"):
        encode(with_template(chatml, answers_alone), chat(ONE_TURN), "instruction_tuning")


def test_a_template_without_the_responses_of_a_pair_raises_an_error(chatml: PreTrainedTokenizerFast):
    question, answer, other = (*chat(ONE_TURN).messages, {"role": "assistant", "content": "5"})
    template = str(chatml.chat_template).replace("message['content']", "'4'")
    with pytest.raises(RowError, match=r"message 2 .*chat template"):
        encode(with_template(chatml, template), Pair([question], [answer], [other]), "preference_tuning")


def test_a_pair_that_is_rendered_to_equal_texts_raises_an_error(chatml: PreTrainedTokenizerFast):
    question: Message = {"role": "user", "content": "2 + 2?"}
    chosen, rejected = ({"role": "assistant", "content": text} for text in ("4", " 4 "))
    trimmed = with_template(
        chatml, str(chatml.chat_template).replace("message['content']", "message['content'] | trim")
    )
    with pytest.raises(RowError, match="same text"):
        encode(trimmed, Pair([question], [chosen], [rejected]), "preference_tuning")


@pytest.mark.parametrize("expression", ["'{x}'.format()", "'{}'.format()", "'text' | dictsort"])
def test_any_error_of_a_template_is_a_row_error(chatml: PreTrainedTokenizerFast, expression: str):
    with pytest.raises(RowError, match="chat template"):
        encode(with_template(chatml, "{{ " + expression + " }}"), chat(ONE_TURN))


def test_llmforges_prompt_format_trains_its_answers(chatml: PreTrainedTokenizerFast):
    template = to_chat_template(
        {
            "system": "{instruction} + ",
            "user": "[INST] {system}{instruction} [/INST]",
            "assistant": "{instruction}<|im_end|> ",
            "system_in_user": True,
        }
    )
    pieces = loss_pieces(with_template(chatml, template), chat(THREE_TURNS, system="Be brief."))
    assert pieces == [f"{answer.strip()}<|im_end|>" for _, answer in THREE_TURNS]


def test_causal_lm_trains_every_token(chatml: PreTrainedTokenizerFast):
    for example, text in (
        (Text("Once upon a time"), "Once upon a time<|im_end|>"),
        (Filled("Q: 1 A: ", "2"), "Q: 1 A: 2<|im_end|>"),
        (chat(ONE_TURN), chatml.apply_chat_template(chat(ONE_TURN).messages, tokenize=False)),
    ):
        ids, labels = encode(chatml, example, "causal_lm")
        assert labels == ids
        assert chatml.decode(ids) == text


def test_a_prompt_template_trains_the_answer_and_the_end_of_text(chatml: PreTrainedTokenizerFast):
    ids, labels = encode(chatml, Filled("### Instruction: Add. ### Response: ", "It is 4."))
    assert chatml.decode(ids) == "### Instruction: Add. ### Response: It is 4.<|im_end|>"
    assert chatml.decode([label for label in labels if label != IGNORED]).lstrip() == "It is 4.<|im_end|>"


@pytest.mark.parametrize("style", STYLES)
def test_both_responses_of_a_pair_follow_one_prompt(styles: dict[str, PreTrainedTokenizerFast], style: str):
    tokenizer = styles[style]
    prompt, chosen, rejected = (
        [{"role": "user", "content": "2 + 2?"}],
        [{"role": "assistant", "content": "It is 4."}],
        [{"role": "assistant", "content": "It is 5, 👩‍👩‍👧."}],
    )
    row = encode(tokenizer, Pair(prompt, chosen, rejected), "preference_tuning")
    for side, messages in ((1, chosen), (2, rejected)):
        full_text = tokenizer.apply_chat_template([*prompt, *messages], tokenize=False).rstrip()
        assert row[0] + row[side] == tokenizer(full_text, add_special_tokens=False)["input_ids"]
        assert [tokenizer.decode(row[side])] == expected_answers(style, [str(messages[0]["content"])])


@pytest.mark.parametrize("label", ["end", "final", "im", "<|good|>"])
def test_a_label_is_found_among_the_texts_of_the_template(chatml: PreTrainedTokenizerFast, label: str):
    """The template writes a channel before the answer, as gpt-oss does, and an end token that contains two of the labels."""
    channel = "{{ 'final<|message|>' if message['role'] == 'assistant' else '' }}{{ message['content'] + '<|im_end|>"
    template = SMOLLM2.replace(
        "message['role'] + '\n' + message['content'] + '<|im_end|>", "message['role'] + '\n' }}" + channel
    )
    tokenizer = with_template(chatml, template, "<|message|>", "<|good|>")
    ids, labels = encode(tokenizer, chat([("I like it", label)], label=1), "classification")
    assert tokenizer.decode([token for token in labels if token != IGNORED]) == label
    assert str(tokenizer.decode(ids)).endswith(f"assistant\nfinal<|message|>{label}")


ALPACA = "Below is an instruction.\n\n### Instruction:\n2 + 2?\n\n### Response:\n"
VICUNA = "A chat between a curious user and an assistant. USER: 2 + 2? ASSISTANT:"
FOREIGN = "<|start_header_id|>user<|end_header_id|>\n\n2 + 2?<|eot_id|>"


@pytest.mark.parametrize(
    ("example", "header"),
    [
        (Text(FOREIGN), "<|start_header_id|>"),
        (Filled("Q: ", "[INST] 2 + 2? [/INST] 4"), "[INST]"),
        (chat([(FOREIGN, "4")]), "<|start_header_id|>"),
        (chat([("2 + 2?", "<start_of_turn>model\n4")]), "<start_of_turn>"),
        (Pair([{"role": "user", "content": FOREIGN}], [ANSWER_4], [ANSWER_5]), "<|start_header_id|>"),
        (chat([(ALPACA, "4")]), "### Instruction:"),
        (chat([(VICUNA, "4")]), "USER:"),
        (Pair([{"role": "user", "content": VICUNA}], [ANSWER_4], [ANSWER_5]), "USER:"),
        (chat([("Continue: ### Response:", "4")]), ""),
        (chat([("What is wrong? USER: Hi ASSISTANT: Hello", "4")]), ""),
        (chat([("### Instruction: 2 + 2?", "4")]), ""),
        (Filled(ALPACA, "4"), ""),
        (Text(f"{VICUNA} 4"), ""),
        (Text("<|im_start|>user\n2 + 2?<|im_end|>\n"), ""),
        (chat([("What are <|im_start|> and <|user|x|>?", "4")]), ""),
    ],
)
def test_headers_of_another_template_are_noted(
    chatml: PreTrainedTokenizerFast, example: Chat | Text | Filled | Pair, header: str
):
    """Those of the model's own template are its tokens."""
    renderer = Renderer(chatml, whole_text=False)
    notes = [note for note in renderer.notes(example, renderer.render(example)) if "another chat" in note]
    assert len(notes) == bool(header)
    assert not header or notes[0].startswith(f"{header} in ")


def test_classification_trains_only_its_label(chatml: PreTrainedTokenizerFast):
    ids, labels = encode(chatml, chat([("I like it", "good")], label=1), "classification")
    assert chatml.decode([label for label in labels if label != IGNORED]) == "good"
    assert labels[-1] == ids[-1] != IGNORED


def test_the_place_of_a_turn_is_found_in_little_time():
    """Comparing what precedes each header character by character would take a minute."""
    turn = "x" * 1000 + "<bot>"
    text = turn * 400
    begin = time.process_time()
    place = rendering._place_after(text[: len(turn) * 200 - len("<bot>")], "<bot>", text)
    assert time.process_time() - begin < 4
    assert place == len(text) - len("<bot>")


@given(before=st.text("ab"), text=st.text("ab"), place=st.integers(0, 20))
def test_the_texts_before_two_places_are_compared_to_their_first_difference(
    before: str, text: str, place: int
):
    ends = zip(reversed(before), reversed(text[:place]), strict=False)
    same = [mine == theirs for mine, theirs in ends]
    assert rendering.same_before(before, text, min(place, len(text))) == [*same, False].index(False)
