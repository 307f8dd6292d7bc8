"""Preference tuning on top of TRL's SFTTrainer, with losses and rewards averaged over pairs.

TRL's preference trainers average over micro-batches, and they need a GPU, since they compute log-probabilities in a Triton
kernel. The tests compare these losses with TRL's.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy, logsigmoid
from trl.models.utils import prepare_deepspeed
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head, use_adapter

from configs.schema import PreferenceTuningConfig
from training.data.batches import without_mask
from training.data.row_index import IGNORED
from training.loop.trainers import FineTuningTrainer
from training.models.files import ModelError
from training.models.request import REFERENCE_ADAPTER

_SUMS = (
    *("loss", "rows", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("chosen responses", "rejected responses", "pairs"),
)
"""Quantities that an evaluation and a step sum up, in this order."""
_LARGEST_FIRST_REWARD = 0.01  # rounding; a wrong reference gives rewards of the order of 1


def collate_pairs(
    pad_token_id: int, multiple: int | None, *, masked: bool
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Return a collator for pairs: one sequence per response, all chosen ones first, with labels on the responses.

    `sides`, bool [2, pairs], tells which pairs have a chosen and a rejected sequence in the batch; an unpaired row has one of them.
    If rows have mismatched responses, `mismatched` is a second batch of the same form.

    Args:
        pad_token_id: Token that pads sequences.
        multiple: Passed as `pad_to_multiple_of`.
        masked: True if batches need an attention mask.
    """
    collator = DataCollatorForLanguageModeling(pad_token_id, pad_to_multiple_of=multiple)
    collate_sequences = collator if masked else without_mask(collator)

    def collate_responses(examples: list[dict[str, Any]], prefix: str) -> dict[str, Any]:
        sequences: list[dict[str, Any]] = []
        sides: list[list[bool]] = []
        for side in (f"{prefix}chosen_ids", f"{prefix}rejected_ids"):
            sides.append([])
            for example in examples:
                prompt, response = example["prompt_ids"], example[side]
                is_padding = not (example[f"{prefix}chosen_ids"] or example[f"{prefix}rejected_ids"])
                sides[-1].append(bool(response) or is_padding)
                if sides[-1][-1]:
                    labels = [IGNORED] * len(prompt) + response
                    sequences.append({"input_ids": prompt + response, "labels": labels})
        return collate_sequences(sequences) | {"sides": torch.tensor(sides)}

    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate_responses(examples, "")
        if "mismatched_chosen_ids" in examples[0]:
            batch["mismatched"] = collate_responses(examples, "mismatched_")
        return batch

    return collate


