"""Preference losses compared with TRL's trainers, and padding pairs that must not change them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.orpo import ORPOTrainer

from configs.schema import PreferenceTuningConfig
from tests.support.trainers import cpu_arguments, make_trainer
from training.data.batches import PADDING_ROW, BatchPlan, BatchShape, PairSequences
from training.data.row_index import IGNORED
from training.loop.preference import PreferenceTrainer, check_first_rewards, collate_pairs, pair_losses
from training.loop.trainers import TrainingRows
from training.models.files import ModelError

PAIRS = 6
BETA = 0.3


@pytest.fixture(scope="module")
def rows() -> Dataset:
    generator = torch.Generator().manual_seed(0)

    def ids(maximum: int) -> list[int]:
        length = int(torch.randint(2, maximum, (), generator=generator))
        return torch.randint(3, 500, (length,), generator=generator).tolist()

    return Dataset.from_list(
        [{"prompt_ids": ids(20), "chosen_ids": ids(12), "rejected_ids": ids(12)} for _ in range(PAIRS)]
    )


def tuned_model(tiny_model: Path) -> Any:
    """Return the tiny model with an adapter that differs from its reference."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


@pytest.fixture(scope="module")
def unpaired(rows: Dataset) -> Dataset:
    """Rows with one response each: the first, second, fourth and fifth are good answers."""
    return Dataset.from_list(
        [
            dict(row) | {("chosen_ids", "rejected_ids")[number % 3 < 2]: []}
            for number, row in enumerate(rows.to_list())
        ]
    )


def trainer_of(
    loss: str, tiny_model: Path, rows: Dataset, directory: Path, **settings: float
) -> PreferenceTrainer:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    pairs = PairSequences(rows, tokenizer.pad_token_id, with_mismatched=loss == "kto")
    plan = BatchPlan(BatchShape(PAIRS, 2, 1, 1), 0)
    trainer = make_trainer(
        tuned_model(tiny_model),
        TrainingRows(plan, pairs, pairs, collate_pairs(tokenizer.pad_token_id, None, masked=False)),
        tokenizer,
        cpu_arguments(directory, max_steps=1, per_device_eval_batch_size=4),
        config={
            "task": "preference_tuning",
            "preference_tuning_config": {"loss": loss, "beta": BETA, **settings},
        },
    )
    trainer.model_wrapped = trainer.model
    return trainer


def sums_of(trainer: PreferenceTrainer, indices: list[int]) -> torch.Tensor:
    assert trainer.model is not None
    trainer.model.eval()
    with torch.no_grad():
        return trainer.sums(
            trainer.model, trainer.rows.collate([trainer.rows.train[index] for index in indices])
        )


