"""Chat with a trained model: a single answer, or a conversation in a terminal."""

from collections.abc import Callable
from typing import Any

from configs.loading import ConfigError
from training.data.errors import RowError
from training.data.prompting import encode_prompt, stop_tokens
from training.data.records import Filled, Message
from training.data.rows import RowSchema, places_of, read_row
from training.inference.checkpoint_model import TrainedModel
from training.models.kernels import device_here
from utils.processes import importing


def import_libraries() -> None:
    """Import torch and what a conversation needs of transformers, which no setting of the run changes."""
    with importing():
        import torch  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer  # noqa: F401


class Conversation:
    """A conversation with a model; models with a chat template receive the earlier turns."""

    def __init__(self, trained: TrainedModel):
        """Load the model on the first GPU if there is one, else on the CPU."""
        self._trained = trained
        self._tokenizer = trained.tokenizer()
        self._messages: list[Message] = []
        _ = self._render("probe")  # report errors before loading the weights
        self._model: Any = trained.load(device_here())

    def answer(self, prompt: str, on_text: Callable[[str], None], *, max_new_tokens: int) -> str:
        """Generate the answer to a prompt and return it.

        Args:
            prompt: The user's message.
            on_text: Called with each piece of the answer during generation.
            max_new_tokens: Maximum length of the answer.
        """
        import torch
        from transformers import TextStreamer

        class Streamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                on_text(text)

        text, is_rendered = self._render(prompt)
        tokens = torch.tensor(
            [encode_prompt(self._tokenizer, text, is_rendered=is_rendered)], device=self._model.device
        )
        streamer = Streamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)  # pyright: ignore[reportArgumentType]
        with torch.inference_mode():
            generated = self._model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=max_new_tokens,
                eos_token_id=stop_tokens(self._model.generation_config, self._tokenizer),
                pad_token_id=self._tokenizer.pad_token_id,
                streamer=streamer,
            )
        answer = str(self._tokenizer.decode(generated[0, tokens.shape[1] :], skip_special_tokens=True))
        if is_rendered:
            self._messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return answer

    def _render(self, prompt: str) -> tuple[str, bool]:
        """Return (input text of the model, True if the chat template rendered it)."""
        template = self._trained.config.prompt_template
        if template is not None:
            return _fill(template, prompt), False
        if not self._tokenizer.chat_template:
            return prompt, False
        messages = [*self._messages, {"role": "user", "content": prompt}]
        return str(
            self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=True,
                **self._trained.config.chat_template_kwargs or {},
            )
        ), True


def _fill(template: str, prompt: str) -> str:
    """Return the template up to its answer, with the prompt in the first placeholder and an empty `input`."""
    *placeholders, answer = places_of(template)
    row = {placeholders[0]: prompt, answer: "-"}
    try:
        filled = read_row(row, RowSchema("instruction_tuning", "instruction", {}, template, ()))
    except RowError as error:
        raise ConfigError(
            f"prompt_template: requires {', '.join(placeholders)}, but a chat turn has only one text. Use main.py evaluate with a file of rows."
        ) from error
    assert isinstance(filled, Filled)
    return filled.prompt
