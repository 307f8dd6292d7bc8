"""Verification of an export: the base model with its adapter as trained, against the export as plain libraries load it."""

import json
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import psutil
import torch
from peft.tuners.lora import LoraLayer
from torch.nn.functional import log_softmax

from configs.schema import LoraConfig
from runs.layout import DATA_REPORT_FILE, Export, Verification, VllmVerification
from training.data.prepared import fetch_prepared, rows_of_run
from training.data.row_index import IGNORED
from training.inference import vllm_scores
from training.inference.vllm_environment import max_lora_rank, python_of_vllm, variables_of_vllm
from training.models.architecture import build_on_meta_device
from training.models.files import ModelError, read_adapter_facts
from training.models.torch_provider import DTYPES, attach_adapter, load_weights, peft_config
from utils.errors import first_line
from utils.storage.bucket import open_store

if TYPE_CHECKING:
    from training.inference.checkpoint_model import TrainedModel

_ROWS, _TOKENS = 4, 64
_FEWEST_NATS = 1e-5  # rounding of fp32 itself, which depends on the order of a sum
_MEAN_LIMIT, _LARGEST_LIMIT = 2, 8
_NO_POWER_OF_TWO = 4 / 3
_VLLM_SECONDS = 1800
_ERROR = re.compile(r"^(?:\[rank\d+\]: )?((?:\w+\.)*\w+(?:Error|Exception)(?:: .+)?)$", re.MULTILINE)
_VLLM_CACHE_GIGABYTES = 1


@dataclass(frozen=True)
class Row:
    """A piece of a row that the models score."""

    tokens: list[int]
    labels: list[int]
    """Token ids, or IGNORED where a token does not contribute to the loss."""


@dataclass(frozen=True)
class _Outputs:
    """The outputs of a model for all rows."""

    scores: torch.Tensor
    """Log-probability of each next token in nats, (tokens)."""
    states: list[torch.Tensor]
    """Hidden states of the last row after the embedding and after each layer, (tokens, hidden size) each."""
    loss: float | None
    """Mean loss over the loss tokens in nats; None without loss tokens."""


def memory_needed(parameters: int) -> int:
    """Return the bytes that a verification needs: one copy of the model in fp32, and a layer's activations."""
    return int(parameters * 4 * 1.2)


def fits_in_memory(parameters: int) -> bool:
    """Return whether this machine has the memory for a verification."""
    return memory_needed(parameters) <= psutil.virtual_memory().available


def verify_export(
    trained: "TrainedModel",
    planned: Export,
    directory: Path,
    *,
    in_vllm: bool,
    progress: Callable[[str], None],
) -> Verification:
    """Compare an export with what was trained, on a few rows.

    Both are computed in fp32, so that they differ by the rounding of the weights only. The dtype's own rounding is measured on the
    trained model, with each of its weights rounded once, as a merge does.

    Args:
        trained: The checkpoint that was exported.
        planned: The export.
        directory: Local directory of its files.
        in_vllm: True to score the rows in vLLM, too.
        progress: Called with a description of each phase.

    Raises:
        ModelError: The export differs by more than the dtype's rounding. The message names the first part that does.
    """
    progress("verifying: the model as trained")
    weights, base = trained.weights(), trained.base_weights()
    trust = trained.config.trust_remote_code
    model: Any = load_weights(base or weights, dtype="fp32", trust_remote_code=trust)
    rows, source = _rows(trained, len(model.get_input_embeddings().weight))
    if base is not None:
        model = attach_adapter(model, weights)
        if trained.config.lora_config and not trained.config.initial_adapter_model_ckpt_path:
            _restore_scaling(model, trained.config.lora_config, base, trust_remote_code=trust)
    expected = _outputs(model, rows)
    dtype = DTYPES[planned.dtype or "fp32"]
    _round_weights(model, dtype)
    rounded = _outputs(model, rows)
    del model
    progress("verifying: the export")
    if planned.kind == "adapter":
        assert base is not None
        found: Any = attach_adapter(load_weights(base, dtype="fp32", trust_remote_code=trust), directory)
    else:
        found = load_weights(directory, dtype="fp32", trust_remote_code=trust)
    outputs = _outputs(found, rows)
    del found
    difference = (outputs.scores - expected.scores).abs()
    rounding = (rounded.scores - expected.scores).abs()
    verification = Verification(
        rows=len(rows),
        tokens=difference.numel(),
        source=source,
        mean_difference=float(difference.mean()),
        largest_difference=float(difference.max()),
        mean_rounding=float(rounding.mean()),
        largest_rounding=float(rounding.max()),
        loss=outputs.loss,
        loss_as_trained=expected.loss,
    )
    if not _is_rounding(difference, rounding):
        raise ModelError(
            f"the export of {trained.checkpoint} does not compute what was trained: log-probabilities differ by "
            f"{verification.mean_difference:.2g} nats on average (at most {verification.largest_difference:.2g}), but rounding to "
            f"{planned.dtype or 'fp32'} explains {verification.mean_rounding:.2g} (at most {verification.largest_rounding:.2g}). The first "
            f"part that differs is {_first_part(expected, rounded, outputs)}. Use the checkpoint itself with PEFT, and report this."
        )
    if not in_vllm:
        return verification
    progress("verifying: the export in vLLM")
    compared = _compare_in_vllm(trained, planned, directory, rows, expected.scores, rounding)
    return verification.model_copy(update={"vllm": compared})


