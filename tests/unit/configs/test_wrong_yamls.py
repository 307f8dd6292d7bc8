"""Wrong YAMLs: following the first line of the message once gives a file that loads, or the next true error.

Each case has the lines after `model_id` and `train_path`, what the first line of the message says to write or to do, the lines of
someone who follows it, and the key that the next error names (empty: the file loads).
"""

from pathlib import Path

import pytest

from configs.loading import ConfigError, load_config

BASE = ["model_id: org/model", "train_path: train.jsonl"]

CASES: list[tuple[str, str, str, str]] = [
    # Keys of other tools
    (
        "per_device_train_batch_size: 2",
        "`train_batch_size_per_device: 2`",
        "train_batch_size_per_device: 2",
        "",
    ),
    ("num_train_epochs: 3", "`num_epochs: 3`", "num_epochs: 3", ""),
    ("max_seq_length: 2048", "`context_length: 2048`", "context_length: 2048", ""),
    ("warmup_steps: 10", "`num_warmup_steps: 10`", "num_warmup_steps: 10", ""),
    ("warmup_steps: 0.1", "`warmup_ratio: 0.1`", "warmup_ratio: 0.1", ""),
    ("save_total_limit: 2", "`num_checkpoints_to_keep: 2`", "num_checkpoints_to_keep: 2", ""),
    ("report_to: wandb", "`logger: {provider: wandb}`", "logger: {provider: wandb}", ""),
    (
        "wandb_project: x",
        "`logger: {project: x, provider: wandb}`",
        "logger: {project: x, provider: wandb}",
        "",
    ),
    ("logging_steps: 10", "remove it", "", ""),
    ("tf32: true", "remove it", "", ""),
    ("bf16: true", "`dtype: bf16`", "dtype: bf16", ""),
    ("fp16: true", "`dtype: fp32`", "dtype: fp32", ""),
    ("load_in_8bit: true", "`load_in_4bit: true`", "load_in_4bit: true", "lora_config"),
    ("neftune_noise_alpha: 5", "remove it", "", ""),
    ("max_rows: 100", "`max_train_rows`", "max_train_rows: 100", ""),
    ("packing_strategy: bfd", "`packing: true`", "packing: true", ""),
    ("eos_token: <|end|>", "remove it", "", ""),
    ("system_prompt: Be brief.", "remove it, and write the system message into the rows", "", ""),
    ("max_samples: 100", "`max_train_rows: 100`", "max_train_rows: 100", ""),
    ("lora_r: 16", "`lora_config: {r: 16}`", "lora_config: {r: 16}", ""),
    (
        "lora_r: 16\nlora_config: {lora_alpha: 32}",
        "`r: 16` in `lora_config`",
        "lora_config: {lora_alpha: 32, r: 16}",
        "",
    ),
    ("lora_alpha: 16", "`lora_config.lora_alpha`", "lora_config: {lora_alpha: 16}", ""),
    (
        "lora_target_modules: [q_proj]",
        "`lora_config: {target_modules: [q_proj]}`",
        "lora_config: {target_modules: [q_proj]}",
        "",
    ),
    ("micro_batch_size: 2", "`train_batch_size_per_device: 2`", "train_batch_size_per_device: 2", ""),
    ("sequence_len: 2048", "`context_length: 2048`", "context_length: 2048", ""),
    ("sample_packing: yes", "`packing: true`", "packing: true", ""),
    ("sample_packing: no", "`packing: false`", "packing: false", ""),
    (
        "adapter: qlora",
        "`lora_config: {}` and `load_in_4bit: true`",
        "lora_config: {}\nload_in_4bit: true",
        "",
    ),
    ("lr_scheduler: cosine", "`lr_scheduler_type: cosine`", "lr_scheduler_type: cosine", ""),
    ("fsdp: full_shard", "`deepspeed: zero_3`", "deepspeed: zero_3", ""),
    ("attn_implementation: flash_attention_2", "`flash_attention_2: true`", "flash_attention_2: true", ""),
    ("evals_per_epoch: 4", "{frequency: 0.25, unit: epochs}", "eval_steps: 0.25", ""),
    (
        "saves_per_epoch: 1",
        "{frequency: 1.0, unit: epochs}",
        "checkpoint_and_evaluation_frequency: {frequency: 1.0, unit: epochs}",
        "",
    ),
    (
        "datasets: [{path: rows.jsonl, type: alpaca}]",
        "`train_path: rows.jsonl`",
        "train_path: rows.jsonl",
        "",
    ),
    ("train_on_eos: turn", "remove it", "", ""),
    ("num_gpus: 8", "`num_devices`", "num_devices: 8", ""),
    ("nproc_per_node: 8", "`num_devices`", "num_devices: 8", ""),
    ("use_gpu: true", "`device: cuda`", "device: cuda", ""),
    ("lr: 1e-4", "`learning_rate`", "learning_rate: 1e-4", ""),
    ("validation_file: v.jsonl", "`valid_path`", "valid_path: v.jsonl", ""),
    ("block_size: 1024", "`context_length`", "context_length: 1024", ""),
    # Values of other tools
    ("optim: adamw_hf", "`optim: adamw_torch`", "optim: adamw_torch", ""),
    ("optim: adamw", "`optim: adamw_torch_fused`", "optim: adamw_torch_fused", ""),
    ("lr_scheduler_type: reduce_lr_on_plateau", "`cosine`", "lr_scheduler_type: cosine", ""),
    ("deepspeed: 3", "`deepspeed: zero_3`", "deepspeed: zero_3", ""),
    ("deepspeed: ds_z3_config.json", "`deepspeed: zero_3`", "deepspeed: zero_3", ""),
    ("deepspeed: {zero_optimization: {stage: 3}}", "`deepspeed: zero_3`", "deepspeed: zero_3", ""),
    ("logger: wandb", "`logger: {provider: wandb}`", "logger: {provider: wandb}", ""),
    ("logger: none", "remove the key", "", ""),
    ("deepspeed: true", "`deepspeed: zero_2`", "deepspeed: zero_2", ""),
    ("chat_template: chatml", "remove the key", "", ""),
    ("model_id: https://huggingface.co/org/model", "write org/model", "model_id: org/model", ""),
    (
        "train_path: https://huggingface.co/datasets/org/rows",
        "write hf://datasets/org/rows",
        "train_path: hf://datasets/org/rows",
        "",
    ),
    ("storage_path: s3:/bucket/runs", "write s3://bucket/runs", "storage_path: s3://bucket/runs", ""),
    ("logger: [tensorboard]", "`logger: {provider: tensorboard}`", "logger: {provider: tensorboard}", ""),
    ("task: dpo", "`task: preference_tuning`", "task: preference_tuning", ""),
    (
        "task: kto",
        "`preference_tuning_config: {loss: kto}`",
        "task: preference_tuning\npreference_tuning_config: {loss: kto}",
        "",
    ),
    ("task: sft", "`task: instruction_tuning`", "task: instruction_tuning", ""),
    ("optim: adafactr", "`adafactor`", "optim: adafactor", ""),
    ("dtype: float16", "`dtype: fp32`", "dtype: fp32", ""),
    ("dtype: bfloat16", "`dtype: bf16`", "dtype: bf16", ""),
    ("max_steps: -1", "remove the key", "", ""),
    ("warmup_ratio: 0.0", "remove the key", "", ""),
    ("num_warmup_steps: 0.1", "`warmup_ratio: 0.1`", "warmup_ratio: 0.1", ""),
    ("resume_from_checkpoint: true", "remove the key", "", ""),
    ("checkpoint_and_evaluation_frequency: 10", "{unit: steps, frequency: 10}", "save_steps: 10", ""),
    # Sections
    (
        "lora_config: {target_modules: 'q_proj,v_proj'}",
        "`target_modules: [q_proj, v_proj]`",
        "lora_config: {target_modules: [q_proj, v_proj]}",
        "",
    ),
    (
        "lora_config: {target_modules: q_proj,k_proj,v_proj, r: 4}",
        "`target_modules: [q_proj, k_proj, v_proj]`",
        "lora_config: {target_modules: [q_proj, k_proj, v_proj], r: 4}",
        "",
    ),
    (
        "lora_config: {target_modules: q_proj, alhpa}",
        "`target_modules: [q_proj, alhpa]`",
        "lora_config: {target_modules: [q_proj, alhpa]}",
        "",
    ),
    (
        "lora_config:\n  target_modules: q_proj\n  lora_alhpa:",
        "did you mean `lora_config.lora_alpha`",
        "lora_config:\n  target_modules: q_proj\n  lora_alpha: 8",
        "",
    ),
    ("run_name: a\nlearnign_rate:", "did you mean `learning_rate`", "learning_rate: 0.1", ""),
    (
        "lora_config: {target_modules: all}",
        "`target_modules: all-linear`",
        "lora_config: {target_modules: all-linear}",
        "",
    ),
    ("lora_config: true", "`lora_config: {}`", "lora_config: {}", ""),
    ("lora_config: {rank: 8}", "`lora_config.r`", "lora_config: {r: 8}", ""),
    ("lora_config: {alpha: 8}", "`lora_config.lora_alpha`", "lora_config: {lora_alpha: 8}", ""),
    ("export: true", "`export: {}`", "export: {}", ""),
    ("export: {merged: true}", "`export.merge`", "export: {merge: true}", ""),
    # Types and conflicts
    ("learning_rate: '1e-4'", "without quotes", "learning_rate: 1e-4", ""),
    ("num_devices: '4'", "without quotes", "num_devices: 4", ""),
    ("packing: yes", "true", "packing: true", ""),
    ("num_epochs: 1\nmax_steps: 3", "keep one", "max_steps: 3", ""),
    ("valid_split: 0.1\nvalid_path: v.jsonl", "keep one", "valid_path: v.jsonl", ""),
    ("valid_split: 500", "0.05", "valid_split: 0.05", ""),
    ("output_dir: s3://bucket/out", "local path", "output_dir: /tmp/out", ""),
    ("worker_resources: {GPU: 2}", "`GPU: 1`", "worker_resources: {GPU: 1}\nnum_devices: 2", ""),
    (
        "train_path: ${ABSENT_VARIABLE}/x",
        "${ABSENT_VARIABLE:-DEFAULT}",
        "train_path: '${ABSENT_VARIABLE:-rows}/x'",
        "",
    ),
    ("seed: 1\nseed: 2", "keep one", "seed: 2", ""),
    ("deepsped: zero_2", "`deepspeed`", "deepspeed: zero_2", ""),
    ("hf_token: abc", "remove it", "", ""),
    ("chat_template: s3://bucket/chat.jinja", "download", "chat_template: chat.jinja", ""),
    (
        "task: classification",
        "`classifier_config: {label_tokens: [...]}`",
        "task: classification\nclassifier_config: {label_tokens: [a, b]}",
        "",
    ),
    # As users of Axolotl, LLaMA-Factory and TRL write them
    ("lora_config: {r: {value: 8}}", "an integer", "lora_config: {r: 8}", ""),
    ("learning_rate: [1e-4, 2e-4]", "a number", "learning_rate: 1e-4", ""),
    ("rank: 16", "`lora_config.r`", "lora_config: {r: 16}", ""),
    ("peft: {r: 16}", "`lora_config`", "lora_config: {r: 16}", ""),
    ("lora: true", "`lora_config`", "lora_config: true", "`lora_config: {}`"),
    ("training_args: {num_train_epochs: 3, max_steps: 9}", "at the top level", "num_epochs: 3", ""),
    ("dataset_mixer: {a.jsonl: 0.5}", "`train_path`", "train_path: {a.jsonl: 0.5}", "weight: 2"),
    ("train_path: {path: a.jsonl}", "write a path", "train_path: a.jsonl", ""),
    ("test_size: 0.1", "`valid_split`", "valid_split: 0.1", ""),
    ("val_set_size: 0", "remove it", "", ""),
    ("valid_split: 5%", "0.05", "valid_split: 0.05", ""),
    ("bf16: auto", "`dtype: bf16`", "dtype: bf16", ""),
    ("mixed_precision: fp16", "`dtype`", "dtype: fp16", "`dtype: fp32`"),
    (
        "lora_target_linear: true",
        "`lora_config: {target_modules: all-linear}`",
        "lora_config: {target_modules: all-linear}",
        "",
    ),
    ("special_tokens: {pad_token: <|pad|>}", "remove it", "", ""),
    ("deepspeed: deepspeed_configs/zero2.json", "`deepspeed: zero_2`", "deepspeed: zero_2", ""),
    ("deepspeed: {stage: 2}", "`deepspeed: zero_2`", "deepspeed: zero_2", ""),
    ("deepspeed: {config: ds.json}", "`deepspeed.config_path`", "deepspeed: {config_path: ds.json}", ""),
    ("deepspeed: 4", "`zero_2` or `zero_3`", "deepspeed: zero_3", ""),
    (
        "fsdp_config: {fsdp_transformer_layer_cls_to_wrap: Layer}",
        "`deepspeed: zero_3`",
        "deepspeed: zero_3",
        "",
    ),
    ("gradient_checkpointing_kwargs: {use_reentrant: false}", "remove it", "", ""),
    ("gradient_checkpointing: 'true'", "`gradient_checkpointing: true`", "gradient_checkpointing: true", ""),
    ("load_in_4bit: 'false'", "without quotes", "load_in_4bit: false", ""),
    ("learning_rate:\t2e-5", "replace the tab with spaces", "learning_rate: 2e-5", ""),
    ("lora_config: {r: 8, r: 16}", "keep one", "lora_config: {r: 16}", ""),
    ("optim: AdamW", "`optim: adamw_torch_fused`", "optim: adamw_torch_fused", ""),
    ("optimizer: {name: adamw}", "the name alone", "optim: adamw_torch_fused", ""),
    ("per_device_batch_size: 8", "`train_batch_size_per_device`", "train_batch_size_per_device: 8", ""),
    ("grad_accum: 8", "`gradient_accumulation_steps`", "gradient_accumulation_steps: 8", ""),
    ("warmup: 10", "`num_warmup_steps`", "num_warmup_steps: 10", ""),
    ("eval_steps: epoch", "remove the key", "", ""),
    (
        "checkpoint_and_evaluation_frequency: {steps: 50}",
        "{unit: steps, frequency: 50}",
        "checkpoint_and_evaluation_frequency: {unit: steps, frequency: 50}",
        "",
    ),
    ("wandb: {project: x}", "`logger: {provider: wandb}`", "logger: {provider: wandb}", ""),
    ("quantization_config: {load_in_4bit: true}", "at the top level", "load_in_4bit: true", "lora_config"),
    ("plugins: [axolotl.integrations.liger.LigerPlugin]", "`kernels: liger`", "kernels: liger", ""),
    ("unsloth: true", "`kernels: unsloth`", "kernels: unsloth", ""),
    ("num_devices: auto", "such as 8", "num_devices: 8", ""),
    ("num_nodes: 2", "devices of all nodes", "", ""),
    ("worker_resources: {num_cpus: 4}", "`CPU`", "worker_resources: {CPU: 4}", ""),
    ("devices: 8", "`num_devices`", "num_devices: 8", ""),
    ("accelerator: gpu", "`device`", "device: gpu", "use `cuda`"),
    ("columns: {question: prompt}", "`{prompt: question}`", "columns: {prompt: question}", ""),
    ("hub_model_id: my model", "ORG/NAME", "hub_model_id: org/name", "push_to_hub"),
    ("dpo: true", "`task: preference_tuning`", "task: preference_tuning", ""),
    # Torchtune's components, wrong nesting and several errors at once
    (
        "model: {_component_: torchtune.models.llama3.lora_llama3_8b, lora_rank: 8}",
        "component of torchtune: remove it",
        "",
        "",
    ),
    (
        "checkpointer: {_component_: torchtune.training.FullModelHFCheckpointer, checkpoint_dir: m}",
        "`model_id` names the model",
        "",
        "",
    ),
    ("tokenizer: {_component_: torchtune.models.llama3.llama3_tokenizer}", "remove it", "", ""),
    (
        "optimizer: {_component_: torch.optim.AdamW, lr: 3e-4}",
        "the name alone",
        "optim: adamw_torch_fused",
        "",
    ),
    ("metric_logger: {_component_: torchtune.training.WandBLogger}", "remove it", "", ""),
    ("lora_config: {lora_config: {r: 8}}", "directly into `lora_config`", "lora_config: {r: 8}", ""),
    ("lora_config: {lr: 1e-4}", "`learning_rate` belongs at the top level", "learning_rate: 1e-4", ""),
    ("lora_config: {num_train_epochs: 2}", "`num_epochs` belongs at the top level", "num_epochs: 2", ""),
    ("lora_config: {task: CAUSAL_LM}", "`lora_config.task_type`", "lora_config: {task_type: CAUSAL_LM}", ""),
    ("logger: {provider: wandb, run_name: n}", "`logger.name`", "logger: {provider: wandb, name: n}", ""),
    (
        "train_path: [{data_path: a.jsonl, weight: 2}]",
        "`train_path.0.path`",
        "train_path: [{path: a.jsonl, weight: 2}]",
        "",
    ),
    ("deepspeed: {config_path: a.json, stage: 2}", "remove it", "deepspeed: {config_path: a.json}", ""),
    ("logger: {wandb: {project: x}}", "`provider: wandb`", "logger: {provider: wandb, project: x}", ""),
    ("wandb_name: n", "`logger: {name: n}`", "logger: {name: n}", "`provider: wandb`"),
    (
        "export: {push_to_hub: true}",
        "`push_to_hub` belongs at the top level",
        "push_to_hub: true",
        "hub_model_id",
    ),
    ("betas: [0.9, 0.95]", "`adam_beta1` and `adam_beta2`", "adam_beta1: 0.9\nadam_beta2: 0.95", ""),
    ("data_files: a.jsonl", "`train_path`", "train_path: a.jsonl", ""),
    ("max_tokens: 100", "`context_length`", "context_length: 100", ""),
    ("valid_path: 0.1", "`valid_split: 0.1`", "valid_split: 0.1", ""),
    ("context_length: 2048.0", "an integer: 2048", "context_length: 2048", ""),
    ("dtype: 16", "`dtype: bf16`", "dtype: bf16", ""),
    ("model_id: {path: org/model}", "write text", "model_id: org/model", ""),
    ("lora_config: []", "`lora_config: {}`", "lora_config: {}", ""),
    ("gpus: all", "`num_devices`", "num_devices: all", "such as 8"),
    ("lr_scheduler_type: Cosine", "`cosine`", "lr_scheduler_type: cosine", ""),
    ("early_stopping_patience: 3", "`valid_path`", "early_stopping_patience: 3\nvalid_path: v.jsonl", ""),
    ("mask_history: true", "`turns: last`", "turns: last", ""),
    ("loss_type: sigmoid", "{loss: dpo}", "preference_tuning_config: {loss: dpo}", ""),
    (
        "num_train_epoch: 3\nlearning_rat: 1e-4\nlora_config: {rr: 8}\npacking: 'yes'",
        "`num_epochs`",
        "num_epochs: 3\nlearning_rat: 1e-4\nlora_config: {rr: 8}\npacking: 'yes'",
        "`learning_rate`",
    ),
    # Keys and values of TrainingArguments, PEFT and torchtune whose nearest key is another one, and lines that are no YAML
    ("peft_config: {r: 16, lora_alpha: 32}", "`lora_config`", "lora_config: {r: 16, lora_alpha: 32}", ""),
    (
        "optim_args: {betas: [0.9, 0.95]}",
        "`adam_beta1`, `adam_beta2`",
        "adam_beta1: 0.9\nadam_beta2: 0.95",
        "",
    ),
    ("gradient_clipping: 1.0", "`max_grad_norm`", "max_grad_norm: 1.0", ""),
    ("gradient_clip_val: 1.0", "`max_grad_norm`", "max_grad_norm: 1.0", ""),
    ("eval_steps: 0.0", "write a number above 0", "eval_steps: 0.5", ""),
    ("save_total_limit: -1", "remove it", "", ""),
    ("data_format: sharegpt", "`data_format: conversations`", "data_format: conversations", ""),
    ("data_format: alpaca", "`data_format: instruction`", "data_format: instruction", ""),
    ("data_format: openai", "`data_format: messages`", "data_format: messages", ""),
    (
        "task: preference_tuning\npreference_tuning_config: {loss: simpo}",
        "there is no preference loss simpo: use dpo",
        "task: preference_tuning\npreference_tuning_config: {loss: dpo}",
        "",
    ),
    ("deepspeed: none", "remove the key", "", ""),
    ("model_id: ''", "add it (Model to train", "model_id: org/model", ""),
    ("storage_path: ''", "remove the key", "", ""),
    ("tensor_parallel_dim: 2", "`deepspeed: zero_3`", "deepspeed: zero_3", ""),
    ("context_parallel_dim: 2", "`sequence_parallel_size: 2`", "sequence_parallel_size: 2", "num_devices"),
    ("eval_accumulation_steps: 4", "remove it", "", ""),
    ("eval_delay: 2", "remove it", "", ""),
    ("label_names: [labels]", "remove it", "", ""),
    ("accelerator_config: {split_batches: true}", "remove it", "", ""),
    ("padding_free: true", "remove it", "", ""),
    ("eval_packing: false", "remove it", "", ""),
    ("pad_token: <pad>", "remove it (the token is the model's own", "", ""),
    ("learning_rate:1e-4", "run.yaml:3: not valid YAML", "learning_rate: 1e-4", ""),
    ("learning_rate = 1e-4", "write `key: value`, with a space", "learning_rate: 1e-4", ""),
    ("lora_config: {bias: None}", "`none`", "lora_config: {bias: none}", ""),
    (
        "lora_config: {modules_to_save: lm_head}",
        "write a list",
        "lora_config: {modules_to_save: [lm_head]}",
        "",
    ),
    ("lora_config: {lora_dropout: 5%}", "0.05", "lora_config: {lora_dropout: 0.05}", ""),
    ("padding: true", "longest", "padding: longest", ""),
    ("device: cuda:0", "`cuda`", "device: cuda", ""),
    (
        "train_path: {a: a.jsonl, b: b.jsonl}",
        "a list such as",
        "train_path: [{path: a.jsonl, weight: 2}]",
        "",
    ),
    ("new_tokens: <tool>", "write a list", "new_tokens: [<tool>]", ""),
    ("run_name: my run", "only letters", "run_name: my-run", ""),
    ("warmup_ratio: 5%", "0.05", "warmup_ratio: 0.05", ""),
    ("flash_attention_2: auto", "true or false", "flash_attention_2: true", ""),
    (
        "train_batch_size: 64",
        "`train_batch_size_per_device: auto`",
        "train_batch_size: 64\ntrain_batch_size_per_device: auto",
        "",
    ),
    (
        "hyperparameters: {learning_rate: 1e-4, epochs: 3}",
        "at the top level",
        "learning_rate: 1e-4\nepochs: 3",
        "`num_epochs: 3`",
    ),
]


