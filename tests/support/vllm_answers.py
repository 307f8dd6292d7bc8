"""A program for vLLM's Python: the greedy tokens of a model and its adapters.

Its arguments are a JSON file with `model`, `adapters` (name -> directory), `prompts` (token ids), `tokens` and `rank`, and the file
for the answers: name -> token ids of each prompt, with the name "" for the model without an adapter.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Answer all prompts with each adapter."""
    import vllm  # pyright: ignore[reportMissingImports]
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    asked = json.loads(Path(sys.argv[1]).read_text())
    adapters: dict[str, str] = asked["adapters"]
    lora: dict[str, Any] = {}
    if adapters:
        # On CPU, a row without an adapter uses the last slot, so there is one slot more than adapters.
        slots = len(adapters) + 1
        lora = {
            "enable_lora": True,
            "max_lora_rank": asked["rank"],
            "max_loras": slots,
            "max_cpu_loras": slots,
        }
    engine = vllm.LLM(
        asked["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        generation_config="vllm",
        **lora,
    )
    sampling = vllm.SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    answers = {}
    for number, (name, directory) in enumerate({"": "", **adapters}.items()):
        request = LoRARequest(name, number, directory) if name else None
        outputs = engine.generate(prompts, sampling, lora_request=request, use_tqdm=False)
        answers[name] = [list(output.outputs[0].token_ids) for output in outputs]
    Path(sys.argv[2]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
