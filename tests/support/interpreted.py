"""Comparison of Triton kernels in Triton's interpreter with torch in fp32: `python -m tests.support.interpreted liger`.

Runs in a separate process with TRITON_INTERPRET=1 and Triton on PYTHONPATH. Prints one line of JSON with each kernel's results and
gradients: the largest difference from torch, relative to the largest value.
"""

import sys
from typing import Any

from tests.support.triton_interpreter import triton_cast  # before modules that define kernels

if "unsloth" in sys.argv:
    import unsloth  # noqa: F401  # before the modules that it patches

import json
from collections.abc import Callable
from types import SimpleNamespace

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy, gelu, log_softmax, silu
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

ROWS, TOKENS, HIDDEN, WIDTH, HEADS, KEY_HEADS, WORDS = 2, 5, 64, 96, 4, 2, 300
HEAD_DIM = HIDDEN // HEADS
EPSILON = 1e-5

Kernel = Callable[..., Any]
Differences = dict[str, float]


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compare(
    ours: Kernel, reference: Kernel, inputs: dict[str, torch.Tensor], *, module: Any = None
) -> Differences:
    """Compare the results of two functions, and the gradients of the inputs and of a module's trained parameters."""
    parameters = module.named_parameters() if module else ()
    trained = {name: value for name, value in parameters if value.requires_grad}
    found = []
    for function in (ours, reference):
        leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
        # Clone the inputs: some kernels overwrite them.
        results = function(**{name: leaf.clone() for name, leaf in leaves.items()})
        results = results if isinstance(results, tuple) else (results,)
        variables = leaves | trained
        grad_outputs = [
            random_tensor(*result.shape, seed=number + 1) for number, result in enumerate(results)
        ]
        gradients = torch.autograd.grad(results, list(variables.values()), grad_outputs)
        found.append(
            {f"result {number}": result.detach() for number, result in enumerate(results)}
            | {f"gradient of {name}": gradient for name, gradient in zip(variables, gradients, strict=True)}
        )
    return difference(*found)


def difference(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> Differences:
    assert ours.keys() == reference.keys()
    assert all(value.abs().max() > 0 for value in reference.values())
    return {
        name: float((ours[name] - value).detach().abs().max() / value.detach().abs().max())
        for name, value in reference.items()
    }


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON)


def norm_inputs() -> dict[str, torch.Tensor]:
    return {"x": random_tensor(ROWS, TOKENS, HIDDEN), "weight": random_tensor(HIDDEN, seed=9)}


def gate_inputs() -> dict[str, torch.Tensor]:
    return {"gate": random_tensor(ROWS, TOKENS, WIDTH), "up": random_tensor(ROWS, TOKENS, WIDTH, seed=9)}