class LogProbabilities:
    """A torch implementation of TRL's Triton kernel, which needs a GPU."""

    @staticmethod
    def apply(hidden: torch.Tensor, weight: torch.Tensor, bias: None, labels: torch.Tensor, *_: Any) -> Any:
        logits = hidden @ weight.T
        log_probabilities = logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
        unused = torch.zeros_like(log_probabilities)
        return log_probabilities, unused, None, unused, labels == -1


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_dpo_and_ipo_losses_and_rewards_match_those_of_trl(
    loss: str, tiny_model: Path, rows: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", LogProbabilities)
    trainer = trainer_of(loss, tiny_model, rows, tmp_path / "ours")
    text = rows.map(lambda row: {"prompt": "a", "chosen": "b", "rejected": "c"})
    trl_trainer = DPOTrainer(
        # The reference is the model without the adapter, as in a first run.
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
        args=DPOConfig(
            str(tmp_path / "theirs"),
            use_cpu=True,
            bf16=False,
            report_to=[],
            beta=BETA,
            loss_type=["sigmoid" if loss == "dpo" else "ipo"],
        ),
        train_dataset=text,
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    trl_trainer.model.load_state_dict(trainer.model.state_dict())  # pyright: ignore
    trl_trainer.model.eval()  # pyright: ignore
    with torch.no_grad():
        expected = trl_trainer.compute_loss(trl_trainer.model, trl_trainer.data_collator(list(rows)))
    sums = sums_of(trainer, list(range(PAIRS))) / PAIRS
    metrics = {name: values[-1] for name, values in trl_trainer._metrics["eval"].items()}
    assert sums[0].item() == pytest.approx(expected.item(), abs=1e-5)
    assert sums[2].item() == pytest.approx(metrics["rewards/chosen"], abs=1e-5)
    assert sums[3].item() == pytest.approx(metrics["rewards/rejected"], abs=1e-5)
    assert sums[4].item() == pytest.approx(metrics["rewards/margins"], abs=1e-5)
    assert sums[5].item() == pytest.approx(metrics["rewards/accuracies"], abs=1e-5)
    assert abs(sums[4].item()) > 1e-3


def test_kto_losses_and_rewards_of_unpaired_rows_match_those_of_trl(
    tiny_model: Path, unpaired: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", LogProbabilities)
    weights: dict[str, Any] = {"desirable_weight": 0.75, "undesirable_weight": 1.5}
    trainer = trainer_of("kto", tiny_model, unpaired, tmp_path / "ours", **weights)
    model: Any = trainer.model
    torch.manual_seed(
        0
    )  # this adapter makes the mismatched responses more probable, so the divergence is above 0
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    responses = [row["chosen_ids"] or row["rejected_ids"] for row in unpaired.to_list()]
    examples = [
        {
            "prompt_ids": row["prompt_ids"],
            "completion_ids": responses[number],
            "KL_completion_ids": responses[(number + 1) % PAIRS],
            "label": bool(row["chosen_ids"]),
        }
        for number, row in enumerate(unpaired.to_list())
    ]
    trl_trainer = KTOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
        args=KTOConfig(
            str(tmp_path / "theirs"), use_cpu=True, bf16=False, report_to=[], beta=BETA, **weights
        ),
        train_dataset=unpaired.map(
            lambda row: {"prompt": "a", "completion": "b", "label": True}
        ).select_columns(["prompt", "completion", "label"]),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    trl_trainer.model.load_state_dict(trainer.model.state_dict())  # pyright: ignore
    trl_trainer.model.eval()  # pyright: ignore
    with torch.no_grad():
        theirs: Any = trl_trainer.model
        expected = trl_trainer.compute_loss(theirs, trl_trainer.data_collator(examples))
    figures = trainer.figures(sums_of(trainer, list(range(PAIRS))).tolist())
    metrics = {name: values[-1] for name, values in trl_trainer._metrics["eval"].items()}
    assert metrics["kl"] > 1e-3, "the divergence is not tested if it is 0"
    assert figures.pop("loss") == pytest.approx(expected.item(), abs=1e-5)
    assert set(figures) == {"rewards/chosen", "rewards/rejected", "rewards/margins"}
    for name, value in figures.items():
        assert value == pytest.approx(metrics[name], abs=1e-5)


def test_sequence_of_a_missing_response_is_not_computed(unpaired: Dataset):
    batch = collate_pairs(0, None, masked=False)([unpaired[0], unpaired[1], unpaired[2]])
    assert len(batch["input_ids"]) == 3
    assert batch["sides"].tolist() == [[True, True, False], [False, False, True]]
    assert batch["labels"][2].tolist()[: len(unpaired[2]["prompt_ids"])] == [IGNORED] * len(
        unpaired[2]["prompt_ids"]
    )


def test_orpo_losses_and_rewards_match_those_of_trl():
    """The likelihood term differs: here it covers only the answer, as in the paper."""
    torch.manual_seed(0)
    tokens = torch.randint(2, 9, (2, 5))
    policy = -3 * torch.rand(2, 5) * tokens
    settings = PreferenceTuningConfig(loss="orpo", beta=BETA)
    losses, rewards = pair_losses(settings, policy, torch.zeros(2, 5), tokens, None)

    class TrlTrainer:
        beta = BETA

        class accelerator:  # noqa: N801
            device = "cpu"

    expected, chosen, rejected, _, _ = ORPOTrainer.odds_ratio_loss(TrlTrainer(), *(policy / tokens))  # pyright: ignore
    torch.testing.assert_close(losses, -(policy / tokens)[0] - expected)
    torch.testing.assert_close(rewards, torch.stack([chosen, rejected]))


def test_kto_loss_compares_rewards_with_the_divergence():
    """The expected values are calculated from rewards of 0.3 * (1, -2) and a divergence of 0.5 nats."""
    settings = PreferenceTuningConfig(loss="kto", beta=BETA)
    policy = torch.tensor([[-4.0], [-9.0]])
    reference = torch.tensor([[-5.0], [-7.0]])
    losses, rewards = pair_losses(
        settings, policy, reference, torch.ones(2, 1, dtype=torch.int64), torch.tensor(0.5)
    )
    assert rewards.flatten().tolist() == pytest.approx([0.3, -0.6])
    # 1 - (sigmoid(0.15) + sigmoid(0.75)) / 2
    assert losses.item() == pytest.approx(1 - (0.537430 + 0.679179) / 2, abs=1e-5)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "orpo", "kto"])
def test_padding_pairs_do_not_change_the_sums(loss: str, tiny_model: Path, rows: Dataset, tmp_path: Path):
    trainer = trainer_of(loss, tiny_model, rows, tmp_path)
    full = sums_of(trainer, [0, 1])
    filled = sums_of(trainer, [0, PADDING_ROW, 1, PADDING_ROW])
    torch.testing.assert_close(filled, full, atol=1e-5, rtol=1e-5)
    assert full[1].item() == 2
    assert sums_of(trainer, [PADDING_ROW, PADDING_ROW]).tolist() == [0.0] * 9


@pytest.mark.parametrize("loss", ["dpo", "ipo", "orpo", "kto"])
def test_batch_of_padding_pairs_has_zero_loss_and_gradients(
    loss: str, tiny_model: Path, rows: Dataset, tmp_path: Path
):
    trainer = trainer_of(loss, tiny_model, rows, tmp_path)
    model: Any = trainer.model
    batch = trainer.rows.collate([trainer.rows.train[PADDING_ROW]])
    loss_ = trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(3))
    loss_.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert loss_.item() == 0
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_padding_rows_do_not_change_the_sums_of_unpaired_rows(
    tiny_model: Path, unpaired: Dataset, tmp_path: Path
):
    trainer = trainer_of("kto", tiny_model, unpaired, tmp_path)
    full = sums_of(trainer, [0, 2])
    filled = sums_of(trainer, [0, PADDING_ROW, 2, PADDING_ROW])
    torch.testing.assert_close(filled, full, atol=1e-5, rtol=1e-5)
    assert full[1].item() == 2
    trainer.state.global_step = 1  # before the first step, rewards must be 0
    metrics_by_size = {}
    for size in (1, 4):
        trainer.args.per_device_eval_batch_size = size
        metrics_by_size[size] = trainer.evaluate()
    assert metrics_by_size[1] == pytest.approx(metrics_by_size[4], abs=1e-5)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_evaluation_does_not_depend_on_the_batch_size(
    loss: str, tiny_model: Path, rows: Dataset, tmp_path: Path
):
    trainer = trainer_of(loss, tiny_model, rows, tmp_path)
    trainer.state.global_step = 1  # before the first step, rewards must be 0
    metrics_by_size = {}
    for size in (1, 4):
        trainer.args.per_device_eval_batch_size = size
        metrics_by_size[size] = trainer.evaluate()
    assert metrics_by_size[1] == pytest.approx(metrics_by_size[4], abs=1e-5)
    assert set(metrics_by_size[1]) == {
        "eval_loss",
        "eval_rewards/chosen",
        "eval_rewards/rejected",
        "eval_rewards/margins",
        "eval_rewards/accuracies",
    }


