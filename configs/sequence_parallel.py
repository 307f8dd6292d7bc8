"""The table of what does not work with sequence_parallel_size: docs/kernels.md shows it.

Errors take their reason and fix from it, except those about `num_devices` and heads, which name the numbers that fit.
"""

from dataclasses import dataclass
from typing import Literal

KEY = "sequence_parallel_size"

Excluded = Literal[
    "`num_devices` that N does not divide",
    "`task: preference_tuning`",
    "`task: classification`",
    "`eval_samples`",
    "`flash_attention_2`",
    "`kernels: unsloth`",
    "`models` of the service",
    "heads that N workers cannot share",
    "other architectures",
    "mixtures of experts and custom code",
    "logit softcapping",
    "RoPE that depends on the length",
    "a sliding window shorter than the rows",
    "another N after a resume",
]


@dataclass(frozen=True)
class Exclusion:
    """Why something does not work with sequence_parallel_size, and what to do."""

    reason: str
    """The rest of a sentence."""
    fix: str


_WITHOUT = f"remove `{KEY}`"
_OTHER_MODEL = f"{_WITHOUT}, or use a supported model"

EXCLUSIONS: dict[Excluded, Exclusion] = {
    "`num_devices` that N does not divide": Exclusion(
        "each group of N workers shares its sequences", "use a multiple of N devices, or another N"
    ),
    "`task: preference_tuning`": Exclusion("the loss scores complete answers", _WITHOUT),
    "`task: classification`": Exclusion("the evaluation scores complete answers", _WITHOUT),
    "`eval_samples`": Exclusion("each worker generates answers of its own", "remove one of them"),
    "`flash_attention_2`": Exclusion(
        "workers that share sequences use PyTorch's flash kernels", "remove `flash_attention_2`"
    ),
    "`kernels: unsloth`": Exclusion("Unsloth's attention does not divide sequences", "write `kernels: auto`"),
    "`models` of the service": Exclusion("its jobs also do preference tuning", _WITHOUT),
    "heads that N workers cannot share": Exclusion(
        "N must divide the attention heads, and divide the key-value heads or be a multiple of them",
        "use another N",
    ),
    "other architectures": Exclusion("they have not been tested", _OTHER_MODEL),
    "mixtures of experts and custom code": Exclusion(
        "the loss that balances experts, or custom code, would see only a part of each sequence", _OTHER_MODEL
    ),
    "logit softcapping": Exclusion("PyTorch's flash kernels do not support it", _OTHER_MODEL),
    "RoPE that depends on the length": Exclusion(
        "its frequencies depend on the largest position, which differs between the workers", _OTHER_MODEL
    ),
    "a sliding window shorter than the rows": Exclusion(
        "it needs a mask of all token pairs, except with packing in bf16 on a GPU",
        f"{_WITHOUT}, lower `context_length`, or write `packing: true` and `dtype: bf16` on a GPU",
    ),
    "another N after a resume": Exclusion("the rows of a step would change", "write the N of the checkpoint"),
}
"""What is excluded -> why, and what to do. N is sequence_parallel_size."""


def error_with(excluded: Excluded) -> str:
    """Return the error for something that the run has, as one sentence."""
    exclusion = EXCLUSIONS[excluded]
    return f"`{KEY}` does not work with {excluded}, since {exclusion.reason}: {exclusion.fix}"
