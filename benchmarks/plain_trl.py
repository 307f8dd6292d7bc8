"""The peers of benchmarks/overhead.py: plain TRL, started by torchrun or by a bare Ray TorchTrainer.

    torchrun --nproc-per-node 2 benchmarks/plain_trl.py SETTINGS.json
    python benchmarks/plain_trl.py SETTINGS.json --ray

Rank 0 writes a report to the file given in the settings: the seconds from `began` to the end of the first step, the
tokens of the rows, and the seconds from the start of training to its last step.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

WORKERS = 2


def train(settings: dict[str, Any]) -> None:
    """Train LoRA on chat rows as in TRL's documentation."""
    import peft
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

    class Clock(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            self.last_step = time.perf_counter()
            if state.global_step == 1:
                self.first_step = time.time()

    class OnCpu(SFTTrainer):
        # TRL's own loss is a Triton kernel and does not run on CPU.
        compute_loss = Trainer.compute_loss

    torch.set_num_threads(1)
    rows = load_dataset("json", data_files=settings["train_path"], split="train")
    rows = rows.map(
        lambda row: {"prompt": row["messages"][:1], "completion": row["messages"][1:]},
        remove_columns=["messages"],
    )
    model = AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=torch.bfloat16 if settings["dtype"] == "bf16" else torch.float32
    )
    model.config.use_cache = False  # TRL's own compute_loss disables it
    clock = Clock()
    trainer = OnCpu(
        model=model,
        args=SFTConfig(
            output_dir=settings["output_dir"],
            per_device_train_batch_size=settings["batch_size"],
            max_steps=settings["max_steps"],
            learning_rate=settings["learning_rate"],
            bf16=settings["dtype"] == "bf16",
            use_cpu=True,
            ddp_backend="gloo",
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
        peft_config=peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[clock],
    )
    trainer.train()
    if trainer.is_world_process_zero():
        assert trainer.train_dataset is not None
        measured = {
            "first_step_seconds": clock.first_step - settings["began"],
            "tokens": sum(len(ids) for ids in trainer.train_dataset["input_ids"]),
            "training_seconds": clock.last_step - clock.began,
        }
        Path(settings["report"]).write_text(json.dumps(measured))


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    if "--ray" not in sys.argv:
        train(settings)
        return
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
    TorchTrainer(
        train,
        train_loop_config=settings,
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=WORKERS),
        run_config=RunConfig(name=f"bare-{time.time_ns()}", storage_path=settings["output_dir"]),
    ).fit()


if __name__ == "__main__":
    main()
