"""Chat with a trained model: a single answer, or a conversation in a terminal."""

from collections.abc import Callable
from typing import Any

from configs.loading import ConfigError
from training.data.answer_marks import find_marks
from training.data.errors import RowError
from training.data.prompting import encode_prompt, stop_tokens, tokens_left_out
from training.data.records import Chat, Filled, Message
from training.data.renderer import Renderer
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
        self._renderer = Renderer(
            self._tokenizer, whole_text=False, variables=trained.config.chat_template_kwargs
        )
        self._marks = find_marks(self._renderer)
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
            def put(self, value: torch.Tensor) -> None:
                is_prompt = self.next_tokens_are_prompt
                super().put(value if is_prompt else value[[token not in hidden for token in value.tolist()]])

            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                on_text(text)

        text, is_rendered = self._render(prompt)
        tokens = torch.tensor(
            [encode_prompt(self._tokenizer, text, is_rendered=is_rendered)], device=self._model.device
        )
        stops = stop_tokens(self._model.generation_config, self._tokenizer)
        shown = self._marks.tokens.union(self._trained.config.new_special_tokens)
        hidden = tokens_left_out(self._tokenizer, stops, shown)
        streamer = Streamer(self._tokenizer, skip_prompt=True)  # pyright: ignore[reportArgumentType]
        with torch.inference_mode():
            generated = self._model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=max_new_tokens,
                eos_token_id=stops,
                pad_token_id=self._tokenizer.pad_token_id,
                streamer=streamer,
            )
        written = [token for token in generated[0, tokens.shape[1] :].tolist() if token not in hidden]
        answer = str(self._tokenizer.decode(written))
        if is_rendered:
            self._messages += [{"role": "user", "content": prompt}, self._message_of(answer, text)]
        return answer

    def _message_of(self, answer: str, prompt: str) -> Message:
        """Return an answer as a message of the conversation, with its reasoning under its key if the template writes it in its own way."""
        reasoning, content = self._marks.split(answer, prompt)
        if not self._renderer.traits.has_own_thoughts or not content.strip():
            return {"role": "assistant", "content": answer}
        message = {"role": "assistant", "content": content}
        return {**message, "reasoning_content": reasoning} if reasoning else message

    def _render(self, prompt: str) -> tuple[str, bool]:
        """Return (input text of the model, True if the chat template rendered it)."""
        template = self._trained.config.prompt_template
        if template is not None:
            return _fill(template, prompt), False
        if not self._tokenizer.chat_template:
            return prompt, False
        messages = [*self._messages, {"role": "user", "content": prompt}]
        try:
            return self._renderer.prompt(Chat(messages)), True
        except RowError as error:
            raise ConfigError(f"the conversation cannot be rendered: {error}.") from error


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
