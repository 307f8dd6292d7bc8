"""Contestants of benchmarks/gpu.py, each in its own process: `python benchmarks/gpu_contestants.py NAME SETTINGS.json`.

- make_model: write a Llama model of the given shape with random weights.
- plan: write the plan of a YAML, for `alone`, and its estimate of the memory.
- alone: train that plan with Anneal's trainer, without Ray, bucket and checkpoints.
- trl: train with TRL and PEFT as in their documentation.
- unsloth: train with Unsloth as in its documentation.

Contestants that train write a report to the path `report` in the settings: seconds, loss and gradient norm of each step, its
tokens, and the peak memory. With `simulated` in the settings, `plan` and `alone` run on a simulated GPU.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

SEED = 42
MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_model(settings: dict[str, Any]) -> None:
    """Write a model, with a tokenizer that has a smaller vocabulary than the model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.support.tiny_model import make_tokenizer

    tokenizer = make_tokenizer()
    config = LlamaConfig(**settings["shape"], pad_token_id=tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType]
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(settings["directory"], max_shard_size="4GB")
    tokenizer.save_pretrained(settings["directory"])


def plan(settings: dict[str, Any]) -> None:
    """Write the plan, in its own process because it imports packages that must be imported after Unsloth."""
    from configs.loading import load_config
    from training.planning.endpoints import ClusterTarget
    from training.planning.planner import make_plan

    run_plan, report, _ = make_plan(load_config(Path(settings["yaml"])), target=ClusterTarget(None))
    Path(settings["plan"]).write_text(run_plan.model_dump_json())
    Path(settings["estimate"]).write_text(json.dumps(report.memory and report.memory.total))


def alone(settings: dict[str, Any]) -> None:
    """Run the steps of a worker from loading the model to the last step."""
    from training.checkpoints.weights import fetch_model
    from training.loop.worker import model_request, peak_flops, prepare_process
    from training.models.tokenizer import load_tokenizer
    from training.planning.plan import RunPlan
    from training.world import World

    run_plan = RunPlan.model_validate_json(Path(settings["plan"]).read_text())
    prepare_process(run_plan, World(rank=0, local_rank=0, world_size=1, local_world_size=1, node_rank=0))
    if settings["simulated"] and run_plan.resolved.kernels.provider == "unsloth":
        from tests.support.pretended_gpu import patch_unsloth

        patch_unsloth()
    from training.data.prepared import fetch_prepared
    from training.loop.throughput import HostTimeline, PhaseClock, Throughput
    from training.loop.trainer_factory import build_trainer
    from training.loop.trainers import trainer_arguments
    from training.models import build_model
    from training.models.files import is_model_file

    model_directory = fetch_model(run_plan.base_model, run_plan.cache, is_model_file)
    rows = fetch_prepared(run_plan.train, run_plan.cache, run_plan.prepared)
    request = model_request(run_plan, model_directory, None, rows, None)
    model = build_model(run_plan.resolved.kernels.provider, request)
    batch_plan = run_plan.order(rows.index.length, rows.summary.longest, 1)
    throughput = Throughput(
        batch_plan,
        rows.index.tokens.tolist(),
        rows.index.trained_tokens.tolist(),
        clock=PhaseClock(HostTimeline()),  # not used
        flops=run_plan.flops,
        peak_flops=peak_flops(run_plan, 1),
    )
    trainer = build_trainer(
        run_plan,
        batch_plan,
        rows,
        None,
        model=model,
        request=request,
        tokenizer=load_tokenizer(
            model_directory, trust_remote_code=False, source=run_plan.base_model, chat_template=None
        ),
        args=trainer_arguments(run_plan, Path(settings["output_dir"]), devices=1, eval_first=False),
        callbacks=[throughput],
        throughput=throughput,
        on_eval_progress=lambda _: None,
    )
    trainer.train()
    steps = [line for line in trainer.state.log_history if "loss" in line]
    write_report(
        settings,
        [
            tokens_of_step(batch_plan, rows.index.tokens, int(line["step"])) / line["tokens_per_second"]
            for line in steps
        ],
        [line["loss"] for line in steps],
        [line["grad_norm"] for line in steps],
        tokens_of_a_step=tokens_of_step(batch_plan, rows.index.tokens, 1),
        mfu=[line.get("mfu") for line in steps],
    )