def _compare_in_vllm(
    trained: "TrainedModel",
    planned: Export,
    directory: Path,
    rows: Sequence[Row],
    expected: torch.Tensor,
    rounding: torch.Tensor,
) -> VllmVerification:
    """Score the rows in vLLM, in fp32; raise ModelError if it computes something else than was trained."""
    base = trained.base_weights() if planned.kind == "adapter" else None
    rank = read_adapter_facts(trained.checkpoint).largest_rank if base else 0
    asked = {
        "model": str(base or directory),
        "tokenizer": str(directory),
        "adapter": str(directory) if base else None,
        "rank": max_lora_rank(rank) or rank,
        "trust_remote_code": trained.config.trust_remote_code,
        "rows": [row.tokens for row in rows],
    }
    with tempfile.TemporaryDirectory() as temporary:
        question, answer = Path(temporary) / "rows.json", Path(temporary) / "scores.json"
        question.write_text(json.dumps(asked), "utf-8")
        try:
            done = subprocess.run(
                [str(python_of_vllm()), str(vllm_scores.__file__), str(question), str(answer)],
                env=variables_of_vllm(_VLLM_CACHE_GIGABYTES),
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                stdin=subprocess.DEVNULL,
                timeout=_VLLM_SECONDS,
            )
        except (subprocess.TimeoutExpired, OSError) as error:
            return VllmVerification(error=first_line(error))
        if done.returncode != 0:
            # vLLM cannot load every architecture, and memory may be short: that says nothing about the export.
            return VllmVerification(error=f"exit code {done.returncode}: {_last_error(done.stderr)}")
        found = json.loads(answer.read_text("utf-8"))
    scores = torch.tensor(found["scores"])
    difference = (scores - expected).abs()
    if not _is_rounding(difference, rounding):
        raise ModelError(
            f"the export of {trained.checkpoint} computes what was trained in transformers, but not in vLLM {found['version']}: "
            f"log-probabilities differ by {float(difference.mean()):.2g} nats on average (at most {float(difference.max()):.2g}). Serve it "
            "with transformers, and report this."
        )
    return VllmVerification(
        version=found["version"],
        mean_difference=float(difference.mean()),
        largest_difference=float(difference.max()),
    )


def _last_error(output: str) -> str:
    """Return the last error that a program's output names, or its last line."""
    found = _ERROR.findall(output) or output.strip().splitlines() or ["no output"]
    return found[-1].strip()


def _restore_scaling(adapted: Any, lora: LoraConfig, base: Path, *, trust_remote_code: bool) -> None:
    """Give an adapter the scaling factors that it was trained with. PEFT computes those of its file in another order of the patterns.

    Args:
        adapted: The model with the adapter as its file describes it.
        lora: The lora_config of the run.
        base: Local directory of the base model.
        trust_remote_code: True if code in that directory may be executed.
    """
    model = build_on_meta_device(base, str(base), trust_remote_code=trust_remote_code).model
    plain = lora.model_copy(update={"init_lora_weights": True, "trainable_token_indices": None})
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the plan reports what PEFT warns of
        built = peft.get_peft_model(model, peft_config(plain))
    trained = {
        name: module.scaling for name, module in built.named_modules() if isinstance(module, LoraLayer)
    }
    for name, module in adapted.named_modules():
        if isinstance(module, LoraLayer):
            module.scaling |= trained.get(name, {})


def _is_rounding(difference: torch.Tensor, rounding: torch.Tensor) -> bool:
    mean = max(float(rounding.mean()), _FEWEST_NATS)
    largest = max(float(rounding.max()), mean)
    return (
        float(difference.mean()) <= _MEAN_LIMIT * mean and float(difference.max()) <= _LARGEST_LIMIT * largest
    )