def pair_losses(
    settings: PreferenceTuningConfig,
    policy: torch.Tensor,
    reference: torch.Tensor,
    tokens: torch.Tensor,
    divergence: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each pair and the implicit rewards of its responses.

    Args:
        settings: Loss type, beta and the weights of kto.
        policy: Log-probability of each response in nats, (2, pairs), chosen first.
        reference: The same under the reference model; unused by orpo.
        tokens: Number of tokens of each response, (2, pairs); 0 for the response that an unpaired row does not have (kto only).
        divergence: Estimated KL divergence from the reference in nats, at least 0; only for kto.

    Returns:
        Losses (pairs) and rewards (2, pairs).

    dpo: Rafailov et al. 2023 (arXiv 2305.18290), eq. 7. ipo: Azar et al. 2023 (arXiv 2310.12036), eq. 17, with
    log-probabilities per token, as in the authors' code. orpo: Hong et al. 2024 (arXiv 2403.07691), eqs. 6 and 7, with beta as
    its lambda. kto: Ethayarajh et al. 2024 (arXiv 2402.01306), eqs. 7 and 8, averaged over the responses of a row: one, or the
    desirable and the undesirable one of a pair.
    """
    beta = settings.beta
    if settings.loss == "orpo":
        chosen, rejected = policy / tokens
        log_odds = chosen - rejected - torch.log(-torch.expm1(chosen)) + torch.log(-torch.expm1(rejected))
        return -chosen - beta * logsigmoid(log_odds), beta * policy / tokens
    ratios = policy - reference
    rewards = beta * ratios
    match settings.loss:
        case "dpo":
            return -logsigmoid(rewards[0] - rewards[1]), rewards
        case "ipo":
            chosen, rejected = ratios / tokens
            return (chosen - rejected - 1 / (2 * beta)) ** 2, rewards
        case "kto":
            assert divergence is not None
            desirable = 1 - torch.sigmoid(rewards[0] - beta * divergence)
            undesirable = 1 - torch.sigmoid(beta * divergence - rewards[1])
            losses = torch.stack(
                [settings.desirable_weight * desirable, settings.undesirable_weight * undesirable]
            )
            exists = tokens > 0
            return torch.where(exists, losses, 0).sum(0) / exists.sum(0), rewards


class PreferenceTrainer(FineTuningTrainer):
    """A trainer for preference pairs.

    The reference is the base model without its new adapter, the initial state of a continued adapter, or a frozen model copy.
    """

    def __init__(self, *, reference_model: Any | None, **arguments: Any):
        """Build the trainer.

        Args:
            reference_model: Frozen copy of the model in full-parameter training; None with LoRA or if the loss needs none.
            arguments: Passed to FineTuningTrainer.
        """
        super().__init__(**arguments)
        self.settings = self.config.preference
        self.model_accepts_loss_kwargs = True  # the loss is divided by the number of pairs in the step
        self.reference_model = self._prepared(reference_model) if reference_model is not None else None
        self._trained = self._no_sums()
        self._divergence: torch.Tensor | None = None  # set during an evaluation

    def _prepared(self, model: Any) -> Any:
        model.requires_grad_(False)
        model.eval()
        if not self.loss_of_transformers:
            add_fused_lm_head(model)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(model, self.accelerator)
        return model.to(self.args.device)

    def _no_sums(self) -> torch.Tensor:
        return torch.zeros(len(_SUMS), dtype=torch.float64, device=self.args.device)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """Return the number of rows in a step, over all workers."""
        counts = (self._is_row(_lengths(batch["labels"], batch["sides"])).sum() for batch in batch_samples)
        count = sum(counts, torch.tensor(0))
        return self.of_all_workers(count.to(device))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return this worker's share of the mean over the step's rows; DDP averages over workers."""
        losses, rewards, exists = self._pairs(model, inputs)
        self._trained += _sums(losses, rewards, exists)
        return losses.sum() / num_items_in_batch * self.args.world_size

    def sums(self, model: Any, inputs: Any) -> torch.Tensor:
        """Return the sums of loss, rows and reward figures of a batch."""
        return _sums(*self._pairs(model, inputs))

    def figures(self, totals: list[float]) -> dict[str, float]:
        """Return the mean loss of the rows and the mean reward figures of their responses.

        Rows without a pair have no accuracy, and their margin is the difference of the mean rewards.
        """
        sums = dict(zip(_SUMS, totals, strict=True))
        figures = {"loss": sums["loss"] / sums["rows"]}
        for side in ("chosen", "rejected"):
            if sums[f"{side} responses"]:
                figures[f"rewards/{side}"] = sums[f"rewards/{side}"] / sums[f"{side} responses"]
        if sums["pairs"]:
            figures |= {
                name: sums[name] / sums["pairs"] for name in ("rewards/margins", "rewards/accuracies")
            }
        elif sums["chosen responses"] and sums["rejected responses"]:
            figures["rewards/margins"] = figures["rewards/chosen"] - figures["rewards/rejected"]
        return figures

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the reward figures of the step to the logs."""
        if "loss" in logs:
            figures = self.figures(self.of_all_workers(self._trained).tolist())
            logs |= {name: figures[name] for name in figures.keys() - {"loss"}}
            self._trained = self._no_sums()
        super().log(logs, start_time)

    def run_largest_batch(self) -> None:
        """Run the largest batch as in FineTuningTrainer, and leave the reward figures unchanged."""
        trained = self._trained.clone()
        super().run_largest_batch()
        self._trained = trained

    def evaluated(self, sequences: Any) -> dict[str, float]:
        """Return the metrics as in FineTuningTrainer, with kto's divergence computed over all rows of the set."""
        if self.settings.loss == "kto":
            totals = self.added_up(sequences, self._divergence_sums)
            self._divergence = _mean_divergence(totals)
        figures = super().evaluated(sequences)
        self._divergence = None
        if self.state.global_step == 0 and self.settings.needs_reference:
            check_first_rewards(figures)
        return figures

    def _divergence_sums(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Return the sum and number of log-ratios of mismatched responses."""
        mismatched = inputs["mismatched"]
        exists = _lengths(mismatched["labels"], mismatched["sides"]) > 0
        with torch.no_grad():
            policy = self._log_probabilities(model, mismatched)
            ratios = (policy - self._under_reference(mismatched))[exists]
        return torch.stack([ratios.sum(), torch.tensor(ratios.numel(), device=ratios.device)]).double()

    def _is_row(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return a mask of the real rows of a batch, bool [pairs], from the tokens of their responses; the others are padding."""
        return (tokens > 0).any(0) if self.settings.takes_unpaired_rows else (tokens > 0).all(0)

    def _pairs(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return losses (rows), rewards (2, rows) and which responses exist (2, rows) of a batch, without padding pairs."""
        divergence = self._divergence
        if divergence is None and self.settings.loss == "kto":
            divergence = _mean_divergence(self.of_all_workers(self._divergence_sums(model, inputs)))
        inputs = {name: value for name, value in inputs.items() if name != "mismatched"}
        policy = self._log_probabilities(model, inputs)
        reference = (
            self._under_reference(inputs) if self.settings.needs_reference else torch.zeros_like(policy)
        )
        tokens = _lengths(inputs["labels"], inputs["sides"])
        real = self._is_row(tokens)
        tokens = tokens[:, real]
        losses, rewards = pair_losses(self.settings, policy[:, real], reference[:, real], tokens, divergence)
        return losses, rewards.detach(), tokens > 0

    def _log_probabilities(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Return the total log-probability of each response, (2, pairs); 0 if a pair does not have it."""
        sides = inputs["sides"]
        inputs = {name: value for name, value in inputs.items() if name != "sides"} | {"use_cache": False}
        if self.loss_of_transformers:
            labels = inputs.pop("labels")
            per_token = -_token_losses(model(**inputs).logits, labels)
        else:
            per_token = model(**inputs, fused_lm_head=True).log_probs
        return _by_side(per_token.sum(1).float(), sides)

    def _under_reference(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad(), self.accelerator.autocast(), self._reference() as reference:
            return self._log_probabilities(reference, inputs)

    @contextmanager
    def _reference(self) -> Iterator[Any]:
        if self.reference_model is not None:
            yield self.reference_model
            return
        model: Any = self.model
        was_training = model.training
        model.eval()  # no dropout
        adapter = REFERENCE_ADAPTER if REFERENCE_ADAPTER in model.peft_config else None
        with use_adapter(model, adapter):
            yield model
        model.train(was_training)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        assert self.args.output_dir is not None
        reference = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / REFERENCE_ADAPTER
        if self.args.should_save and reference.exists():
            shutil.rmtree(reference)  # it equals the run's starting adapter


def check_first_rewards(figures: Mapping[str, float]) -> None:
    """Check that the reference is the model's initial state: before the first step, every reward is 0.

    Args:
        figures: Figures of the evaluation before the first step; rewards in nats, times beta.
    """
    for name in ("rewards/chosen", "rewards/rejected"):
        reward = figures.get(name, 0.0)
        if not abs(reward) <= _LARGEST_FIRST_REWARD:
            raise ModelError(
                f"before the first step, {name} is {reward:.4f} instead of 0: the reference of the preference loss is not the model that "
                "the run starts from. Merge the adapter with main.py export, and write the merged model as model_id."
            )


def _token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the loss of each label in nats, 0 where IGNORED: (rows, tokens) -> (rows, tokens - 1)."""
    return cross_entropy(
        logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=IGNORED
    )


def _by_side(values: torch.Tensor, sides: torch.Tensor) -> torch.Tensor:
    """Arrange values of the sequences of a batch by side and pair, (2, pairs), with 0 where there is no sequence."""
    arranged = values.new_zeros(sides.shape)
    arranged[sides] = values
    return arranged


def _lengths(labels: torch.Tensor, sides: torch.Tensor) -> torch.Tensor:
    """Return the number of tokens of each response, (2, pairs)."""
    return _by_side((labels[:, 1:] != IGNORED).sum(1), sides)


def _sums(losses: torch.Tensor, rewards: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
    """Return the entries of `_SUMS`; the reward of a response that does not exist is 0."""
    chosen, rejected = rewards.double()
    is_pair = exists.all(0)
    sums = (
        losses.detach().double(),
        torch.ones_like(chosen),
        chosen,
        rejected,
        (chosen - rejected)[is_pair],
        (chosen > rejected)[is_pair].double(),
        *exists.double(),
        is_pair.double(),
    )
    return torch.stack([each.sum() for each in sums])


def _mean_divergence(totals: torch.Tensor) -> torch.Tensor:
    return (totals[0] / totals[1].clamp(min=1)).clamp(min=0).float()