def test_mismatched_answer_is_that_of_the_next_row_with_another_prompt(rows: Dataset):
    same = Dataset.from_list(
        [dict(row) | {"prompt_ids": [3 + number // 2]} for number, row in enumerate(rows.to_list())]
    )
    pairs = PairSequences(same, 0, with_mismatched=True)
    assert pairs[0]["mismatched_chosen_ids"] == rows[2]["chosen_ids"]
    assert pairs[1]["mismatched_chosen_ids"] == rows[2]["chosen_ids"]


def test_mismatched_answer_is_that_of_the_next_pair(rows: Dataset):
    last = PairSequences(rows, 0, with_mismatched=True)[PAIRS - 1]
    assert last["chosen_ids"] == rows[PAIRS - 1]["chosen_ids"]
    assert last["mismatched_chosen_ids"] == rows[0]["chosen_ids"]
    batch = collate_pairs(0, None, masked=False)([last])
    labels = batch["mismatched"]["labels"]
    assert labels[0][labels[0] != IGNORED].tolist() == rows[0]["chosen_ids"]


def test_first_rewards_other_than_zero_raise_an_error():
    check_first_rewards({"rewards/chosen": 1e-4, "rewards/rejected": -1e-4})
    for rewards in ({"rewards/chosen": 3.84}, {"rewards/rejected": float("nan")}):
        with pytest.raises(ModelError, match=r"rewards/(chosen|rejected) is .* instead of 0.*reference"):
            check_first_rewards(rewards)
