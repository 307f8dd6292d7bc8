"""The torch provider: attention, experts and dtypes of the models that it builds."""

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from configs.schema import LoraConfig
from tests.support.kernel_processes import run_without_triton
from tests.support.model_requests import model_request
from tests.support.process_memory import anonymous_memory
from tests.support.tiny_model import make_model
from training.models import varlen_attention
from training.models.attention import Attention
from training.models.files import ModelError
from training.models.torch_provider import build, load_base, load_weights

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FIXED: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
LONGROPE: dict[str, Any] = FIXED | {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 5.0, 9.0, 13.0],
}
_TINY_TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
TINY_TOWERS: dict[str, Any] = {
    "vision_config": _TINY_TOWER | {"num_hidden_layers": 2, "image_size": 28, "crop_size": 28},
    "audio_config": _TINY_TOWER | {"num_blocks": 2, "ext_pw_out_channel": 16, "nemo_conv_channels": 8},
}


def save_model(directory: Path, kind: str, **changes: object) -> Path:
    config = AutoConfig.for_model(kind, **SHAPE | changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def test_loaded_models_apply_softcapping(tmp_path: Path):
    """SDPA would silently ignore softcapping."""
    settings = {"head_dim": 8, "query_pre_attn_scalar": 8, "initializer_range": 0.5}
    capped = save_model(tmp_path, "gemma2", attn_logit_softcapping=0.1, **settings)
    tokens = torch.arange(16)[None]
    model: Any = load_weights(capped, dtype="fp32")
    logits = model(tokens).logits
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert (model(tokens).logits - logits).abs().max() > 0.1


def test_models_without_sdpa_in_transformers_get_eager_attention(tmp_path: Path):
    directory = save_model(tmp_path, "gpt_oss", num_local_experts=2, num_experts_per_tok=1, head_dim=8)
    model: Any = load_weights(directory, dtype="fp32")
    assert model.config._attn_implementation == "eager"
    assert model(torch.arange(16)[None]).logits.isfinite().all()


@pytest.mark.parametrize("prompt", [10, 16, 20])
@pytest.mark.parametrize(
    ("kind", "rope", "has_adapter"),
    [
        ("phi3", LONGROPE, False),
        ("phi3", LONGROPE, True),
        ("phi3", FIXED, False),
        ("phimoe", FIXED, False),
        ("phi4_multimodal", FIXED, False),
    ],
    ids=["longrope", "longrope with an adapter", "phi3", "phimoe", "phi4_multimodal"],
)
def test_answers_that_pass_the_original_length_equal_those_without_a_cache(
    *, kind: str, rope: dict[str, Any], has_adapter: bool, prompt: int, tmp_path: Path
):
    """Phi 3 in transformers 5.17 forgets the prompt there (`prepare_inputs_for_generation` in models/phi3/modeling_phi3.py)."""
    limit = {"original_max_position_embeddings": 16, "rope_parameters": rope}
    ids = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    towers = TINY_TOWERS if kind == "phi4_multimodal" else {}
    others = limit | ids | towers
    phi = save_model(tmp_path, kind, initializer_range=0.3, max_position_embeddings=64, **others)
    model: Any = load_weights(phi, dtype="fp32").eval()
    if has_adapter:
        model = get_peft_model(model, PeftConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    rows = torch.randint(1, 64, (2, prompt), generator=torch.Generator().manual_seed(0))
    rows[0, :3] = 0
    inputs = {
        "input_ids": rows,
        "attention_mask": (rows > 0).long(),
        "do_sample": False,
        "max_new_tokens": 10,
    }
    assert model.generate(**inputs).tolist() == model.generate(**inputs, use_cache=False).tolist()


@torch.no_grad()
@pytest.mark.parametrize("tokens", [16, 20])
def test_dynamic_rope_does_not_depend_on_earlier_sequences(tokens: int, tmp_path: Path):
    """transformers 5.17 retains the frequencies of the longest sequence (`dynamic_frequency_update` in modeling_rope_utils.py)."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    directory = save_model(
        tmp_path, "llama", initializer_range=0.3, max_position_embeddings=16, rope_parameters=rope
    )
    model: Any = load_weights(directory, dtype="fp32").eval()
    rows = torch.randint(1, 64, (1, 60), generator=torch.Generator().manual_seed(0))
    first = model(rows[:, :tokens]).logits
    model(rows)
    assert torch.equal(model(rows[:, :tokens]).logits, first)


@pytest.mark.slow
def test_unsloth_on_cpu_loads_dynamic_rope_that_does_not_depend_on_earlier_sequences(tmp_path: Path):
    directory = make_model(
        tmp_path, positions=16, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    )
    variables = {
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_COMPILE_LOCATION": str(tmp_path / "compiled"),
    }
    lengths = "20", "60", "20"
    run = run_without_triton("tests.support.unsloth_on_cpu", str(directory), *lengths, **variables)
    first, _, again = run["logits"]
    assert again == first


def test_deterministic_experts_use_the_eager_implementation(tmp_path: Path):
    mixture = save_model(tmp_path, "mixtral", num_local_experts=2)
    assert load_base(model_request(mixture)).get_experts_implementation() != {"": "eager"}
    assert load_base(model_request(mixture, deterministic=True)).get_experts_implementation() == {"": "eager"}


def test_unquantized_parameters_and_hidden_states_are_bf16(tmp_path: Path):
    """In fp32, they and the hidden states would need twice the memory."""
    directory = save_model(tmp_path, "llama", hidden_size=64, intermediate_size=64)
    lora = LoraConfig(target_modules=["q_proj"])
    model = build(model_request(directory, weights_dtype="bf16", load_in_4bit=True, lora=lora))
    types = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
    assert types == {torch.uint8, torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        states = model(torch.arange(16)[None], output_hidden_states=True).hidden_states
    assert {state.dtype for state in states} == {torch.bfloat16}


class _DeviceInAFile(TorchFunctionMode):
    """A GPU whose memory is a file, so its tensors do not count as memory of this process; it notes that of each transfer."""

    def __init__(self, file: Path):
        super().__init__()
        self._file = file
        self.transfers = 0
        self.most_bytes_of_host = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if (
            func is torch.device and type(args[0]) is int
        ):  # an index alone means the accelerator, and torch has none here
            return torch.device("cuda", args[0])
        if str(named.get("device", "cpu")) in ("cpu", "meta"):
            return func(*args, **named)
        named["device"] = "cpu"
        moved = func(*args, **named)
        self.most_bytes_of_host = max(self.most_bytes_of_host, memory_in_use())
        self.transfers += 1
        storage = torch.UntypedStorage.from_file(str(self._file), shared=True, nbytes=moved.nbytes)
        self._file.unlink()
        return torch.empty(0, dtype=moved.dtype).set_(storage).view(moved.shape).copy_(moved)  # pyright: ignore[reportArgumentType, reportCallIssue]


def memory_in_use() -> int:
    """Return the bytes of this process that no file backs, without freed ones."""
    ctypes.CDLL(None).malloc_trim(0)
    return anonymous_memory()


def test_weights_reach_a_gpu_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The host never holds the model, although its weights are stored in another dtype."""
    directory = save_model(tmp_path / "model", "llama", vocab_size=256, hidden_size=512, num_hidden_layers=24)
    for name, value in {
        "current_device": 0,
        "mem_get_info": (2**34, 2**34),
        "memory_reserved": 0,
        "memory_allocated": 0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the mode is one of this thread
    before = memory_in_use()
    with _DeviceInAFile(tmp_path / "gpu") as gpu:
        model = load_weights(directory, dtype="bf16", device="cuda")
    assert gpu.transfers >= len(list(model.parameters()))
    total = sum(parameter.nbytes for parameter in model.parameters())
    assert gpu.most_bytes_of_host - before < total / 4


def test_deterministic_does_not_change_models_without_experts(tmp_path: Path):
    directory = save_model(tmp_path, "llama")
    tokens = torch.arange(16)[None]
    plain, deterministic = (load_base(model_request(directory, deterministic=flag)) for flag in (False, True))
    assert torch.equal(plain(tokens).logits, deterministic(tokens).logits)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_packing_with_varlen_attention_needs_ampere(
    capability: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    packed = model_request(
        save_model(tmp_path, "llama"), attention=Attention(varlen_attention.NAME, mask=False)
    )
    if capability >= (8, 0):
        assert load_base(packed).config._attn_implementation == varlen_attention.NAME
        return
    with pytest.raises(ModelError, match=r"packing: .*Tesla T4.*packing: false"):
        load_base(packed)