def tokens_of_step(batch_plan: Any, tokens_of_row: Any, step: int) -> int:
    """Return the tokens of a step, excluding padding."""
    return int(sum(tokens_of_row[row] for row in batch_plan.rows_of_step(step)))


def trl(settings: dict[str, Any]) -> None:
    """Train LoRA on a bf16 base model with TRL and PEFT."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.bfloat16)
    if settings["device"] == "cuda":
        model.to("cuda")  # pyright: ignore[reportArgumentType]
    adapter = peft.LoraConfig(
        r=settings["rank"], lora_alpha=settings["rank"], target_modules=MATRICES, task_type="CAUSAL_LM"
    )
    train(settings, SFTTrainer, model, AutoTokenizer.from_pretrained(settings["model"]), peft_config=adapter)


def unsloth(settings: dict[str, Any]) -> None:
    """Train LoRA on a base model in bf16 or 4 bits with Unsloth."""
    from unsloth import FastLanguageModel  # isort: skip  # first: it patches the packages imported below

    import torch
    from trl import SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=settings["model"],
        max_seq_length=settings["context_length"],
        dtype=torch.bfloat16,
        load_in_4bit=settings["load_in_4bit"],
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=settings["rank"],
        lora_alpha=settings["rank"],
        target_modules=MATRICES,
        use_gradient_checkpointing=False,
        random_state=SEED,
    )
    train(settings, SFTTrainer, model, tokenizer)


def train(settings: dict[str, Any], trainer_class: Any, model: Any, tokenizer: Any, **arguments: Any) -> None:
    """Train, and time each step until its loss is available."""
    from datasets import load_dataset
    from transformers import Trainer, TrainerCallback
    from trl import SFTConfig  # pyright: ignore[reportPrivateImportUsage]

    class Clock(TrainerCallback):
        """A callback that times each step; reading the loss waits for the GPU."""

        def __init__(self) -> None:
            self.ends: list[float] = []
            self.losses: list[float] = []
            self.gradient_norms: list[float] = []

        def on_train_begin(self, args, state, control, **_):
            self.ends.append(time.perf_counter())

        def on_log(self, args, state, control, logs=None, **_):
            if logs and "loss" in logs:
                self.ends.append(time.perf_counter())
                self.losses.append(logs["loss"])
                self.gradient_norms.append(logs["grad_norm"])

    class OnCpu(trainer_class):
        # TRL's own loss is a Triton kernel and does not run on CPU.
        compute_loss = Trainer.compute_loss

    clock, on_cpu = Clock(), settings["device"] == "cpu"
    trainer = (OnCpu if on_cpu else trainer_class)(
        model=model,
        args=SFTConfig(
            output_dir=settings["output_dir"],
            max_length=settings["context_length"],
            dataset_text_field="text",
            per_device_train_batch_size=settings["batch_size"],
            gradient_accumulation_steps=settings["accumulation"],
            max_steps=settings["steps"],
            learning_rate=settings["learning_rate"],
            optim=settings["optim"],
            lr_scheduler_type="constant",
            seed=SEED,
            bf16=True,
            use_cpu=on_cpu,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=load_dataset("json", data_files=settings["train_path"], split="train"),
        processing_class=tokenizer,
        callbacks=[clock],
        **arguments,
    )
    trainer.train()
    rows = settings["batch_size"] * settings["accumulation"]
    write_report(
        settings,
        [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)],
        clock.losses,
        clock.gradient_norms,
        tokens_of_a_step=rows * settings["context_length"],  # rows are truncated to this length
    )


def write_report(
    settings: dict[str, Any],
    step_seconds: list[float],
    losses: list[float],
    gradient_norms: list[float],
    **extra: Any,
) -> None:
    import torch

    peak = (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    measured = {
        "step_seconds": step_seconds,
        "losses": losses,
        "gradient_norms": gradient_norms,
        "peak_memory_bytes": peak,
    }
    Path(settings["report"]).write_text(json.dumps(measured | extra))


def main() -> None:
    settings = json.loads(Path(sys.argv[2]).read_text())
    if settings["simulated"]:
        from tests.support import triton_interpreter, varlen_on_cpu  # noqa: F401
        from tests.support.pretended_gpu import simulate_gpu

        simulate_gpu()
    {contestant.__name__: contestant for contestant in (make_model, plan, alone, trl, unsloth)}[sys.argv[1]](
        settings
    )


if __name__ == "__main__":
    main()
