"""Completions of a few validation prompts at each evaluation. They show what the eval loss does not: what the model writes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from runs.layout import EvalSample
from training.data.prepared import PreparedData
from training.data.prompting import stop_tokens
from training.data.row_index import IGNORED
from training.models.adapter import base_of
from training.models.architecture import most_positions
from training.models.attention import plain_attention
from training.models.varlen_attention import NAME as VARLEN
from training.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SHOWN_CHARACTERS = 2000


@dataclass(frozen=True)
class Prompt:
    """A validation row, cut before its last answer."""

    row: str
    """Source location, `FILE:ROW`."""
    tokens: list[int]
    """Token ids up to the answer, as they are trained on: with the generation prompt."""
    reference: list[int]
    """Token ids of the row's own answer; empty for an unpaired row whose response is not desirable."""


def choose_prompts(valid: PreparedData, count: int, seed: int, most_tokens: int | None) -> list[Prompt]:
    """Return prompts of randomly chosen rows. They depend on the rows and the seed only, so that each evaluation has the same.

    Args:
        valid: The validation rows.
        count: Number of prompts, fewer if there are not so many rows with a prompt.
        seed: Seed of the choice.
        most_tokens: Maximum context of the model in tokens; longer prompts are not chosen.
    """
    rows = valid.dataset()
    prompts: list[Prompt] = []
    for row in np.random.default_rng(seed).permutation(len(rows)).tolist():
        if len(prompts) == count:
            break
        tokens, reference = split_row(rows[row])
        if tokens and (most_tokens is None or len(tokens) < most_tokens):
            prompts.append(Prompt(valid.place(row), tokens, reference))
    return prompts


def split_row(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Return the token ids of a prepared row (before, in) its last answer, which is the chosen one of a pair."""
    if "prompt_ids" in row:
        return row["prompt_ids"], row["chosen_ids"]
    is_trained = np.array(row["labels"]) != IGNORED
    if not is_trained.any():
        return [], []
    end = int(np.flatnonzero(is_trained)[-1]) + 1
    before = np.flatnonzero(~is_trained[:end])
    begin = int(before[-1]) + 1 if len(before) else 0
    return row["input_ids"][:begin], row["input_ids"][begin:end]


class Sampling(TrainerCallback):
    """A callback that generates an answer to each prompt after an evaluation, greedily. Every rank generates a share of them.

    Training is unchanged: random states and the model's mode are restored, and the model's settings are not touched.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        tokenizer: "PreTrainedTokenizerFast",
        *,
        max_new_tokens: int,
        world: World,
        autocast: Callable[[], AbstractContextManager[Any]],
        is_sharded: bool,
        write: Callable[[int, str], None],
        on_progress: Callable[[float], None],
    ):
        """Create the callback.

        Args:
            prompts: The result of `choose_prompts`.
            tokenizer: The model's tokenizer.
            max_new_tokens: Maximum length of an answer.
            world: This worker.
            autocast: Returns the context in which the trainer runs the model.
            is_sharded: True under ZeRO-3, where all ranks must run the same number of forward passes.
            write: Called on rank 0 with the step and the text of its record.
            on_progress: Called with the fraction that is done, 0 to 1.
        """
        self.prompts = prompts
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.world = world
        self.autocast = autocast
        self.is_sharded = is_sharded
        self.write = write
        self.on_progress = on_progress

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Generate the answers, and write them on rank 0."""
        if not self.prompts:
            return
        base = base_of(model)
        was_training = model.training
        devices = [] if args.use_cpu else [torch.cuda.current_device()]
        answers: dict[int, list[int]] = {}
        model.eval()
        with torch.random.fork_rng(devices), torch.no_grad(), self.autocast(), _with_plain_attention(base):
            mine = self._mine()
            for number, index in enumerate(mine, start=1):
                answers[index] = self._answer(base, self.prompts[index], args.device)
                self.on_progress(number / len(mine))
        model.train(was_training)
        gathered = {index: answer for part in self.world.gather(answers) for index, answer in part.items()}
        if self.world.rank == 0:
            stops = stop_tokens(base.generation_config, self.tokenizer)
            samples = [
                self._sample(state, prompt, gathered[index], stops)
                for index, prompt in enumerate(self.prompts)
            ]
            self.write(state.global_step, "".join(f"{sample.model_dump_json()}\n" for sample in samples))

    def _mine(self) -> list[int]:
        """Return the prompts of this rank; under ZeRO-3 the same number on every rank, by repeating some."""
        count, ranks = len(self.prompts), self.world.world_size
        if self.is_sharded:
            return [index % count for index in range(self.world.rank, -(-count // ranks) * ranks, ranks)]
        return list(range(self.world.rank, count, ranks))

    def _answer(self, base: Any, prompt: Prompt, device: torch.device) -> list[int]:
        """Return the token ids that the model generates, including the stop token."""
        tokens = torch.tensor([prompt.tokens], device=device)
        limit = most_positions(base.config)
        most_new = (
            self.max_new_tokens if limit is None else min(self.max_new_tokens, limit - len(prompt.tokens))
        )
        generated = base.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            num_beams=1,
            use_cache=True,  # the model's own setting is off in training
            max_new_tokens=most_new,
            eos_token_id=stop_tokens(base.generation_config, self.tokenizer),
            pad_token_id=self.tokenizer.pad_token_id,
            synced_gpus=self.is_sharded and self.world.world_size > 1,
        )
        return generated[0, len(prompt.tokens) :].tolist()

    def _sample(self, state: TrainerState, prompt: Prompt, answer: list[int], stops: list[int]) -> EvalSample:
        written, ended = _until_stop(answer, stops)
        reference, _ = _until_stop(prompt.reference, stops)
        return EvalSample(
            step=state.global_step,
            row=prompt.row,
            prompt=_end_of(self.tokenizer.decode(prompt.tokens)),
            completion=_beginning_of(self.tokenizer.decode(written)),
            reference=_beginning_of(self.tokenizer.decode(reference)),
            tokens=len(answer),
            ended=ended,
        )


@contextmanager
def _with_plain_attention(base: Any) -> Iterator[None]:
    """Replace the attention for packed rows, which has no KV cache and needs row boundaries."""
    implementation = base.config._attn_implementation
    if implementation != VARLEN:
        yield
        return
    base.set_attn_implementation(plain_attention(base.config))
    yield
    base.set_attn_implementation(implementation)


def _until_stop(tokens: list[int], stops: list[int]) -> tuple[list[int], bool]:
    """Return (the tokens before the first stop token, whether there is one)."""
    end = next((place for place, token in enumerate(tokens) if token in stops), None)
    return tokens[:end], end is not None


def _beginning_of(text: Any) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def _end_of(text: Any) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"…{text[-_SHOWN_CHARACTERS:]}"
