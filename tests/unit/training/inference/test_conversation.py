"""A conversation shows the reasoning of a model as it writes it, and renders it in later prompts as training does."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.tiny_model import make_tokenizer
from training.inference.chat import Conversation

TURN = "{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}</user>{% else %}<bot>"
END = "</bot>{% endif %}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
CHANNELS = "{% if m.thinking %}<|analysis|>{{ m.thinking }}{% endif %}<|final|>{{ m.content }}"
IN_PARTS = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{% if part['type'] == 'thinking' %}"
    "[THINK]{{ part['thinking'] }}[/THINK]{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
)
SPECIAL = ["<user>", "</user>", "<bot>", "</bot>", "<|analysis|>", "<|final|>", "[THINK]", "[/THINK]"]


class Scripted:
    """A model that writes given answers and keeps its prompts."""

    generation_config = None
    device = "cpu"

    def __init__(self, tokenizer: Any, *answers: str):
        self.prompts: list[str] = []
        self._tokenizer, self._answers = tokenizer, list(answers)

    def generate(self, input_ids: torch.Tensor, streamer: Any, **_: Any) -> torch.Tensor:
        self.prompts.append(self._tokenizer.decode(input_ids[0]))
        written = self._tokenizer.encode(f"{self._answers.pop(0)}</bot>", add_special_tokens=False)
        streamer.put(input_ids)
        for token in written:
            streamer.put(torch.tensor([token]))
        streamer.end()
        return torch.cat([input_ids, torch.tensor([written])], 1)


@pytest.mark.parametrize(
    ("template", "written", "later"),
    [
        (CHANNELS, "<|analysis|>Is it 5?<|final|>It is 4.", "<|analysis|>Is it 5?<|final|>It is 4."),
        (CHANNELS, "<|final|>It is 4.", "<|final|>It is 4."),
        (IN_PARTS, "[THINK]Is it 5?[/THINK]It is 4.", "[THINK]Is it 5?[/THINK]It is 4."),
        (
            "{{ m.content }}",
            "<think>\nIs it 5?\n</think>\n\nIt is 4.",
            "<think>\nIs it 5?\n</think>\n\nIt is 4.",
        ),
        ("{{ m.content.split('</think>')[-1] }}", "<think>\nIs it 5?\n</think>\n\nIt is 4.", "\n\nIt is 4."),
        ("{{ m.content }}", "It is 4.", "It is 4."),
    ],
)
def test_answers_are_rendered_in_later_prompts_as_in_training(template: str, written: str, later: str):
    tokenizer: Any = make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</bot>", "additional_special_tokens": SPECIAL})
    tokenizer.chat_template = TURN + template + END
    model = Scripted(tokenizer, written, "Yes.")
    config = SimpleNamespace(chat_template_kwargs=None, prompt_template=None, new_special_tokens=[])
    trained: Any = SimpleNamespace(tokenizer=lambda: tokenizer, load=lambda device: model, config=config)
    conversation = Conversation(trained)
    shown: list[str] = []
    assert conversation.answer("2 + 2?", shown.append, max_new_tokens=50) == written
    assert "".join(shown) == written
    conversation.answer("Sure?", shown.append, max_new_tokens=50)
    assert model.prompts[1] == f"<user>2 + 2?</user><bot>{later}</bot><user>Sure?</user><bot>"
