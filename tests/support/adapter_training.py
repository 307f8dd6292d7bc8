"""Training of a tiny model with an adapter of any kind for a few steps on one worker, built and saved as in a run.

As a program, it trains under ZeRO-3, which takes over a process: the arguments are a directory, `new` or `continued`, and the kinds.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, set_seed

from configs.schema import FinetuneConfig, LoraConfig
from tests.support.adapters import KINDS, write_adapter
from tests.support.jobs import PROJECT, environment
from tests.support.model_requests import model_request
from tests.support.trainers import cpu_arguments, make_trainer
from training.data.batches import BatchPlan, BatchShape, PairSequences, TokenSequences
from training.loop.preference import collate_pairs
from training.loop.trainers import TrainingRows, collate_rows
from training.models import add_reference
from training.models.attention import Attention
from training.models.new_tokens import NewTokens
from training.models.request import ModelRequest
from training.models.torch_provider import build
from training.planning.deepspeed import deepspeed_settings

ROWS, STEPS, SAVED = 8, 3, 1
"""Rows of the data, steps of a run, and the step whose checkpoint is resumed."""
_START = [1, 5, 7]  # the rows contain the tokens that some kinds train


def config_of(kind: str, **settings: Any) -> FinetuneConfig:
    """Return the YAML of a run that trains a new adapter of a kind."""
    _, lora = KINDS[kind]
    keys = {"lora_config": {"r": 4, "lora_alpha": 8, **lora}, **_new_tokens_key(kind), **settings}
    if keys.get("new_tokens"):
        keys["lora_config"].pop("trainable_token_indices")
    return FinetuneConfig.model_validate({"model_id": "m", "train_path": "t", "dtype": "fp32"} | keys)


def request_of(kind: str, model: Path, **changes: Any) -> ModelRequest:
    """Return the request to build a model with a new adapter of a kind, on random weights of the model's shape."""
    lora = config_of(kind).lora_config
    ends = ("embed_tokens",) if "tied" in kind else ("embed_tokens", "lm_head")
    new = NewTokens((512, 513), ((9, 10), (11,)), ends) if "new tokens" in kind else None
    return model_request(model, **{"lora": lora, "new_tokens": new} | changes)


def continued_request(kind: str, model: Path, directory: Path, **changes: Any) -> ModelRequest:
    """Write an adapter of a kind with large weights to the directory, and return the request to continue it."""
    write_adapter(directory, model, **KINDS[kind][1])
    return model_request(model, adapter_directory=directory, **changes)


def _new_tokens_key(kind: str) -> dict[str, Any]:
    return {"new_tokens": ["<one>", "<two>"]} if "new tokens" in kind else {}


class Run:
    """A trained adapter."""

    def __init__(
        self,
        request: ModelRequest,
        directory: Path,
        *,
        task: str = "instruction_tuning",
        resume_from: Path | None = None,
        deepspeed: dict[str, Any] | None = None,
        optim: str = "adamw_torch",
    ):
        """Train for STEPS steps and save the checkpoint of step SAVED and, in `directory / "last"`, the last state.

        Args:
            request: The model with its adapter.
            directory: Where the checkpoints are saved.
            task: The task.
            resume_from: A checkpoint to resume from.
            deepspeed: DeepSpeed's settings.
            optim: The optimizer; the steps of `sgd` are proportional to the gradients, also to small ones.
        """
        self.directory = directory
        arguments = cpu_arguments(  # before the model, which ZeRO-3 partitions while it is loaded
            directory,
            max_steps=STEPS,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=4,
            learning_rate=0.1 if optim == "sgd" else 1e-2,
            optim=optim,
            save_strategy="no" if deepspeed else "steps",
            save_steps=SAVED,
            eval_on_start=task == "preference_tuning" and resume_from is None,
            deepspeed=deepspeed,
            ddp_backend="gloo" if deepspeed else None,
        )
        set_seed(1)
        self.model: Any = build(request)
        reference = add_reference(self.model, request) if task == "preference_tuning" else None
        self.before = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        self.trainable = [name for name, weight in self.model.named_parameters() if weight.requires_grad]
        tokenizer = AutoTokenizer.from_pretrained(request.directory)
        vocabulary = self.model.config.get_text_config().vocab_size
        rows = _rows(task, vocabulary, tokenizer.pad_token_id)
        self.trainer = make_trainer(
            self.model,
            rows,
            tokenizer,
            arguments,
            config={"task": task, "lora_config": {}},
            base_model=str(request.directory),
            reference_model=reference,
        )
        self.trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        self.trainer.save_model(str(self.last))

    @property
    def checkpoint(self) -> Path:
        """The checkpoint of step SAVED."""
        return self.directory / f"checkpoint-{SAVED}"

    @property
    def last(self) -> Path:
        """The adapter after the last step."""
        return self.directory / "last"

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """All weights after the last step."""
        return {name: weight.detach() for name, weight in self.model.named_parameters()}

    @property
    def moments(self) -> list[torch.Tensor]:
        """The optimizer's states after the last step."""
        assert self.trainer.optimizer is not None
        return [value for state in self.trainer.optimizer.state.values() for value in state.values()]

    @property
    def first_rewards(self) -> list[float]:
        """The rewards before the first step."""
        log = self.trainer.state.log_history[0]
        return [log["eval_rewards/chosen"], log["eval_rewards/rejected"]]