def rotary_inputs() -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Return queries and keys, and the cosines and sines of their positions."""
    config = LlamaConfig(hidden_size=HIDDEN, num_attention_heads=HEADS, max_position_embeddings=64)
    positions = torch.arange(TOKENS)[None]
    cos, sin = LlamaRotaryEmbedding(config)(random_tensor(1), positions)
    queries = random_tensor(ROWS, HEADS, TOKENS, HEAD_DIM)
    keys = random_tensor(ROWS, KEY_HEADS, TOKENS, HEAD_DIM, seed=9)
    return {"queries": queries, "keys": keys}, (cos, sin)


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


def adapted_layer() -> Any:
    """Return a layer whose adapters have nonzero weights."""
    model: Any = get_peft_model(small_llama(), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = random_tensor(*parameter.shape)
    return model.base_model.model.model.layers[0]


def liger_kernels() -> dict[str, Callable[[], Differences]]:
    from liger_kernel.ops import (
        LigerGELUMulFunction,
        LigerRMSNormFunction,
        LigerRopeFunction,
        LigerSiLUMulFunction,
    )
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    def rope() -> Differences:
        inputs, (cos, sin) = rotary_inputs()
        return compare(
            lambda queries, keys: LigerRopeFunction.apply(queries, keys, cos, sin),
            lambda queries, keys: apply_rotary_pos_emb(queries, keys, cos, sin),
            inputs,
        )

    def full_model() -> Differences:
        """Compare a model with Liger applied as in training/models/liger_provider.py."""
        patched, plain = small_llama(), small_llama()
        _apply_liger_kernel_to_instance(model=patched, cross_entropy=False, fused_linear_cross_entropy=False)
        found = []
        for model in (patched, plain):
            ids = torch.arange(ROWS * TOKENS).view(ROWS, TOKENS)
            logits = model(ids).logits
            logits.backward(random_tensor(*logits.shape))
            gradients = {f"gradient of {name}": value.grad for name, value in model.named_parameters()}
            found.append({"logits": logits.detach(), **gradients})
        return difference(*found)

    return {
        "rms_norm": lambda: compare(
            lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPSILON, 0.0, "llama", False),
            rms_norm,
            norm_inputs(),
        ),
        "gemma_rms_norm": lambda: compare(
            lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPSILON, 1.0, "gemma", False),
            lambda x, weight: rms_norm(x, weight + 1),
            norm_inputs(),
        ),
        "rope": rope,
        "swiglu": lambda: compare(
            lambda gate, up: LigerSiLUMulFunction.apply(gate, up),
            lambda gate, up: silu(gate) * up,
            gate_inputs(),
        ),
        "geglu": lambda: compare(
            lambda gate, up: LigerGELUMulFunction.apply(gate, up),
            lambda gate, up: gelu(gate, approximate="tanh") * up,
            gate_inputs(),
        ),
        "full_model": full_model,
    }


def trl_kernels() -> dict[str, Callable[[], Differences]]:
    from trl.kernels import ChunkedLogProbFunction

    targets = torch.arange(ROWS * TOKENS) * 29 % WORDS
    inputs = {"hidden": random_tensor(ROWS * TOKENS, HIDDEN), "head": random_tensor(WORDS, HIDDEN, seed=9)}

    def log_probabilities(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return log_softmax(hidden @ head.T, -1).gather(1, targets[:, None])[:, 0]

    return {
        # Tiles of 128 words, so that the kernel adds up three tiles.
        "fused_head": lambda: compare(
            lambda hidden, head: ChunkedLogProbFunction.apply(
                hidden, head, None, targets, 1.0, 128, None, 1.0, ()
            )[0],
            log_probabilities,
            inputs,
        ),
    }


def unsloth_kernels() -> dict[str, Callable[[], Differences]]:
    import unsloth.kernels as kernels
    from unsloth.kernels import cross_entropy_loss

    cross_entropy_loss.triton_cast = triton_cast

    def norm(x: torch.Tensor, weight: torch.Tensor, gemma: bool) -> torch.Tensor:
        module = SimpleNamespace(weight=weight, variance_epsilon=EPSILON)
        return kernels.fast_rms_layernorm(module, x, gemma)

    def rope() -> Differences:
        inputs, (cos, sin) = rotary_inputs()
        return compare(
            lambda queries, keys: kernels.fast_rope_embedding(queries, keys, cos, sin),
            lambda queries, keys: apply_rotary_pos_emb(queries, keys, cos, sin),
            inputs,
        )

    def lora_qkv() -> Differences:
        attention = adapted_layer().self_attn
        attention.o_proj.requires_grad_(False)
        return compare(
            lambda x: kernels.apply_lora_qkv(attention, x),
            lambda x: (attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)),
            {"x": random_tensor(ROWS, TOKENS, HIDDEN)},
            module=attention,
        )

    def lora_output() -> Differences:
        attention = adapted_layer().self_attn
        return compare(
            lambda x: kernels.apply_lora_o(attention, x),
            attention.o_proj,
            {"x": random_tensor(ROWS, TOKENS, HIDDEN)},
            module=attention.o_proj,
        )

    def lora_mlp(fused: Kernel, activation: Kernel) -> Differences:
        mlp = adapted_layer().mlp
        return compare(
            lambda x: fused(mlp, x),
            lambda x: mlp.down_proj(activation(mlp.gate_proj(x)) * mlp.up_proj(x)),
            {"x": random_tensor(ROWS, TOKENS, HIDDEN)},
            module=mlp,
        )

    def loss(cap: float) -> Differences:
        """Compare the loss with logits soft-capped at `cap`, as in Gemma 2; 0: not capped."""
        labels = (torch.arange(ROWS * TOKENS) * 29 % WORDS).view(ROWS, TOKENS)
        labels[0, :2] = -100

        def reference(logits: torch.Tensor) -> torch.Tensor:
            capped = cap * torch.tanh(logits / cap) if cap else logits
            return cross_entropy(capped.flatten(0, 1), labels.flatten())

        return compare(
            lambda logits: kernels.fast_cross_entropy_loss(logits, labels, logit_softcapping=cap),
            reference,
            {"logits": random_tensor(ROWS, TOKENS, WORDS)},
        )

    return {
        "rms_norm": lambda: compare(lambda x, weight: norm(x, weight, False), rms_norm, norm_inputs()),
        "gemma_rms_norm": lambda: compare(
            lambda x, weight: norm(x, weight, True),
            lambda x, weight: rms_norm(x, weight + 1),
            norm_inputs(),
        ),
        "rope": rope,
        "lora_qkv": lora_qkv,
        "lora_output": lora_output,
        "lora_mlp_swiglu": lambda: lora_mlp(kernels.apply_lora_mlp_swiglu, silu),
        "lora_mlp_geglu": lambda: lora_mlp(
            kernels.apply_lora_mlp_geglu_approx, lambda x: gelu(x, approximate="tanh")
        ),
        "lora_mlp_geglu_exact": lambda: lora_mlp(kernels.apply_lora_mlp_geglu_exact, gelu),
        "cross_entropy": lambda: loss(0),
        "gemma_cross_entropy": lambda: loss(3.0),
    }


if __name__ == "__main__":
    package_kernels = {"liger": liger_kernels, "trl": trl_kernels, "unsloth": unsloth_kernels}[sys.argv[1]]
    print(json.dumps({name: measure() for name, measure in package_kernels().items()}))
