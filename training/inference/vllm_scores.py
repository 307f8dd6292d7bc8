"""A program for vLLM's Python: the log-probabilities that vLLM gives to the tokens of rows.

Its arguments are two files. The first has JSON with `model`, `tokenizer` and `adapter` (directories; no adapter: null), `rank` (for
--max-lora-rank), `trust_remote_code` and `rows` (lists of token ids). The program writes JSON to the second: `version` of vLLM, and
`scores`, the log-probability of each next token of all rows in nats.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Score all rows in fp32."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = (
        "0"  # errors of the engine's own process would hide the cause
    )
    import vllm  # pyright: ignore[reportMissingImports]
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    if not current_platform.is_cpu():
        sys.exit(
            "vLLM's kernels for GPUs compute in 16 bits or TF32; install its CPU build with `make setup-vllm`"
        )
    asked = json.loads(Path(sys.argv[1]).read_text())
    rows: list[list[int]] = asked["rows"]
    lora: dict[str, Any] = {}
    if asked["adapter"]:
        lora = {"enable_lora": True, "max_lora_rank": asked["rank"]}
    engine = vllm.LLM(
        asked["model"],
        tokenizer=asked["tokenizer"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=max(map(len, rows)),
        generation_config="vllm",
        trust_remote_code=asked["trust_remote_code"],
        **lora,
    )
    # One request per token, which may only be that token: vLLM on CPU computes no `prompt_logprobs` with an adapter.
    prompts = [{"prompt_token_ids": row[:end]} for row in rows for end in range(1, len(row))]
    forced = [
        vllm.SamplingParams(temperature=0, max_tokens=1, logprobs=0, allowed_token_ids=[token])
        for row in rows
        for token in row[1:]
    ]
    request = LoRARequest("export", 1, asked["adapter"]) if asked["adapter"] else None
    outputs = [
        each.outputs[0] for each in engine.generate(prompts, forced, lora_request=request, use_tqdm=False)
    ]
    # The default of `logprobs_mode` is the model's own log-probability, before other tokens are excluded.
    scores = [output.logprobs[0][output.token_ids[0]].logprob for output in outputs]
    Path(sys.argv[2]).write_text(json.dumps({"version": vllm.__version__, "scores": scores}))


if __name__ == "__main__":
    main()
