"""Every assistant turn is trained in the context in which the model is asked for it, with each chat template that TRL ships."""

import copy
import json
import re
from collections.abc import Sequence
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from tests.support.tiny_model import make_tokenizer
from training.data.answer_marks import find_marks
from training.data.encoding import Encoder
from training.data.errors import DataError, RowError
from training.data.prompting import stop_tokens
from training.data.records import Chat, Pair
from training.data.rendered import Rendered
from training.data.renderer import Renderer
from training.data.rows import RowSchema, read_row, recognise

TEMPLATES = {
    path.stem: path.read_text()
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    if not path.stem.endswith("_training")
}
"""Templates of models, as TRL 1.15 ships them, by name."""

END = "<｜end▁of▁sentence｜>"  # noqa: RUF001
"""DeepSeek's end token."""

SYSTEM = {"role": "system", "content": "Answer in rhymes."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find_weather",
            "description": "Find the weather.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
RESULT = {"role": "tool", "tool_call_id": "call_1", "name": "find_weather", "content": "minus 3 degrees"}


def user(number: int) -> dict[str, Any]:
    return {"role": "user", "content": f"Question number {number}?"}


def answer(number: int, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": f"Answer with words {number}.", **keys}


def call(content: str | None = None) -> dict[str, Any]:
    function = {"name": "find_weather", "arguments": '{"city": "Tromsø"}'}
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
    }


ROWS: dict[str, dict[str, Any]] = {
    "one answer": {"messages": [user(1), answer(1)]},
    "system": {"messages": [SYSTEM, user(1), answer(1)]},
    "three turns": {"messages": [user(1), answer(1), user(2), answer(2), user(3), answer(3)]},
    "system and two turns": {"messages": [SYSTEM, user(1), answer(1), user(2), answer(2)]},
    "reasoning": {"messages": [user(1), answer(1, reasoning_content="A thought 1.")]},
    "reasoning in two turns": {
        "messages": [
            *(user(1), answer(1, reasoning="A thought 1.")),
            *(user(2), answer(2, thinking="A thought 2.")),
        ]
    },
    "reasoning in the content": {
        "messages": [
            user(1),
            answer(1) | {"content": "<think>\nA thought 1.\n</think>\n\nAnswer with words 1."},
        ]
    },
    "call": {"messages": [user(1), call()], "tools": TOOLS},
    "call and result": {"messages": [user(1), call(), RESULT, answer(1)], "tools": TOOLS},
    "words beside a call": {"messages": [user(1), call("Words beside."), RESULT, answer(1)], "tools": TOOLS},
    "text parts": {"messages": [{**user(1), "content": [{"type": "text", "text": "Question?"}]}, answer(1)]},
}
WITHOUT_SYSTEM = {"gemma"}
WITHOUT_REASONING = {
    *(
        "cohere",
        "cohere2",
        "gemma",
        "gemma3",
        "gemma4",
        "gemma4_v2",
        "gemma4_v3",
        "gemma4_v4",
        "idefics3",
        "lfm2",
        "lfm2_v2",
    ),
    *(
        "llama3",
        "llama3_1",
        "llama3_2",
        "llava_next",
        "phi3",
        "phi3_5",
        "qwen2_5",
        "qwen2_5_vl",
        "qwen3_instruct_2507",
    ),
    *("qwen3_vl", "smolvlm"),
}
"""Templates that read no reasoning (Gemma 4 before its fifth version: only beside calls)."""
WITHOUT_TOOLS = {
    *(
        "cohere",
        "cohere2",
        "gemma",
        "gemma3",
        "idefics3",
        "lfm2",
        "llama3",
        "llava_next",
        "phi3",
        "phi3_5",
        "qwen2_5_vl",
    ),
    *("smolvlm", "deepseek_r1_distill", "deepseekv3"),
}
"""Templates that print no tools or no calls."""


class Tokenizers(dict[str, PreTrainedTokenizerFast]):
    """Tokenizers by the name of their template, with a short representation for hypothesis."""

    def __repr__(self) -> str:
        return "tokenizers"


@pytest.fixture(scope="module")
def tokenizers(tiny_model: Path) -> Tokenizers:
    plain = AutoTokenizer.from_pretrained(tiny_model)
    # SmolLM2's BOS token is the role marker of half of these templates.
    plain.add_special_tokens({"bos_token": "<|bos|>", "eos_token": "<|eos|>"})
    found = Tokenizers()
    for name, template in TEMPLATES.items():
        found[name] = copy.deepcopy(plain)
        found[name].chat_template = template
    return found


def with_template(tokenizers: Tokenizers, template: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of Llama 3 with another template."""
    tokenizer = copy.deepcopy(tokenizers["llama3"])
    tokenizer.chat_template = template
    return tokenizer


def test_each_template_trains_each_kind_of_row_or_names_what_it_drops(
    tokenizers: Tokenizers,
):
    trained, rejected = set(), {}
    for name, tokenizer in tokenizers.items():
        for kind, row in ROWS.items():
            try:
                check_turns(tokenizer, read(row))
                trained.add((name, kind))
            except RowError as error:
                rejected[name, kind] = str(error)
    for (name, kind), message in rejected.items():
        says = {
            "system": name in WITHOUT_SYSTEM,
            "reasoning": name in WITHOUT_REASONING and "content" not in kind,
            "call": name in WITHOUT_TOOLS or kind.startswith("words"),
        }
        assert any(known for word, known in says.items() if word in kind), f"{name}, {kind}: {message}"
        assert "chat template" in message or "chat_template" in message
    assert len(trained) / (len(trained) + len(rejected)) > 0.75


def test_templates_of_training_train_the_same_tokens_as_those_of_the_models(
    tokenizers: Tokenizers,
):
    """TRL's training templates mark what is trained; for one answer without reasoning both mean the same."""
    compared = 0
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*_training.jinja")):
        name = path.stem.removesuffix("_training")
        # DeepSeek's training templates leave the opened thought out; GLM's needs its own special tokens (see below).
        if name not in tokenizers or name.startswith(("deepseek", "glm4moe")):
            continue
        marked = copy.deepcopy(tokenizers[name])
        marked.chat_template = path.read_text()
        for kind in ("one answer", "system"):
            try:
                theirs, ours = (
                    Renderer(each, whole_text=False).render(read(ROWS[kind]))
                    for each in (marked, tokenizers[name])
                )
            except RowError:
                assert name in WITHOUT_SYSTEM
                continue
            assert loss_texts(theirs) == loss_texts(ours), f"{name}, {kind}"
            compared += 1
    assert compared > 20


_words = st.text("abcxyz äß?!.,\n", min_size=1, max_size=12).filter(
    lambda text: bool(text.strip()) and text[0] != "\n"
)
_turn = st.fixed_dictionaries({"question": _words, "answer": _words, "reasoning": st.none() | _words})


@settings(max_examples=10, deadline=None)
@given(system=st.none() | _words, turns=st.lists(_turn, min_size=1, max_size=3))
@pytest.mark.parametrize("name", TEMPLATES)
def test_generated_turns_are_trained_once_each_in_their_own_context(
    name: str,
    tokenizers: Tokenizers,
    system: str | None,
    turns: list[dict[str, Any]],
):
    messages = [] if system is None else [{"role": "system", "content": system}]
    for turn in turns:
        messages.append({"role": "user", "content": turn["question"]})
        reasoning = {} if turn["reasoning"] is None else {"reasoning_content": turn["reasoning"]}
        messages.append({"role": "assistant", "content": turn["answer"], **reasoning})
    chat = read({"messages": messages})
    try:
        check_turns(tokenizers[name], chat)
    except RowError as error:
        cannot = (system and name in WITHOUT_SYSTEM) or (
            any(turn["reasoning"] for turn in turns) and name in WITHOUT_REASONING
        )
        assert cannot, error


def test_a_prompt_that_opens_a_thought_gets_the_reasoning_and_its_end(
    tokenizers: Tokenizers,
):
    """DeepSeek-R1-Distill's template cuts reasoning out, and its generation prompt ends with an opened thought."""
    renderer = Renderer(tokenizers["deepseek_r1_distill"], whole_text=False)
    (reasoned,) = renderer.render(read(ROWS["reasoning in the content"]))
    assert reasoned.text.endswith(f"<think>\nA thought 1.\n</think>\n\nAnswer with words 1.{END}")
    assert loss_texts([reasoned]) == [f"A thought 1.\n</think>\n\nAnswer with words 1.{END}"]
    (plain,) = renderer.render(read(ROWS["one answer"]))
    assert plain.text.endswith(f"<think>\n\n</think>\n\nAnswer with words 1.{END}")
    assert loss_texts([plain]) == [f"Answer with words 1.{END}"]


def test_an_empty_thought_is_trained_only_if_the_row_writes_it(
    tokenizers: Tokenizers,
):
    """Qwen3's template inserts one before the last answer."""
    renderer = Renderer(tokenizers["qwen3"], whole_text=False)
    written = answer(1) | {"content": "<think>\n\n</think>\n\nAnswer with words 1."}
    inserted, own = (
        renderer.render(read({"messages": [user(1), message]})) for message in (answer(1), written)
    )
    assert inserted[0].text == own[0].text
    assert loss_texts(inserted) == ["Answer with words 1.<|im_end|>"]
    assert loss_texts(own) == ["<think>\n\n</think>\n\nAnswer with words 1.<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "row", "facts"),
    [
        ("gemma", "system", (r"message 1 \(system\) is rejected", "first user message")),
        ("mistral", "later system", (r"message 3 \(system\) is rejected", "first user message")),
        ("mistral", "call", (r"message 2 \(assistant\) is rejected", "renders tool calls")),
        ("undefined", "one answer", ("whatever the messages are", "nothing' is undefined", "chat_template")),
        ("smolvlm", "reasoning in a later turn", (r"message 4 \(assistant\).*drops reasoning", "Remove it")),
    ],
)
def test_errors_of_a_template_name_the_message_and_the_fix(
    name: str, row: str, facts: tuple[str, ...], tokenizers: Tokenizers
):
    strict = (
        "{% for message in messages %}{% if message.role not in ['user', 'assistant'] %}{{ raise_exception('only two roles') }}"
        "{% endif %}{{ message.role }}{{ message.content + '' }}{% if message.tool_calls %}{{ message.tool_calls.x.y }}"
        "{% endif %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
    )
    own = {"mistral": strict, "undefined": "{{ nothing.at_all }}"}
    rows = {
        **ROWS,
        "later system": {"messages": [user(1), answer(1), SYSTEM, user(2), answer(2)]},
        "reasoning in a later turn": {
            "messages": [user(1), answer(1), user(2), answer(2, reasoning="A thought 2.")]
        },
    }
    tokenizer = with_template(tokenizers, own[name]) if name in own else tokenizers[name]
    with pytest.raises(RowError) as caught:
        Renderer(tokenizer, whole_text=False).render(read(rows[row]))
    assert all(re.search(fact, str(caught.value)) for fact in facts), caught.value


def test_end_tokens_in_an_answer_are_reported(tokenizers: Tokenizers):
    """One at the end is removed; one before the end stays, since the answer may be about it."""
    renderer = Renderer(tokenizers["qwen3"], whole_text=False)
    for content, fact, text in (
        (
            "it is <|im_end|> or so",
            "the end token <|im_end|> before their end",
            "it is <|im_end|> or so<|im_end|>",
        ),
        ("Yes.<|im_end|>", "end tokens at the end", "Yes.<|im_end|>"),
        ("Yes<|endoftext|>.", "special tokens", "Yes<|endoftext|>.<|im_end|>"),
    ):
        chat = read({"messages": [user(1), answer(1) | {"content": content}]})
        sequences = renderer.render(chat)
        assert loss_texts(sequences) == [text]
        (note,) = renderer.notes(chat, sequences)
        assert fact in note
        assert renderer.notes(Pair([user(1)], chat.messages[1:], [answer(2)]), sequences) == [note]


def test_a_thought_that_the_prompt_opens_is_closed_once(tokenizers: Tokenizers):
    """Nemotron 3 renders an answer without reasoning after an empty thought of its own."""
    renderer = Renderer(tokenizers["nemotron_3_nano"], whole_text=False)
    reasoned, plain = renderer.render(
        Pair([user(1)], [answer(1, reasoning_content="A thought.")], [answer(2)])
    )
    assert loss_texts([plain]) == ["\n</think>\n\nAnswer with words 2.<|im_end|>"]
    assert reasoned.text.partition("A thought.")[0] + loss_texts([plain])[0] == plain.text
    (asked,) = renderer.render(Chat([user(1), answer(2)], variables={"enable_thinking": True}))
    assert (asked.text.rstrip(), loss_texts([asked])) == (plain.text, ["Answer with words 2.<|im_end|>"])


@pytest.mark.parametrize("name", ["gptoss", "gemma4_v5"])
def test_an_empty_thought_in_another_form_than_the_templates_is_removed(name: str, tokenizers: Tokenizers):
    renderer = Renderer(tokenizers[name], whole_text=False)
    written = answer(1) | {"content": "<think>\n\n</think>\n\nAnswer with words 1."}
    sequences = renderer.render(read({"messages": [user(1), written]}))
    assert loss_texts(sequences) == loss_texts(renderer.render(read(ROWS["one answer"])))
    assert "empty thoughts" in sequences[0].notes[0]
    pair = renderer.render(Pair([user(1)], [written], [answer(2)]))
    assert "think>" not in pair[0].text
    plain = Renderer(tokenizers["llama3_1"], whole_text=False).render(read({"messages": [user(1), written]}))
    assert "</think>" in loss_texts(plain)[0]


def test_an_answer_without_an_end_marker_ends_with_the_header_of_the_next_turn(tokenizers: Tokenizers):
    """GLM-4.5 stops at the next header, which its generation config lists."""
    tokenizer = copy.deepcopy(tokenizers["glm4moe"])
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|observation|>"]}
    )
    renderer = Renderer(tokenizer, whole_text=False)
    row = {"messages": [user(1), call(), RESULT, answer(1), user(2), answer(2)], "tools": TOOLS}
    sequences = renderer.render(read(row))
    ends = [text.rpartition("<")[2] for text in loss_texts(sequences)]
    assert ends == ["|observation|>", "|user|>", "|user|>"]
    assert len(sequences) == 1
    assert "<|user|><|user|>" not in sequences[0].text
    marked = copy.deepcopy(tokenizer)
    marked.chat_template = (Path(trl.__file__).parent / "chat_templates/glm4moe_training.jinja").read_text()
    theirs = Renderer(marked, whole_text=False).render(read(ROWS["one answer"]))
    assert theirs == renderer.render(read(ROWS["one answer"]))
    assert stop_tokens(None, tokenizer) == sorted(
        tokenizer.convert_tokens_to_ids(["<|eos|>", "<|user|>", "<|observation|>"])
    )


def test_the_error_of_a_form_that_the_template_reads_is_raised(tokenizers: Tokenizers):
    """DeepSeek V3's template reads arguments as text, and renders a second step with calls in another context."""
    messages = [user(1), call(), RESULT, call(), RESULT, answer(1)]
    with pytest.raises(RowError, match="message 4 directly after its generation prompt"):
        Renderer(tokenizers["deepseekv3"], whole_text=False).render(read({"messages": messages}))


@pytest.mark.parametrize(
    ("name", "converted"),
    [("gptoss", True), ("gemma4_v5", True), ("llama3_1", True), ("glm4moe", True), ("qwen3", False)],
)
def test_calls_in_tags_become_calls_where_the_template_writes_another_form(
    name: str, converted: bool, tokenizers: Tokenizers
):
    text = '<tool_call>\n{"name": "find_weather", "arguments": {"city": "Tromsø"}}\n</tool_call>'
    result = {"role": "tool", "content": "<tool_response>\nminus 3 degrees\n</tool_response>"}
    written = read({"messages": [user(1), answer(1) | {"content": text}, result, answer(2)], "tools": TOOLS})
    renderer = Renderer(tokenizers[name], whole_text=False)
    sequences = renderer.render(written)
    structured = read(
        {
            "messages": [user(1), call(), {"role": "tool", "content": "minus 3 degrees"}, answer(2)],
            "tools": TOOLS,
        }
    )
    assert loss_texts(sequences) == loss_texts(renderer.render(structured))
    assert any("read as tool_calls" in note for note in renderer.notes(written, sequences)) == converted
    if converted:
        assert '<tool_call>\n{"name"' not in sequences[-1].text
        assert "</tool_response>\n</tool_response>" not in sequences[-1].text


def test_calls_in_tags_stay_text_where_the_template_drops_the_words_beside_them(tokenizers: Tokenizers):
    text = 'Wait.\n<tool_call>\n{"name": "find_weather", "arguments": {}}\n</tool_call>'
    chat = read({"messages": [user(1), answer(1) | {"content": text}, RESULT, answer(2)], "tools": TOOLS})
    assert text in loss_texts(Renderer(tokenizers["llama3_1"], whole_text=False).render(chat))[0]


CALL_TEXT = '<tool_call>\n{"name": "find_weather", "arguments": {"city": "Tromsø"}}\n</tool_call>'
LEFT, READ = "are left as text", "are read as tool_calls"


def calling(content: str, *more: dict[str, Any], **columns: Any) -> Chat:
    """Return a chat whose answer has calls in its text, beside a column of tools."""
    row = {"messages": [user(1), answer(1) | {"content": content}, *more], "tools": TOOLS}
    return read({name: value for name, value in {**row, **columns}.items() if value})


@pytest.mark.parametrize(
    "content",
    [
        f"{CALL_TEXT}\nNow the coldest town.\n{CALL_TEXT}",
        f"Wait.\n{CALL_TEXT}\nNow the coldest town.\n{CALL_TEXT}",
        f"<think>\nTwo towns.\n</think>\n{CALL_TEXT}\nNow the coldest town.\n{CALL_TEXT}",
        f"{CALL_TEXT}\nNow the coldest town.",
    ],
)
@pytest.mark.parametrize("tools", [TOOLS, None])
def test_words_between_and_after_calls_in_tags_are_trained_or_the_row_is_rejected(
    content: str, tools: Any, tokenizers: Tokenizers
):
    trained = 0
    for name, tokenizer in tokenizers.items():
        renderer = Renderer(tokenizer, whole_text=False)
        for results in ([], [RESULT, RESULT, answer(2)]):
            chat = calling(content, *results, tools=tools)
            try:
                sequences = renderer.render(chat)
            except RowError:
                continue
            trained += 1
            assert "Now the coldest town." in loss_texts(sequences)[0], name
            is_own = renderer.traits.writes_calls_as(CALL_TEXT) or not renderer.traits.renders_calls
            notes = renderer.notes(chat, sequences)
            assert any(LEFT in note for note in notes) == (bool(tools) and not is_own) or not tools, name
            assert not any(READ in note for note in notes), name
    assert trained > len(TEMPLATES)


def test_words_between_calls_of_a_pair_are_trained(tokenizers: Tokenizers):
    text = f"{CALL_TEXT}\nNow the coldest town.\n{CALL_TEXT}"
    row = {"prompt": "What is it?", "chosen": text, "rejected": "No.", "tools": TOOLS}
    pair = read_row(row, RowSchema("preference_tuning", "preference", {}, None, ()))
    assert isinstance(pair, Pair)
    assert text in Renderer(tokenizers["qwen3_6"], whole_text=False).render(pair)[0].text


@pytest.mark.parametrize(
    "written",
    [
        '<tool_call>{"name": "find_weather", "arguments": "{\\"city\\": \\"Tromsø\\"}"}</tool_call>',
        '<tool_call>{"name": "find_weather", "parameters": {"city": "Tromsø"}}</tool_call>',
        '<tool_call>{"id": 7, "name": "find_weather", "arguments": {"city": "Tromsø"}}</tool_call>',
        '<tool_call>{"type": "function", "function": {"name": "find_weather", "arguments": {"city": "Tromsø"}}}</tool_call>',
        f"{CALL_TEXT}<|eos|>",
        '<functioncall> {"name": "find_weather", "arguments": \'{"city": "Tromsø"}\'} <|endoftext|>',
    ],
)
def test_spellings_of_calls_in_tags_are_read_as_tool_calls(written: str, tokenizers: Tokenizers):
    for name in ("gptoss", "gemma4_v5", "llama3_1", "glm4moe", "qwen3_6", "muse_glimmer", "lfm2_v2", "qwen3"):
        renderer = Renderer(tokenizers[name], whole_text=False)
        chat = calling(written, RESULT, answer(2))
        sequences = renderer.render(chat)
        structured = read({"messages": [user(1), call(), RESULT, answer(2)], "tools": TOOLS})
        assert loss_texts(sequences) == loss_texts(renderer.render(structured)), name
        is_plain = name == "qwen3" and written.startswith(CALL_TEXT)
        assert any(READ in note for note in renderer.notes(chat, sequences)) != is_plain, name


def test_reasoning_before_a_call_in_tags_is_kept_beside_the_call(tokenizers: Tokenizers):
    chat = calling(f"<think>\nA town.\n</think>\n{CALL_TEXT}", RESULT, answer(2))
    called = loss_texts(Renderer(tokenizers["muse_glimmer"], whole_text=False).render(chat))[0]
    assert "A town." in called
    assert '<atem:invoke name="find_weather">' in called
    for name in ("llama3_1", "llama3_2"):  # without reasoning
        renderer = Renderer(tokenizers[name], whole_text=False)
        sequences = renderer.render(chat)
        assert CALL_TEXT in loss_texts(sequences)[0]
        assert any(LEFT in note for note in renderer.notes(chat, sequences))


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (f"{CALL_TEXT}\nOne moment.", r"message 2 \(assistant\): words stand between or after the calls"),
        (CALL_TEXT.replace('"Tromsø"', "Tromsø"), r"message 2 \(assistant\): call 1 .* not valid JSON"),
        (CALL_TEXT.removesuffix("</tool_call>"), "not JSON between <tool_call> and </tool_call>"),
        (CALL_TEXT.replace('{"name"', '{"mood": "calm", "name"'), "the key `mood`"),
    ],
)
def test_calls_that_cannot_be_read_are_named_where_the_template_drops_their_results(
    content: str, cause: str, tokenizers: Tokenizers
):
    chat = calling(content, RESULT, answer(2))
    for name in ("gptoss", "gemma4_v5"):
        with pytest.raises(RowError, match=cause):
            Renderer(tokenizers[name], whole_text=False).render(chat)


