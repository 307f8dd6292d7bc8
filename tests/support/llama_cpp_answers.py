"""A program that answers prompts with llama.cpp: the greedy tokens of a GGUF file, and the tokens of each prompt.

Its arguments are the file, a JSON file with `prompts` (texts) and `tokens` (their number), and the file for the answers.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    """Answer each prompt, without regard to tokens that end an answer."""
    import xllamacpp  # pyright: ignore[reportMissingImports]

    model, asked, answers = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), []
    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.n_ctx = 512
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = 1
    parameters.warmup = False
    # By default llama.cpp rounds keys and values to F16, and in its flash attention also those of an F32 cache.
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(parameters)
    for prompt in asked["prompts"]:
        request = {
            "prompt": prompt,
            "max_tokens": asked["tokens"],
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 1,  # with them, the answer has the ids of its tokens
            "cache_prompt": False,
        }
        (choice,) = server.handle_completions(request)["choices"]
        answers.append([token["id"] for token in choice["logprobs"]["content"]])
    Path(sys.argv[3]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