def _rows(task: str, vocabulary: int, pad: int) -> TrainingRows:
    generator = torch.Generator().manual_seed(0)
    order = BatchPlan(BatchShape(ROWS, 2, 1, 1), 0)

    def ids(length: int) -> list[int]:
        drawn = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        return [*_START, vocabulary - 2, vocabulary - 1, *drawn]

    if task == "preference_tuning":
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        pairs = Dataset.from_list([{name: ids(6 + row) for name in names} for row in range(ROWS)])
        sequences: Any = PairSequences(pairs, pad, with_mismatched=False)
        return TrainingRows(order, sequences, sequences, collate_pairs(pad, None, masked=False))
    texts = [ids(8 + row) for row in range(ROWS)]
    rows = Dataset.from_list([{"input_ids": text, "labels": text} for text in texts])
    collate = collate_rows(pad, None, packed=False, attention=Attention("sdpa", mask=False))
    return TrainingRows(order, TokenSequences(rows, pad), None, collate)


# --- ZeRO-3, in a process of its own ------------------------------------------------------------------------------


def train_under_zero_3(
    directory: Path, models: dict[str, Path], kinds: list[str], *, continued: bool = False
) -> dict[str, str]:
    """Train an adapter of each kind under ZeRO-3; return the error of each kind that failed.

    Args:
        directory: Each kind is trained in `directory / slug(kind)`.
        models: The models of `make_models`.
        kinds: Keys of KINDS.
        continued: Whether to continue an adapter of each kind, also of those that a run can start with.
    """
    (directory / "models.json").write_text(json.dumps({name: str(path) for name, path in models.items()}))
    finished = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.support.adapter_training",
            str(directory),
            "continued" if continued else "new",
            *kinds,
        ],
        cwd=PROJECT,
        env=environment() | {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    return json.loads((directory / "errors.json").read_text())


def slug(kind: str) -> str:
    """Return a directory name for a kind."""
    return "".join(letter if letter.isalnum() else "-" for letter in kind)


def main() -> None:
    """Train the kinds of the command line under ZeRO-3."""
    import deepspeed
    import deepspeed.ops

    directory = Path(sys.argv[1])
    models = json.loads((directory / "models.json").read_text())
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiling it with g++ takes two minutes
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=0, world_size=1
    )
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    settings = deepspeed_settings(FinetuneConfig(model_id="m", train_path="t", deepspeed="zero_3"))
    assert settings is not None
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # partition every parameter
    errors = {}
    for kind in sys.argv[3:]:
        name, _ = KINDS[kind]
        is_new = sys.argv[2] == "new" and can_be_new(kind)
        make = request_of if is_new else continued_request
        extra = () if is_new else (directory / f"{slug(kind)}-adapter",)
        try:
            request = make(kind, Path(models[name]), *extra, zero_stage=3)  # type: ignore[operator]
            own = json.loads(json.dumps(settings))
            Run(request, directory / slug(kind), deepspeed=own, optim="sgd")
        except Exception as error:  # noqa: BLE001  # the test reports it
            errors[kind] = f"{type(error).__name__}: {error}"
    (directory / "errors.json").write_text(json.dumps(errors))


def can_be_new(kind: str) -> bool:
    """Return whether a run can start with a new adapter of this kind; the others are trained elsewhere and continued."""
    try:
        LoraConfig(**KINDS[kind][1])
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    main()
