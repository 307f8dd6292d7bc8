"""A tiny Llama with 100 thousand random parameters, its tokenizer and data, all written to real files within a second."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from cookbooks.preference_tuning.prepare import write_pairs
from cookbooks.quickstart.word_problems import TRAIN_KINDS, VALID_KINDS, write_problems

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that is trained on word problems, with a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [write_problems(TRAIN_KINDS, 200, 0), write_problems(VALID_KINDS, 50, 0)], trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def make_model(
    directory: Path,
    *,
    layers: int = 2,
    positions: int = 512,
    kind: Callable[..., PreTrainedConfig] = LlamaConfig,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **settings: Any,
) -> Path:
    """Save the model and its tokenizer to a directory; return the directory.

    Args:
        directory: The directory to write.
        layers: The number of layers.
        positions: The maximum number of positions.
        kind: The configuration class.
        tokenizer: The tokenizer; None: that of `make_tokenizer`.
        settings: Settings that only this class has.
    """
    torch.manual_seed(0)
    tokenizer = tokenizer or make_tokenizer()
    config = kind(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{"tie_word_embeddings": False} | settings,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_data(directory: Path, *, train_rows: int = 40, valid_rows: int = 11) -> tuple[Path, Path]:
    """Write word problems as JSONL; return the paths (train, valid)."""
    train, valid = directory / "train.jsonl", directory / "valid.jsonl"
    train.write_text(write_problems(TRAIN_KINDS, train_rows, 1))
    valid.write_text(write_problems(VALID_KINDS, valid_rows, 2))
    return train, valid


def make_longrope_model(directory: Path, limit: int) -> Path:
    """Save a Phi 3 whose RoPE has other frequencies above `limit` tokens; return the directory."""
    return make_model(
        directory,
        kind=Phi3Config,
        initializer_range=0.3,
        original_max_position_embeddings=limit,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 8,
            "long_factor": [1.0 + 4 * dimension for dimension in range(8)],
        },
    )


def make_model_and_data(directory: Path) -> Path:
    """Write a tiny model, training rows and validation rows into a directory, and return the directory."""
    make_model(directory / "model")
    write_data(directory)
    return directory


def write_preference_pairs(
    directory: Path, *, train_rows: int = 40, valid_rows: int = 11
) -> tuple[Path, Path]:
    """Write preference pairs, worked answers over bare results, as JSONL; return the paths (train, valid)."""
    train, valid = directory / "train-pairs.jsonl", directory / "valid-pairs.jsonl"
    train.write_text(write_pairs(TRAIN_KINDS, train_rows, 1))
    valid.write_text(write_pairs(VALID_KINDS, valid_rows, 2))
    return train, valid


def write_unpaired_rows(pairs: Path, path: Path) -> None:
    """Write one response of each pair with its label, as TRL's KTOTrainer reads them; every third one is not desirable."""
    rows = []
    for number, line in enumerate(pairs.read_text().splitlines()):
        pair = json.loads(line)
        is_good = number % 3 < 2
        answer = pair["chosen" if is_good else "rejected"]
        rows.append({"prompt": pair["prompt"], "completion": answer, "label": is_good})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