def test_a_call_in_text_ends_as_a_call_does(tokenizers: Tokenizers):
    """GLM-4.5 ends an answer with the first token of the next turn."""
    tokenizer = copy.deepcopy(tokenizers["glm4moe"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|observation|>"]})
    renderer = Renderer(tokenizer, whole_text=False)
    broken = CALL_TEXT.replace('"Tromsø"', "Tromsø")
    for chat in (calling(f"{CALL_TEXT}\nOne moment.", RESULT, answer(2)), calling(broken)):
        assert loss_texts(renderer.render(chat))[0].endswith("<|observation|>")
    assert loss_texts(renderer.render(calling(f"{CALL_TEXT}\nOne moment.")))[0].endswith("moment.<|user|>")


def test_calls_in_the_form_of_the_template_are_not_counted(tokenizers: Tokenizers):
    for name, written in (
        ("qwen3_6", "<tool_call>\n<function=find_weather>\n</function>\n</tool_call>"),
        ("glm4moe", "<tool_call>find_weather\n<arg_key>city</arg_key>\n</tool_call>"),
        ("qwen3", f"{CALL_TEXT}\nOne moment."),
        ("qwen3_6", "I write <tool_call> when I call."),
    ):
        renderer = Renderer(tokenizers[name], whole_text=False)
        chat = calling(written)
        assert not renderer.notes(chat, renderer.render(chat)), name


@pytest.mark.parametrize("text", ["Joe's Diner", "'q'", '^\\d+"$', "two\nlines\r", 'a\\b "c"', "\ttab"])
def test_arguments_in_single_quotes_are_trained(text: str, tokenizers: Tokenizers):
    asked = call()
    asked["tool_calls"][0]["function"]["arguments"] = {"city": text, "more": {"nested": [text]}}
    chat = read({"messages": [user(1), asked, RESULT, answer(1)], "tools": TOOLS})
    for name in ("lfm2_v2", "lfm2_2_5_vl", "lfm2_2_5", "qwen3"):
        assert "find_weather" in loss_texts(Renderer(tokenizers[name], whole_text=False).render(chat))[0]


@pytest.mark.parametrize("name", ["gptoss", "llama3_1", "llama3_2"])
def test_a_template_of_one_call_per_message_is_named(name: str, tokenizers: Tokenizers):
    first, second = call(), call()
    second["tool_calls"][0]["function"]["arguments"] = {"city": "Bodø"}
    both = {**first, "tool_calls": [*first["tool_calls"], *second["tool_calls"]]}
    renderer = Renderer(tokenizers[name], whole_text=False)
    for calls in (both, {**first, "tool_calls": first["tool_calls"] * 2}):
        with pytest.raises(RowError) as caught:
            renderer.render(read({"messages": [user(1), calls, RESULT, RESULT, answer(1)], "tools": TOOLS}))
        assert "message 2 (assistant) has 2 calls, but the chat template renders only one" in str(
            caught.value
        )
        assert "in a message of its own, followed by its result" in str(caught.value)
    apart = {"messages": [user(1), first, RESULT, second, RESULT, answer(1)], "tools": TOOLS}
    assert "Bodø" in "".join(loss_texts(renderer.render(read(apart))))


def test_a_template_without_calls_is_not_reported_to_render_one(tokenizers: Tokenizers):
    both = {**call(), "tool_calls": call()["tool_calls"] * 2}
    for name in ("phi3", "cohere2"):
        with pytest.raises(RowError) as caught:
            Renderer(tokenizers[name], whole_text=False).render(read({"messages": [user(1), both]}))
        assert "only one" not in str(caught.value)


@pytest.mark.parametrize(
    "function", [{"name": "find_weather"}, {"name": "find_weather", "description": "Find the weather."}]
)
def test_a_tool_without_parameters_is_rendered(function: dict[str, Any], tokenizers: Tokenizers):
    written = {"messages": [user(1), answer(1)], "tools": json.dumps([{**TOOLS[0], "function": function}])}
    filled = {"description": "", "parameters": {"type": "object", "properties": {}}, **function}
    for name in ("muse_glimmer", "qwen3", "gptoss"):
        texts = loss_texts(Renderer(tokenizers[name], whole_text=False).render(read(written)))
        assert texts == loss_texts(
            Renderer(tokenizers[name], whole_text=False).render(read(ROWS["one answer"]))
        )
    (sequence,) = Renderer(tokenizers["muse_glimmer"], whole_text=False).render(read(written))
    full = read({**written, "tools": [{**TOOLS[0], "function": filled}]})
    assert Renderer(tokenizers["muse_glimmer"], whole_text=False).render(full)[0].text == sequence.text


def test_a_tool_that_the_template_cannot_render_is_named(tokenizers: Tokenizers):
    tools = [TOOLS[0], {"type": "code_interpreter"}]
    with pytest.raises(RowError, match=r"tool 2 of `tools` \(keys: type\) cannot be rendered"):
        Renderer(tokenizers["muse_glimmer"], whole_text=False).render(
            read({"messages": [user(1), answer(1)], "tools": tools})
        )


def test_messages_after_the_last_trained_turn_are_counted(tokenizers: Tokenizers):
    renderer = Renderer(tokenizers["qwen3"], whole_text=False)
    chat = read({"messages": [user(1), answer(1), user(2), answer(2, train=False)]})
    assert renderer.notes(chat, renderer.render(chat)) == [
        "messages after the last answer in the loss are removed"
    ]


@pytest.mark.parametrize(
    ("name", "switch"),
    [
        *(
            ("qwen3", "enable_thinking"),
            ("glm4moe", "enable_thinking"),
            ("nemotron_3_nano", "enable_thinking"),
        ),
        *(("llama3_1", None), ("deepseek_r1_distill", None), ("qwen3_instruct_2507", None)),
    ],
)
def test_switch_of_plain_answers_is_found(name: str, switch: str | None, tokenizers: Tokenizers):
    assert Renderer(tokenizers[name], whole_text=False).switch_of_plain_answers() == switch
    off = Renderer(tokenizers[name], whole_text=False, variables={"enable_thinking": False})
    assert off.switch_of_plain_answers() is None


def test_a_later_system_message_is_moved_to_the_first_one(tokenizers: Tokenizers):
    messages = [SYSTEM, user(1), answer(1), SYSTEM, user(2), answer(2)]
    with pytest.raises(RowError, match=r"message 4 \(system\).*into message 1 \(system\)"):
        Renderer(tokenizers["gemma3"], whole_text=False).render(read({"messages": messages}))


def test_a_dropped_message_is_not_reported_as_a_column(tokenizers: Tokenizers):
    chats = {
        "content": [user(1), call("Words."), RESULT, answer(1)],
        "reasoning": [user(1), answer(1, thinking="A thought.")],
    }
    for what, messages in chats.items():
        with pytest.raises(RowError, match=f"drops {what}") as caught:
            Renderer(tokenizers["llama3_1"], whole_text=False).render(read({"messages": messages}))
        assert ("ignore_columns" in str(caught.value)) == (what == "reasoning")


def test_a_developer_message_is_a_system_message_to_a_template_without_that_role(tokenizers: Tokenizers):
    developer = {"role": "developer", "content": "Be kind."}
    (sequence,) = Renderer(tokenizers["cohere2"], whole_text=False).render(
        Chat([developer, user(1), answer(1)])
    )
    assert "Be kind." in sequence.text


def test_a_result_that_brings_its_tags_is_wrapped_once(tokenizers: Tokenizers):
    """As in Hermes, whose results may hold several responses."""
    renderer = Renderer(tokenizers["qwen3"], whole_text=False)
    two = "<tool_response>\nminus 3 degrees\n</tool_response>\n<tool_response>\nB\n</tool_response>"
    for content in ("<tool_response>\nminus 3 degrees\n</tool_response>", two):
        messages = [user(1), call(), {**RESULT, "content": content}, answer(1)]
        text = renderer.render(read({"messages": messages, "tools": TOOLS}))[-1].text
        assert f"<|im_start|>user\n{content}<|im_end|>" in text


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_rendered_prompt_is_not_wrapped_again(name: str, tokenizers: Tokenizers):
    """Also without a BOS token, in any message, and if the answer brings its own header."""
    renderer = Renderer(tokenizers[name], whole_text=False)
    rendered = renderer.prompt(Chat([user(1)])).replace("<|bos|>", "")
    question = {"role": "user", "content": rendered}
    later = [user(1), answer(1), question, answer(2)]
    for example in (Chat([question, answer(1)]), Chat(later), Pair([question], [answer(1)], [answer(2)])):
        with pytest.raises(RowError, match=r"message [13] \(user\).*rendered already"):
            renderer.render(example)


@pytest.mark.parametrize(
    "content",
    [
        "<|im_start|>assistant\nYes.<|im_end|>",
        "Yes.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.",
    ],
)
def test_an_answer_that_brings_the_headers_of_turns_raises_an_error(content: str, tokenizers: Tokenizers):
    tokenizer = copy.deepcopy(tokenizers["qwen3"])
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    renderer = Renderer(tokenizer, whole_text=False)
    said = {"role": "assistant", "content": content}
    for example in (Chat([user(1), said]), Pair([user(1)], [said], [answer(1)])):
        with pytest.raises(RowError, match=r"message 2 \(assistant\).*<\|im_start\|>.*rendered already"):
            renderer.render(example)


@pytest.mark.parametrize("name", TEMPLATES)
def test_words_that_quote_headers_of_turns_are_reported(name: str, tokenizers: Tokenizers):
    """A text about a template is no rendered prompt, whoever says it."""
    renderer = Renderer(tokenizers[name], whole_text=False)
    prompt = renderer.prompt(Chat([user(1)]))
    header = prompt.rpartition("?")[2].partition("<think>")[0].strip()
    own_header = renderer.traits.header.partition("<think>")[0].strip() or header
    said = {"role": "assistant", "content": f"It is {own_header}!"}
    for quote in (
        f"What is {header}?",
        f"Explain {header}",
        f"Explain:\n{prompt.partition('<think>')[0]}\nPlease.",
    ):
        question = {"role": "user", "content": quote}
        (sequence,) = renderer.render(Chat([question, said]))
        assert quote in sequence.text
        assert said["content"] in loss_texts([sequence])[0]
        assert quote in renderer.prompt(Chat([question]))
        check_turns(tokenizers[name], Chat([question, said, user(2), answer(2)]))


@pytest.mark.parametrize("quote", ["<|im_start|>assistant begins what?", "<|im_start|> is which token?"])
def test_words_that_begin_with_a_quote_are_reported(quote: str, tokenizers: Tokenizers):
    """The header of a turn ends with a line break."""
    question = {"role": "user", "content": quote}
    (sequence,) = Renderer(tokenizers["qwen3"], whole_text=False).render(Chat([question, answer(1)]))
    assert quote in sequence.text


def test_a_prompt_that_is_rendered_with_other_roles_is_not_wrapped_again(tokenizers: Tokenizers):
    """The text begins with a system or developer turn, or ends with the generation prompt after plain system words."""
    for name, content in (
        ("qwen3", "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"),
        ("phi3", "<|system|>\nBe kind.<|end|>\n<|user|>\nWhy?<|end|>\n<|assistant|>\n"),
        ("deepseekv3", "Be kind.<｜User｜>Why?<｜Assistant｜>"),  # noqa: RUF001
        (
            "gptoss",
            "<|start|>developer<|message|># Instructions<|end|><|start|>user<|message|>Why?<|end|><|start|>assistant",
        ),
        ("llama3", "<|bos|>Why?"),
    ):
        renderer = Renderer(tokenizers[name], whole_text=False)
        with pytest.raises(RowError, match=r"message 1 \(user\).*rendered already"):
            renderer.render(Chat([{"role": "user", "content": content}, answer(1)]))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_greeting_is_rendered_or_excluded_with_a_note(name: str, tokenizers: Tokenizers):
    """Some templates reject a conversation that the assistant begins, so the model is never asked after a greeting."""
    greeting = {"role": "assistant", "content": "Welcome to the weather."}
    turns = [user(1), answer(1), user(2), answer(2)]
    chat = read({"messages": [greeting, *turns]})
    renderer = Renderer(tokenizers[name], whole_text=False)
    sequences = renderer.render(chat)
    trained = "".join(loss_texts(sequences))
    assert ["words 1." in trained, "words 2." in trained, "weather" in trained] == [True, True, False]
    is_excluded = any("are excluded" in note for note in renderer.notes(chat, sequences))
    assert is_excluded == (greeting["content"] not in sequences[-1].text)
    if is_excluded:
        assert sequences == renderer.render(read({"messages": turns}))
    assert is_excluded or name not in ("gemma", "gemma3", "cohere")
    pair = Pair([greeting, user(1)], [answer(1)], [answer(2)])
    assert any("are excluded" in note for note in renderer.notes(pair, renderer.render(pair))) == is_excluded
    whole = Renderer(tokenizers[name], whole_text=True)
    if name in ("gemma", "qwen3"):
        assert any("are excluded" in note for note in whole.notes(chat, whole.render(chat))) == is_excluded


def test_a_greeting_beside_tools_is_not_rendered_as_the_words_of_the_user(tokenizers: Tokenizers):
    """Llama 3.1 puts tools into the first message and takes it for the user's."""
    greeting = {"role": "assistant", "content": "Welcome to the weather."}
    chat = read({"messages": [greeting, user(1), call(), RESULT, answer(1)], "tools": TOOLS})
    for name, is_excluded in (("llama3_1", True), ("qwen3", False)):
        renderer = Renderer(tokenizers[name], whole_text=False)
        sequences = renderer.render(chat)
        assert any("are excluded" in note for note in renderer.notes(chat, sequences)) == is_excluded
        assert ("Welcome" in sequences[-1].text) != is_excluded
    with pytest.raises(RowError, match=r"as the user's words.*Begin with a message of the user"):
        Renderer(tokenizers["llama3_1"], whole_text=False).prompt(Chat([greeting, user(1)], TOOLS))


def test_a_row_is_rejected_for_another_reason_than_its_greeting(tokenizers: Tokenizers):
    greeting = {"role": "assistant", "content": "Welcome to the weather."}
    for messages, fact in (
        ([greeting, user(1), answer(1, reasoning="A thought 1.")], r"message 3 .*drops reasoning"),
        ([SYSTEM, greeting, user(1), answer(1)], r"message 1 \(system\)"),
    ):
        with pytest.raises(RowError, match=fact):
            Renderer(tokenizers["gemma"], whole_text=False).render(read({"messages": messages}))
    first_excluded = [greeting, user(1), answer(1, weight=0), user(2), answer(2)]
    (sequence,) = Renderer(tokenizers["gemma"], whole_text=False).render(read({"messages": first_excluded}))
    assert loss_texts([sequence]) == ["Answer with words 2.<end_of_turn>"]


DEVELOPER = {"role": "developer", "content": "Be kind."}


@pytest.mark.parametrize("name", TEMPLATES)
def test_system_and_developer_messages_of_one_row_are_both_rendered(name: str, tokenizers: Tokenizers):
    """gpt-oss renders only the first of them, and other templates reject the second."""
    renderer = Renderer(tokenizers[name], whole_text=False)
    chat = read({"messages": [SYSTEM, DEVELOPER, user(1), answer(1, weight=0), user(2), answer(2)]})
    if name in WITHOUT_SYSTEM:
        with pytest.raises(RowError, match=r"message 1 \(system\)"):
            renderer.render(chat)
        return
    sequences = renderer.render(chat)
    notes = renderer.notes(chat, sequences)
    assert len(sequences) == 1
    assert ["words 1." in loss_texts(sequences)[0], "words 2." in loss_texts(sequences)[0]] == [False, True]
    for text in ("Answer in rhymes.", "Be kind."):
        assert sequences[0].text.count(text) == 1
    prompt = renderer.prompt(Chat([SYSTEM, DEVELOPER, user(1)]))
    is_merged = "Answer in rhymes.\n\nBe kind." in prompt
    if "system and developer messages are merged" in notes:
        assert is_merged
    assert "system and developer messages are merged" in notes or name not in ("gptoss", "qwen3_5_think")
    pair = Pair([SYSTEM, DEVELOPER, user(1)], [answer(1)], [answer(2)])
    assert all("Be kind." in sequence.text for sequence in renderer.render(pair))


def test_gpt_oss_reads_tools_in_each_of_their_forms(tokenizers: Tokenizers):
    """Its template reads functions in OpenAI's form only, and adds text to their descriptions."""
    renderer = Renderer(tokenizers["gptoss"], whole_text=False)
    bare = TOOLS[0]["function"]
    undescribed = {key: value for key, value in bare.items() if key != "description"}
    turns = [user(1), call(), RESULT, answer(1)]
    expected = renderer.render(read({"messages": [SYSTEM, *turns], "tools": TOOLS}))
    assert "// Find the weather.\ntype find_weather" in expected[0].text
    for row in (
        {"messages": [SYSTEM, *turns], "tools": [bare]},
        {"messages": [{**SYSTEM, "tools": [bare]}, *turns]},
        {"messages": [{**SYSTEM, "tools": json.dumps([bare])}, *turns], "tools": TOOLS},
        {"messages": [{"role": "developer", "content": "", "tools": [bare]}, SYSTEM, *turns]},
    ):
        assert renderer.render(read(row)) == expected
    for tool in (undescribed, {"type": "function", "function": undescribed}):
        text = renderer.render(read({"messages": turns, "tools": [tool]}))[0].text
        assert "type find_weather = " in text
    as_written = {"messages": turns, "tools": [bare]}
    qwen = Renderer(tokenizers["qwen3"], whole_text=False).render(read(as_written))
    assert f"<tools>\n{json.dumps(bare)}\n</tools>" in qwen[0].text


@pytest.mark.parametrize("name", ["qwen3", "qwen3_6", "nemotron_3_nano", "glm4moe"])
def test_reasoning_after_a_prompt_that_asks_for_none_raises_an_error(name: str, tokenizers: Tokenizers):
    off = {"enable_thinking": False}
    row = read({**ROWS["reasoning"], "chat_template_kwargs": off})
    pair = Pair(row.messages[:1], row.messages[1:], [answer(2)])
    for variables, example in ((off, read(ROWS["reasoning"])), (off, pair), ({}, row)):
        renderer = Renderer(tokenizers[name], whole_text=False, variables=variables)
        with pytest.raises(RowError, match=r"message 2.*reasoning.*chat_template_kwargs.*enable_thinking"):
            renderer.render(example)


def test_chat_template_variables_reach_the_template(tokenizers: Tokenizers):
    chat = read(ROWS["one answer"])
    texts = [
        Renderer(tokenizers["gptoss"], whole_text=False, variables=variables).render(chat)[0].text
        for variables in ({}, {"reasoning_effort": "low"})
    ]
    assert ["Reasoning: medium" in texts[0], "Reasoning: low" in texts[1]] == [True, True]


def test_variables_of_a_row_reach_the_template(tokenizers: Tokenizers):
    """As in smoltalk2, whose rows say whether they are to be asked with thinking."""
    renderer = Renderer(tokenizers["gptoss"], whole_text=False)
    efforts = ({"reasoning_effort": "low"}, '{"reasoning_effort": "high"}', {"reasoning_effort": None}, None)
    texts = [
        renderer.render(read({**ROWS["one answer"], "chat_template_kwargs": effort}))[0].text
        for effort in efforts
    ]
    assert [text.partition("Reasoning: ")[2].split()[0] for text in texts] == [
        "low",
        "high",
        "medium",
        "medium",
    ]
    with pytest.raises(RowError, match=r"chat_template_kwargs.*list"):
        read({**ROWS["one answer"], "chat_template_kwargs": ["low"]})


def test_variables_that_the_template_does_not_read_are_named(tokenizers: Tokenizers):
    """A misspelled one changes nothing: in the YAML it is an error, in a row a note."""
    for name, fix in (("enable_thinkin", "Did you mean enable_thinking?"), ("persona", "Remove it.")):
        variables = {name: False}
        with pytest.raises(DataError, match=rf"chat_template_kwargs\.{name}: .*{re.escape(fix)}"):
            Renderer(
                tokenizers["qwen3"], whole_text=False, variables=variables
            ).template.reject_unknown_variables()
        renderer = Renderer(tokenizers["qwen3"], whole_text=False, variables={"enable_thinking": True})
        renderer.template.reject_unknown_variables()
        chat = read({**ROWS["one answer"], "chat_template_kwargs": variables})
        (note,) = renderer.notes(chat, renderer.render(chat))
        assert note.startswith(f"`{name}` of chat_template_kwargs")
        assert note.endswith(fix)


def test_a_row_that_trains_the_last_turn_alone_does_not_decide_for_others(tiny_model: Path):
    """A template that moves the system text into the last question gives each turn another context."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = (
        "{% for m in messages if m['role'] != 'system' %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'user' and (loop.last or loop.nextitem is defined and loop.revindex == 2) and messages[0]['role'] == 'system' %}"
        "{{ messages[0]['content'] + '\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    row = ROWS["system and two turns"]
    first_excluded = copy.deepcopy(row)
    first_excluded["messages"][2]["weight"] = 0
    renderer = Renderer(tokenizer, whole_text=False)
    assert len(renderer.render(read(first_excluded))) == 1
    assert len(renderer.render(read(row))) == 2


MISTRAL_V3 = (
    "{% if messages[0]['role'] == 'system' %}{% set system, rest = messages[0]['content'], messages[1:] %}"
    "{% else %}{% set system, rest = none, messages %}{% endif %}{{ bos_token }}{% for m in rest %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + (system + '\n\n' if loop.last and system else '') + m['content'] + '[/INST]' }}"
    "{% elif m['tool_calls'] %}{% if m['tool_calls'][0]['id'] | length != 9 %}{{ raise_exception('ids') }}{% endif %}"
    "{{ '[TOOL_CALLS] ' + m['tool_calls'] | tojson + eos_token }}"
    "{% elif m['role'] == 'tool' %}{% if m['tool_call_id'] | length != 9 %}{{ raise_exception('ids') }}{% endif %}"
    "{{ '[TOOL_RESULTS] ' + m['content'] + ' ' + m['tool_call_id'] + '[/TOOL_RESULTS]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
"""The rules of Mistral 7B v0.3: system text in the last question, ids of nine characters, no generation prompt."""


def test_a_system_text_that_moves_with_the_last_question_gives_each_turn_its_context(tokenizers: Tokenizers):
    tokenizer = with_template(tokenizers, MISTRAL_V3)
    first, second = Renderer(tokenizer, whole_text=False).render(read(ROWS["system and two turns"]))
    assert first.text.count("Answer in rhymes.") == second.text.count("Answer in rhymes.") == 1
    assert first.text.endswith("Answer in rhymes.\n\nQuestion number 1?[/INST] Answer with words 1.<|eos|>")
    assert second.text.endswith("Answer in rhymes.\n\nQuestion number 2?[/INST] Answer with words 2.<|eos|>")


def test_calls_and_results_get_the_same_ids_where_a_template_needs_nine_characters(tokenizers: Tokenizers):
    tokenizer = with_template(tokenizers, MISTRAL_V3)
    result = {"role": "tool", "content": "minus 3 degrees"}
    called = call()
    del called["tool_calls"][0]["id"]
    for asked, answered in ((called, result), (call(), result), (called, RESULT)):
        chat = read({"messages": [user(1), asked, answered, answer(1)]})
        text = Renderer(tokenizer, whole_text=False).render(chat)[-1].text
        (identity,) = re.findall(r'"id": "(\w{9})"', text)
        assert f"minus 3 degrees {identity}[/TOOL_RESULTS]" in text


@pytest.mark.parametrize("name", ["gemma4", "gemma4_v5", "muse_glimmer"])
def test_results_without_ids_follow_their_calls(name: str, tokenizers: Tokenizers):
    """These templates find the function of a result by the id of its call. Rows of LLaMA-Factory and ms-swift have no ids."""
    functions = [
        {"name": "find_weather", "arguments": {"city": "Oslo"}},
        {"name": "find_time", "arguments": {}},
    ]
    results = [{"content": "minus 3 degrees"}, {"content": "noon"}]
    tools = [*TOOLS, {"type": "function", "function": {"name": "find_time"}}]

    def text(ids: Sequence[str | None], *results: dict[str, Any]) -> str:
        calls = [{"id": each, "function": function} for each, function in zip(ids, functions, strict=True)]
        asked = {"role": "assistant", "content": "", "tool_calls": calls}
        answers = [{"role": "tool", **result} for result in results]
        chat = read({"messages": [user(1), asked, *answers, answer(1)], "tools": tools})
        return Renderer(tokenizers[name], whole_text=False).render(chat)[-1].text

    weather, time = (
        {**result, "tool_call_id": each} for result, each in zip(results, ("a", "b"), strict=True)
    )
    assert text((None, None), *results) == text(("a", "b"), *results) == text(("a", "b"), weather, time)
    named = [
        {**result, "name": function["name"]} for result, function in zip(results, functions, strict=True)
    ]
    assert text((None, None), *reversed(named)) == text(("a", "b"), time, weather)


THINKING_SWITCH = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
    "{% else %}{{ '<|Assistant|></think>' + m['content'].split('</think>')[-1] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|>' + ('<think>' if thinking else '</think>') }}{% endif %}"
)
"""The rules of DeepSeek V3.1."""


def test_reasoning_is_asked_for_by_the_prompt_that_opens_a_thought(tokenizers: Tokenizers):
    tokenizer = with_template(tokenizers, THINKING_SWITCH)
    renderer = Renderer(tokenizer, whole_text=False)
    (plain,) = renderer.render(read(ROWS["one answer"]))
    assert (plain.text, loss_texts([plain])) == (
        "<|User|>Question number 1?<|Assistant|></think>Answer with words 1.<|end|>",
        ["Answer with words 1.<|end|>"],
    )
    (reasoned,) = renderer.render(read(ROWS["reasoning"]))
    assert reasoned.text[: reasoned.spans[0][0]].endswith("<|Assistant|><think>")
    assert loss_texts([reasoned]) == ["A thought 1.\n</think>\n\nAnswer with words 1.<|end|>"]


def test_prose_about_thoughts_is_no_thought(tokenizers: Tokenizers):
    words = answer(1) | {"content": "Close it with </think> at the end."}
    (rendered,) = Renderer(tokenizers["llama3"], whole_text=False).render(
        read({"messages": [user(1), words]})
    )
    assert loss_texts([rendered]) == ["Close it with </think> at the end.<|eot_id|>"]


def test_a_sequence_ends_with_its_last_trained_turn(tokenizers: Tokenizers):
    renderer = Renderer(tokenizers["llama3"], whole_text=False)
    excluded = {"messages": [user(1), answer(1), user(2), answer(2, weight=0)]}
    for row in (
        ROWS["system and two turns"],
        excluded,
        {"messages": [user(1), answer(1), user(2), answer(2)]},
    ):
        renderer.render(read(row))
    (rendered,) = renderer.render(read(excluded))
    assert rendered.text.endswith("Answer with words 1.<|eot_id|>")


@pytest.mark.parametrize("name", ["qwen3", "llama3", "deepseek_r1_distill", "nemotron_3_nano", "gptoss"])
def test_both_answers_of_a_pair_follow_the_prompt_that_asks_for_them(name: str, tokenizers: Tokenizers):
    tokenizer = tokenizers[name]
    plain = Pair([user(1)], [answer(1)], [answer(2)])
    chosen, rejected = Renderer(tokenizer, whole_text=False).render(plain)
    assert chosen.text[: chosen.spans[0][0]] == rejected.text[: rejected.spans[0][0]]
    assert "Answer with words 1." in loss_texts([chosen])[0]
    assert "Answer with words 2." in loss_texts([rejected])[0]
    if name == "llama3":
        return
    thoughts = [answer(1) | {"reasoning_content": f"A thought {number}."} for number in (1, 2)]
    sides = Renderer(tokenizer, whole_text=False).render(Pair([user(1)], thoughts[:1], thoughts[1:]))
    assert ["A thought 1." in loss_texts(sides)[0], "A thought 2." in loss_texts(sides)[1]] == [True, True]


def read(row: dict[str, Any]) -> Chat:
    chat = read_row(
        row, RowSchema("instruction_tuning", recognise(row, {}, "instruction_tuning"), {}, None, ())
    )
    assert isinstance(chat, Chat)
    return chat


def loss_texts(sequences: list[Rendered] | tuple[Rendered, ...]) -> list[str]:
    return [sequence.text[begin:end] for sequence in sequences for begin, end in sequence.spans]


def check_turns(tokenizer: PreTrainedTokenizerFast, chat: Chat) -> None:
    """Check that each turn is trained once, after the prompt that transformers renders for it, with all of its texts."""
    sequences = Renderer(tokenizer, whole_text=False).render(chat)
    answers = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
    prompts = {index: possible_prompts(tokenizer, chat, index) for index in answers}
    found = []
    for sequence in sequences:
        assert all(first[1] <= second[0] for first, second in pairwise(sequence.spans))
        for begin, end in sequence.spans:
            indices = [index for index in answers if sequence.text[:begin] in prompts[index]]
            assert indices, f"no prompt of transformers: {sequence.text[:begin]!r}"
            found += indices
            message, completion = chat.messages[indices[0]], sequence.text[begin:end]
            assert message.get("reasoning_content", "").strip() in completion
            assert message["content"].rpartition("</think>")[2].strip() in completion
            for called in message.get("tool_calls", ()):
                assert called["function"]["name"] in completion
                assert all(value in completion for value in called["function"]["arguments"].values())
    assert sorted(found) == answers
    check_ids(tokenizer, sequences)


def check_ids(tokenizer: PreTrainedTokenizerFast, sequences: Sequence[Rendered]) -> None:
    """Check that the loss tokens of each turn are those of its completion, after those of its prompt."""
    for sequence in sequences:
        encoded = Encoder(tokenizer, whole_text=False).encode([sequence])
        ids = encoded.ids.tolist()
        expected = [False] * len(ids)
        for begin, end in sequence.spans:
            prompt, completion = (
                tokenizer.encode(text, add_special_tokens=False)
                for text in (sequence.text[:begin], sequence.text[begin:end])
            )
            first, last = len(prompt), len(prompt) + len(completion)
            assert (ids[:first], ids[first:last]) == (prompt, completion)
            expected[first:last] = [True] * len(completion)
        assert encoded.trained.tolist() == expected


def possible_prompts(tokenizer: PreTrainedTokenizerFast, chat: Chat, index: int) -> set[str]:
    """Return transformers' generation prompts before a turn: with thinking on, off or not set, and after an empty thought."""
    prompts = set()
    for shape in (lambda message: message, with_parts, with_arguments_as_text):
        for switches in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
            try:
                prompt = tokenizer.apply_chat_template(
                    [shape(message) for message in chat.messages[:index]],
                    tools=chat.tools,  # pyright: ignore[reportArgumentType]
                    tokenize=False,
                    add_generation_prompt=True,
                    **switches,
                )
            except Exception:  # noqa: BLE001  # templates raise errors of many classes for messages in another shape
                continue
            prompts.add(str(prompt))
    closed = ("<think>\n\n</think>\n\n", "\n</think>\n\n", "\n<think></think>\n")
    return prompts | {prompt + thought for prompt in prompts for thought in closed}


def with_parts(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def with_arguments_as_text(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    calls = [
        {
            "type": "function",
            "function": {**each, "arguments": json.dumps(each["arguments"], ensure_ascii=False)},
        }
        for each in functions
    ]
    return {**message, "content": message["content"] or None, "tool_calls": calls}


def test_errors_number_messages_as_the_row_does(tokenizers: Tokenizers):
    renderer = Renderer(tokenizers["llama3"], whole_text=False)
    reasoned = answer(2, reasoning="A thought 2.")
    merged = {"messages": [user(1), user(1), answer(1), user(2), reasoned]}
    with pytest.raises(RowError, match=r"message 5 \(assistant\).*reasoning"):
        renderer.render(read(merged))
    with pytest.raises(RowError, match=r"message 4 \(assistant\).*reasoning"):
        renderer.render(read({"system": "Be kind.", "messages": [user(1), answer(1), user(2), reasoned]}))
    gemma = Renderer(tokenizers["gemma"], whole_text=False)
    with pytest.raises(RowError, match="chat template"):
        gemma.render(read({"system": "Be kind.", "messages": [user(1), answer(1)]}))


def test_the_date_of_a_template_is_fixed(tokenizers: Tokenizers):
    renderer = Renderer(tokenizers["gptoss"], whole_text=False, today=date(2026, 1, 2))
    (sequence,) = renderer.render(read(ROWS["one answer"]))
    assert "Current date: 2026-01-02" in sequence.text
    assert renderer.template.date == "2026-01-02"
    assert Renderer(tokenizers["qwen3"], whole_text=False).template.date is None


@pytest.mark.parametrize(("weight", "noted"), [(0, True), (1, False)])
def test_reasoning_that_no_context_holds_is_noted(weight: int, noted: bool, tokenizers: Tokenizers):
    """Qwen3 removes the reasoning of earlier turns, so that of a turn that is not in the loss reaches no token."""
    renderer = Renderer(tokenizers["qwen3"], whole_text=False)
    first = answer(1, reasoning="A thought 1.", weight=weight)
    chat = read({"messages": [user(1), first, user(2), answer(2, reasoning="A thought 2.")]})
    notes = renderer.notes(chat, renderer.render(chat))
    assert any("reasoning of earlier turns" in note for note in notes) == noted


def test_gpt_oss_trains_its_channels_and_stops_only_where_an_answer_ends(tokenizers: Tokenizers):
    """An answer has several channels, of which all but the last end with a token that must not end generation."""
    tokenizer = copy.deepcopy(tokenizers["gptoss"])
    tokenizer.add_special_tokens(
        {
            "eos_token": "<|return|>",
            "additional_special_tokens": ["<|start|>", "<|end|>", "<|channel|>", "<|message|>", "<|call|>"],
        }
    )
    called = {**call(), "thinking": "Look it up."}
    chat = read({"messages": [user(1), called, RESULT, answer(1, thinking="It is cold.")], "tools": TOOLS})
    assert loss_texts(Renderer(tokenizer, whole_text=False).render(chat)) == [
        "<|channel|>analysis<|message|>Look it up.<|end|><|start|>assistant to=functions.find_weather"
        '<|channel|>commentary json<|message|>{"city": "Tromsø"}<|call|>',
        "<|channel|>analysis<|message|>It is cold.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Answer with words 1.<|return|>",
    ]
    settings = GenerationConfig(eos_token_id=tokenizer.convert_tokens_to_ids(["<|return|>", "<|call|>"]))
    assert set(stop_tokens(settings, tokenizer)) == set(settings.eos_token_id)
    assert stop_tokens(None, tokenizer) == [tokenizer.eos_token_id]


@pytest.mark.parametrize("reasoning", ["A thought 1.", None])
def test_answer_is_found_after_the_reasoning_of_each_template(reasoning: str | None, tokenizers: Tokenizers):
    found = 0
    for name, tokenizer in tokenizers.items():
        if name in WITHOUT_REASONING:
            continue
        found += 1
        renderer = Renderer(tokenizer, whole_text=False)
        keys = {"reasoning_content": reasoning} if reasoning else {}
        (sequence,) = renderer.render(read({"messages": [user(1), answer(1, **keys)]}))
        ((begin, end),) = sequence.spans
        written = sequence.text[begin:end]
        assert (reasoning or "") in written
        found_answer = find_marks(renderer).answer_in(written, sequence.text[:begin]).strip()
        assert re.fullmatch(r"Answer with words 1\.\s*(<\S+>)?", found_answer), name
    assert found >= 15


def test_stop_tokens_contain_an_end_token_that_follows_other_text():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.chat_template = str(tokenizer.chat_template).replace("'<|im_end|>", "'\n<|im_end|>")
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert stop_tokens(None, tokenizer) == ends


def test_end_token_of_an_earlier_turn_is_not_part_of_an_answer(tokenizers: Tokenizers):
    """gpt-oss ends earlier turns with <|end|> and the last one with <|return|>; rows may have either."""
    tokenizer = copy.deepcopy(tokenizers["gptoss"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>", "<|return|>"]})
    renderer = Renderer(tokenizer, whole_text=False)
    expected = renderer.render(read(ROWS["one answer"]))
    for end in ("<|end|>", "<|return|>"):
        message = answer(1)
        message["content"] += end
        assert renderer.render(read({"messages": [user(1), message]})) == expected


def test_reasoning_of_a_conversation_points_to_the_task_that_trains_it(tokenizers: Tokenizers):
    renderer = Renderer(tokenizers["qwen3"], whole_text=True)
    with pytest.raises(RowError, match=r"message 2.*reasoning.*task: instruction_tuning"):
        renderer.render(read(ROWS["reasoning in two turns"]))


def test_arguments_are_spelled_as_the_template_spells_them_in_earlier_turns(tokenizers: Tokenizers):
    """Qwen3.5 prints a boolean as Python does, in training as in the history of a request."""
    row = copy.deepcopy({"messages": [user(1), call()], "tools": TOOLS})
    row["messages"][1]["tool_calls"][0]["function"]["arguments"] = '{"city": "Oslo", "now": true}'
    (sequence,) = Renderer(tokenizers["qwen3_5_think"], whole_text=False).render(read(row))
    assert "<parameter=now>\nTrue\n</parameter>" in loss_texts([sequence])[0]


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "strftime_now"])
def test_variables_that_each_rendering_sets_are_rejected(name: str, tokenizers: Tokenizers):
    with pytest.raises(DataError, match=rf"chat_template_kwargs\.{name}"):
        Renderer(tokenizers["qwen3"], whole_text=False, variables={name: True})
    with pytest.raises(RowError, match=rf"chat_template_kwargs\.{name}"):
        Renderer(tokenizers["qwen3"], whole_text=False).render(
            read({**ROWS["one answer"], "chat_template_kwargs": {name: True}})
        )


@pytest.mark.parametrize(
    ("name", "value", "is_text"),
    [
        ("custom_instructions", "Be kind to all.", True),
        ("xml_tools", [json.dumps(TOOLS[0])], True),
        ("custom_instructions", "", False),
        ("xml_tools", [], False),
        ("effort", "low", False),
    ],
)
def test_texts_in_variables_of_a_row_that_the_template_does_not_read_are_rejected(
    name: str, value: Any, is_text: bool, tokenizers: Tokenizers
):
    """SmolTalk2's rows have instructions and tools for SmolLM3's template."""
    chat = read({**ROWS["one answer"], "chat_template_kwargs": {name: value}})
    renderer = Renderer(tokenizers["qwen3"], whole_text=False)
    if is_text:
        for render in (renderer.render, renderer.prompt):
            with pytest.raises(RowError, match=rf"`chat_template_kwargs`.*drops `{name}`.*system message"):
                render(chat)
    else:
        (note,) = renderer.notes(chat, renderer.render(chat))
        assert note.startswith(f"`{name}` of chat_template_kwargs")


def test_documents_and_special_tokens_may_be_variables(tokenizers: Tokenizers):
    """transformers' apply_chat_template takes them as keyword arguments, too."""
    template = "{{ bos_token }}{{ documents[0].title }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = with_template(tokenizers, template)
    variables = {"documents": [{"title": "A note."}], "bos_token": "<<"}
    row = {**ROWS["one answer"], "chat_template_kwargs": variables}
    assert Renderer(tokenizer, whole_text=False).render(read(row))[0].text.startswith("<<A note.")