def lines_with(lines: str) -> str:
    given = {line.partition(":")[0] for line in lines.splitlines()}
    return "\n".join([line for line in BASE if line.partition(":")[0] not in given] + [lines]) + "\n"


def first_line(path: Path, text: str) -> str:
    """Return the first line of the error; empty if the file loads."""
    path.write_text(text)
    try:
        load_config(path)
    except ConfigError as error:
        for line in str(error).splitlines():
            assert len(line.removeprefix(f"{path}:")) <= 160, line
        return str(error).splitlines()[0]
    return ""


def test_cases_of_wrong_yamls_are_unique():
    assert len({lines for lines, *_ in CASES}) == len(CASES)


@pytest.mark.parametrize(("lines", "instead", "fixed", "next_key"), CASES, ids=[lines for lines, *_ in CASES])
def test_following_the_first_line_gives_a_valid_file_or_the_next_error(
    tmp_path: Path, lines: str, instead: str, fixed: str, next_key: str
):
    path = tmp_path / "run.yaml"
    message = first_line(path, lines_with(lines))
    assert instead in message
    following = first_line(path, lines_with(fixed))
    assert (next_key in following) if next_key else following == ""


def test_every_message_of_the_cases_stays_below_two_lines(tmp_path: Path):
    """All cases that do not exclude each other, in one file: one message, each error on one line."""
    lines = [lines for lines, *_ in CASES if "\n" not in lines]
    by_key = {line.partition(":")[0]: line for line in lines}
    assert first_line(tmp_path / "run.yaml", lines_with("\n".join(by_key.values())))


@pytest.mark.parametrize("lines", ["datasets: []", "datasets: [{type: alpaca}]", "warmup_steps: .inf"])
def test_values_that_are_invalid_in_the_other_tool_too_raise_an_error_with_their_line(
    tmp_path: Path, lines: str
):
    message = first_line(tmp_path / "run.yaml", lines_with(lines))
    assert f"`{lines.partition(':')[0]}`" in message
    assert "another tool's key" in message


def test_keys_below_another_one_are_not_reported_as_missing(tmp_path: Path):
    message = first_line(tmp_path / "run.yaml", "config:\n  model_id: org/model\n  train_path: a.jsonl\n")
    assert "`config` is not a section: write its keys (model_id, train_path) at the top level" in message