def _first_part(expected: _Outputs, rounded: _Outputs, found: _Outputs) -> str:
    for layer, states in enumerate(zip(expected.states, rounded.states, found.states, strict=True)):
        as_trained, with_rounding, exported = states
        allowed = _MEAN_LIMIT * (with_rounding - as_trained).norm() + 1e-5 * as_trained.norm()
        if (exported - as_trained).norm() > allowed:
            return "the embedding" if layer == 0 else f"layer {layer - 1}"
    return "the LM head"


def _outputs(model: Any, rows: Sequence[Row]) -> _Outputs:
    scores, losses, states = [], [], []
    model.eval()
    for row in rows:
        with torch.inference_mode():
            output = model(
                input_ids=torch.tensor([row.tokens]), output_hidden_states=row is rows[-1], use_cache=False
            )
        next_tokens = torch.tensor(row.tokens[1:])
        score = log_softmax(output.logits[0, :-1].float(), -1).gather(1, next_tokens[:, None])[:, 0]
        scores.append(score)
        losses.append(-score[torch.tensor(row.labels[1:]) != IGNORED])
        if output.hidden_states is not None:
            states = [state[0].float() for state in output.hidden_states]
    loss = torch.cat(losses)
    return _Outputs(torch.cat(scores), states, float(loss.mean()) if loss.numel() else None)


def _round_weights(model: Any, dtype: torch.dtype) -> None:
    """Round every weight as an export in the dtype does, base weights together with what the adapter adds to them.

    Half a unit in the last place of a base weight may be more than an adapter adds, and rounding then loses that. Rounding the base
    alone would not show it. Weights that the dtype holds exactly are rounded too.
    """
    with torch.no_grad():
        adapted = set()
        for module in model.modules():
            if isinstance(module, LoraLayer):
                base: Any = module.get_base_layer()
                weight = getattr(base, getattr(module, "parameter_name", "weight"))
                merged = weight.data + module.get_delta_weight("default")  # pyright: ignore[reportAttributeAccessIssue]
                weight.data += merged.to(dtype).float() - merged
                adapted.add(id(weight))
        for parameter in model.parameters():
            if id(parameter) not in adapted:
                parameter.data = (parameter.data * _NO_POWER_OF_TWO).to(dtype).float() / _NO_POWER_OF_TWO


# --- Rows ---------------------------------------------------------------------------------------------------------


def _rows(trained: "TrainedModel", ids: int) -> tuple[list[Row], str]:
    """Return the ends of a few prepared rows and their source; validation rows if the run has any.

    Args:
        trained: The checkpoint.
        ids: Number of rows of the embedding; a tokenizer may have more tokens.
    """
    data = trained.manifest.data
    # With several validation sets, the manifest has one fingerprint for all of them.
    report = open_store(trained.run_uri).read_if_exists(DATA_REPORT_FILE)
    first = json.loads(report)["valid"] if report else None
    valid = first["fingerprint"] if first else data.valid
    for fingerprint, source in ((valid, "validation rows"), (data.train, "training rows")):
        stored = _prepared_rows(trained, fingerprint) if fingerprint else None
        if stored:
            return [_end_of(row) for row in stored], source
    made_up = _made_up_rows(min(ids, len(trained.tokenizer())))
    return made_up, "random tokens, because the prepared rows were deleted"


def _prepared_rows(trained: "TrainedModel", fingerprint: str) -> list[dict[str, Any]] | None:
    stored = rows_of_run(trained.run_uri, fingerprint)
    if stored is None:
        return None
    key, bucket = stored
    rows = fetch_prepared(key, trained.cache, bucket).dataset()
    return [rows[index] for index in range(min(_ROWS, len(rows)))]


def _end_of(row: dict[str, Any]) -> Row:
    if "input_ids" in row:
        tokens, labels = list(row["input_ids"]), list(row["labels"])
    else:
        prompt, chosen = list(row["prompt_ids"]), list(row["chosen_ids"])
        tokens, labels = prompt + chosen, [IGNORED] * len(prompt) + chosen
    return Row(tokens[-_TOKENS:], labels[-_TOKENS:])


def _made_up_rows(ids: int) -> list[Row]:
    generator = torch.Generator().manual_seed(0)

    def made_up() -> Iterator[Row]:
        for _ in range(_ROWS):
            tokens = torch.randint(0, ids, (_TOKENS,), generator=generator).tolist()
            yield Row(tokens, tokens)

    return list(made_up())
