"""Checks that reject a run before training starts: missing packages, disk, template, quantization, LoRA targets, adapter shape."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.loading import ConfigError, LoadedConfig
from configs.schema import (
    FinetuneConfig,
    LoraConfig,
    MlflowLogger,
    WandbLogger,
)
from runs.layout import MODELS
from training.data.prepared import PREPARED
from training.data.request import DataRequest
from training.data.summary import DataSummary
from training.models.adapter import AdapterParameters, Mismatch, is_bias_of_base, unmatched_keys
from training.models.architecture import MetaModel, is_embedding, is_head
from training.models.files import (
    ADAPTER_FILE,
    CHAT_TEMPLATE_FILE,
    COMPLETE_TOKENIZER,
    AdapterFacts,
    ModelError,
    ModelFacts,
    have_equal_bytes,
    is_hub_id,
    is_model_file,
    is_named,
    only_indexed_weights,
    targeted_modules,
)
from training.models.kernels import is_installed
from training.models.new_tokens import embedding_tensor, rows_needed, vocabulary_rows
from training.planning.endpoints import ClusterTarget
from training.planning.resume import adapter_differences, listed
from utils.files import format_bytes, free_bytes, nearest_existing
from utils.storage.bucket import is_remote, join_uri, missing_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


_NEEDS_COMPLETE_EMBEDDING = "PEFT trains the rows of tokens from the complete embedding, but ZeRO-3 shards it and PEFT does not gather it"
_MAX_ROWS_PER_STEP = 1_000_000
"""More rows than the data has are accepted up to this number: small data sets are padded."""


def reject_missing_requirements(loaded: LoadedConfig, target: ClusterTarget) -> None:
    """Reject a configuration that cannot run in this environment; report all reasons in one error. A job checks its own packages."""
    reasons = list(loaded.rejections)
    config = loaded.config
    tracker = config.logger.provider if isinstance(config.logger, WandbLogger | MlflowLogger) else None
    if tracker and not target.is_job_server and not is_installed(tracker):
        reasons.append(
            f"logger: the package {tracker} is not installed. Install it with `make setup-trackers` (in an image: --build-arg TRACKERS=1), or remove logger: metrics.jsonl is always written."
        )
    if config.run_name in (PREPARED, MODELS):
        content = "prepared rows" if config.run_name == PREPARED else "uploaded models"
        reasons.append(
            f"run_name: {config.run_name} is the directory of {content} in storage_path. Choose another name."
        )
    if reasons:
        raise ConfigError("\n".join(reasons))


def check_disk(base_model: str, facts: ModelFacts, scratch: Path) -> None:
    """Check that this node's disk has space for the model's files."""
    if is_hub_id(base_model) or not is_remote(base_model):
        return  # the Hub cache checks its own disk
    missing, free = (
        missing_bytes(
            base_model, scratch / "cache" / "models", only_indexed_weights(base_model, is_model_file)
        ),
        free_bytes(scratch),
    )
    if missing > free:
        raise ModelError(
            f"model {facts.source}: needs {format_bytes(missing)} on this node, but {scratch} has {format_bytes(free)} free. "
            "Free some space, or set output_dir to a larger disk."
        )


def check_batch(config: FinetuneConfig, rows: int) -> None:
    """Check that a step has not many more rows than the data: the rest of it would be padding rows."""
    step = config.rows_per_step
    if step <= max(rows, _MAX_ROWS_PER_STEP):
        return
    factors = {
        "train_batch_size_per_device": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "num_devices": config.most_devices,
    }
    largest = max(factors, key=lambda key: factors[key])
    raise ConfigError(
        f"{largest}: with {factors[largest]:,}, a step takes {step:,} rows, but the training data has {rows:,}. Lower it."
    )


def check_checkpoint_fits(needed: int, storage: str, scratch: Path | None) -> None:
    """Check that a checkpoint fits on the disks that it is written to, once for each directory on them.

    Args:
        needed: Estimated bytes of a checkpoint.
        storage: URI that holds the runs; the free space of a bucket is unknown.
        scratch: Directory in which a worker saves a checkpoint before it is uploaded; None if the workers run on other machines.
    """
    places = {"output_dir": scratch} if scratch else {}
    if not is_remote(storage):
        places["storage_path"] = Path(storage)  # also on a cluster, whose machines share it
    disks: dict[int, list[str]] = {}
    for key, directory in places.items():
        disks.setdefault(nearest_existing(directory).stat().st_dev, []).append(key)
    for keys in disks.values():
        directory = places[keys[-1]]
        if (free := free_bytes(directory)) < needed * len(keys):
            twice = f" in {' and '.join(keys)} each, which are on one disk" if len(keys) > 1 else ""
            raise ConfigError(
                f"{keys[-1]}: a checkpoint needs about {format_bytes(needed)}{twice}, but {directory} has {format_bytes(free)} free. "
                f"Free some space, or set {keys[-1]} to a larger disk."
            )


def check_template(request: DataRequest, tokenizer: "PreTrainedTokenizerFast", base_model: str) -> None:
    """Check that there is a template to render conversations."""
    if tokenizer.chat_template or request.prompt_template or request.task == "causal_lm":
        return  # causal_lm rows may be plain text; the first chat row reports a missing template
    if request.data_format == "tokens":
        return
    raise ModelError(
        f"model {base_model}: its tokenizer has no chat template, so conversations cannot be rendered. Write chat_template (Jinja text or "
        "a Jinja file) or prompt_template, use the model's instruct version, train on plain text with task: causal_lm, or set data_format: tokens "
        "for pretokenised rows."
    )


def check_vocabulary(tokens: int, source: str, facts: ModelFacts) -> None:
    """Check that the model has an embedding for each token of an adapter's own tokenizer."""
    rows = vocabulary_rows(facts, tokens)
    if tokens > rows:
        raise ModelError(
            f"adapter {source}: its tokenizer has {tokens:,} tokens, but the embedding of {facts.source} has {rows:,} rows. Write the "
            "model with the resized embedding that the adapter was trained on as model_id. If training used none of the other "
            "tokens, such as a padding token, remove the tokenizer files beside the adapter to use the base model's."
        )


def check_ids_of_rows(
    key: str, summary: DataSummary, tokenizer: "PreTrainedTokenizerFast", facts: ModelFacts
) -> None:
    """Check that the model has an embedding for each token of the rows, and for the token that pads them.

    Args:
        key: Key of the YAML that names the rows.
        summary: The prepared rows.
        tokenizer: The tokenizer, which may have more tokens than the rows use.
        facts: The base model, with rows for tokens that are added.
    """
    if summary.largest_id is None:
        return
    padding = tokenizer.pad_token_id
    assert isinstance(padding, int)
    largest = max(summary.largest_id, padding)
    rows = vocabulary_rows(facts, largest + 1)
    if largest < rows:
        return
    user = f"the rows of {key} have" if largest == summary.largest_id else "the tokenizer pads rows with"
    token = tokenizer.convert_ids_to_tokens(largest)
    named = f" ({token!r})" if token else ""
    tensor = embedding_tensor(facts)
    raise ModelError(
        f"model {facts.source}: {facts.file_of(tensor)}: {tensor} has {rows:,} rows (ids 0 to {rows - 1:,}), but {user} the token id "
        f"{largest:,}{named}. Use the model's own tokenizer, or a copy of the model whose embedding "
        "was resized to it (resize_token_embeddings)."
    )


def check_adapter_tokenizer(config: FinetuneConfig, adapter: AdapterFacts) -> None:
    """Check that the tokenizer beside an adapter is complete, so that its template and tokens are not dropped silently."""
    found = adapter.tokenizer_files
    is_replaced = config.chat_template is not None and found == {CHAT_TEMPLATE_FILE}
    if found and not adapter.has_tokenizer and not is_replaced:
        missing = sorted(COMPLETE_TOKENIZER - found)
        raise ModelError(
            f"adapter {adapter.source}: has {', '.join(sorted(found))}, but {' and '.join(missing)} of its tokenizer is missing. Copy the "
            "tokenizer that it was trained with beside it, or continue from a copy without these files. A template alone goes to chat_template."
        )


def check_token_ids(
    adapter: AdapterFacts, tokenizer: "PreTrainedTokenizerFast", base: "PreTrainedTokenizerFast"
) -> None:
    """Check that the tokenizer beside an adapter gives the base model's tokens their ids, unless the adapter has its own embedding.

    Args:
        adapter: The adapter to continue.
        tokenizer: The tokenizer beside it. It may have more or fewer tokens, or other names for reserved ids.
        base: The base model's tokenizer.
    """
    if any(is_embedding(f"{name}.") for name in adapter.lora.get("modules_to_save") or []):
        return
    ids, base_ids = tokenizer.get_vocab(), base.get_vocab()
    moved = [token for token in base_ids if ids.get(token, base_ids[token]) != base_ids[token]]
    if moved:
        token = min(moved, key=lambda each: base_ids[each])
        raise ModelError(
            f"{join_uri(adapter.source, 'tokenizer.json')}: the token {token!r} has the id {ids[token]:,}, but {base_ids[token]:,} in the "
            f"base model's tokenizer ({len(moved):,} tokens differ), so the adapter's tokenizer is that of another model. Copy the tokenizer "
            "that it was trained with beside it, or remove the tokenizer files to use the base model's."
        )


def check_token_indices(
    config: FinetuneConfig, adapter: AdapterFacts | None, tokens: int, facts: ModelFacts
) -> None:
    """Check that the rows of `trainable_token_indices` exist, in the embedding or in the continued adapter's own tokenizer.

    Args:
        config: The YAML.
        adapter: The adapter to continue.
        tokens: Number of tokens of the tokenizer.
        facts: The base model, without rows of tokens that are added.
    """
    lora = config.lora_config
    where = f"adapter {adapter.source}: adapter_config.json" if adapter else "lora_config"
    indices = (
        adapter.lora.get("trainable_token_indices") if adapter else lora and lora.trainable_token_indices
    )
    needed = rows_needed(indices)
    rows = vocabulary_rows(facts, needed)
    if adapter and adapter.has_tokenizer:
        rows = max(rows, tokens)
    if needed > rows:
        fix = (
            "Copy the tokenizer that it was trained with, which has this token, beside it."
            if adapter
            else "Write ids below that, or add tokens with new_tokens."
        )
        raise ModelError(
            f"{where}: trainable_token_indices has the id {needed - 1}, but {facts.source} has {rows:,} tokens. {fix}"
        )


def check_token_rows(config: FinetuneConfig, zero_stage: int) -> None:
    """Check that an adapter can train the rows of new tokens."""
    if zero_stage == 3:
        raise ConfigError(
            f"new_tokens: {_NEEDS_COMPLETE_EMBEDDING}. Write deepspeed: zero_2, or remove lora_config to train all parameters."
        )
    lora = config.lora_config
    listed_modules = lora.target_modules if lora and isinstance(lora.target_modules, list) else []
    for key, names in (
        ("modules_to_save", (lora.modules_to_save if lora else None) or []),
        ("target_modules", listed_modules),
    ):
        if ends := [name for name in names if is_embedding(f"{name}.") or is_head(f"{name}.")]:
            raise ConfigError(
                f"lora_config.{key}: {ends[0]} cannot be combined with new_tokens, whose rows of this module are trained with the adapter. "
                f"Remove {ends[0]}, or remove lora_config to train all parameters."
            )


def check_tied_head(
    base: MetaModel,
    facts: ModelFacts,
    parameters: AdapterParameters | None,
    rows: int,
    unused: Collection[str],
) -> None:
    """Check that a tied LM head has no other values in the weight files where the run would tie it to the embedding.

    transformers loads such a head untied, but PEFT ties trained rows, and so does `resize_token_embeddings`.

    Args:
        base: The base model.
        facts: The base model's files.
        parameters: The adapter's parameters, if PEFT counted them.
        rows: Rows that the tokens of the run need in the embedding.
        unused: Names of the tensors that the model does not load.
    """
    model: Any = base.model
    is_tied = model.config.get_text_config().tie_word_embeddings
    shares_rows = (
        parameters is not None
        and parameters.head in parameters.saved_modules
        and not any(f".{parameters.head}." in name for name in parameters.trainable)
    )
    if not is_tied or not (shares_rows or rows > len(model.get_input_embeddings().weight)):
        return
    embeddings = embedding_tensor(facts)
    for name in facts.tensors.keys() - set(unused):
        if is_head(name) and embeddings in facts.tensors and not have_equal_bytes(facts, name, embeddings):
            raise ModelError(
                f"model {facts.source}: config.json ties the LM head to the embedding (tie_word_embeddings: true), but "
                f"{facts.file_of(name)} has {name} with other values than {embeddings}. Rows of tokens and ensure_weight_tying would tie "
                "them, so training would start from another model. Write tie_word_embeddings: false in config.json of a copy of the model."
            )


def check_zero_3_adapter(parameters: AdapterParameters, continued: AdapterFacts | None = None) -> None:
    """Check that an adapter can be trained under ZeRO-3, and that PEFT can load a continued one there.

    Args:
        parameters: The adapter's parameters.
        continued: The adapter to continue, with all tensors of its file.
    """
    if any(".trainable_tokens_delta." in name for name in parameters.trainable):
        raise ConfigError(
            f"trainable_token_indices: {_NEEDS_COMPLETE_EMBEDDING}. Write deepspeed: zero_2, or modules_to_save with the embedding instead."
        )
    for name in continued.parameter_shapes if continued else ():
        # Matrices of single experts have other names than PEFT's.
        is_own = ".lora_" in name or name in parameters.stored
        if not is_own or (parameters.trains_biases and is_bias_of_base(name)):
            assert continued is not None
            raise ConfigError(
                f"initial_adapter_model_ckpt_path: {continued.source}/{ADAPTER_FILE} has the base model's tensor {name}, which PEFT cannot "
                "load into weights that ZeRO-3 shards. Write deepspeed: zero_2, or merge the adapter with main.py export and write the merged "
                "model as model_id."
            )


def check_quantization(config: FinetuneConfig, facts: ModelFacts) -> None:
    """Check that a quantized base model can be trained with these settings."""
    if facts.quantization is None:
        return
    if facts.quantization != "bitsandbytes":
        raise ModelError(
            f"model {facts.source}: quantization_config in config.json says that its weights are quantized with {facts.quantization}, "
            "which is not supported. Name a 16-bit copy of the model, or a bitsandbytes copy with 4 bits; if the weights are plain, remove "
            "quantization_config in a copy."
        )
    if not config.load_in_4bit:
        raise ModelError(
            f"model {facts.source}: its weights are quantized to 4 bits. Write load_in_4bit: true (with lora_config), or name the "
            "original model."
        )


def check_targets(lora: LoraConfig, facts: ModelFacts) -> None:
    """Check that target_modules of a new adapter matches the model."""
    if targeted_modules(facts, lora) or (lora.target_modules == [] and lora.target_parameters):
        return
    for key, without in (
        ("layers_to_transform", {"layers_to_transform": None, "layers_pattern": None}),
        ("exclude_modules", {"exclude_modules": None}),
    ):
        if targeted_modules(facts, lora.model_copy(update=without)):
            raise ConfigError(
                f"lora_config.{key}: {getattr(lora, key)} leaves no module of {facts.source} with an adapter. Correct it, or remove it."
            )
    names = sorted({module.split(".")[-1] for module in facts.matrix_shapes if not is_head(f"{module}.")})
    raise ConfigError(
        f"lora_config.target_modules: {lora.target_modules} matches no module of {facts.source}, which has: {', '.join(names)}. "
        "Name some of these, or write all-linear."
    )


def check_exclusions(lora: LoraConfig, targets: Iterable[str], facts: ModelFacts) -> None:
    """Check that exclude_modules excludes what it names: PEFT compares it with modules, not with their parts and not with parameters.

    Args:
        lora: The YAML's lora_config.
        targets: Modules and parameters that have an adapter.
        facts: The base model.
    """
    for target in targets if lora.exclude_modules else ():
        parts = target.split(".")
        around = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        if any(is_named(lora.exclude_modules or [], each) for each in around):
            raise ConfigError(
                f"lora_config.exclude_modules: {lora.exclude_modules} does not exclude {target} of {facts.source}: PEFT excludes layers by "
                "their own names, and no experts or routers. Write these names, or target_modules as a list without it."
            )


def check_new_adapter(config: FinetuneConfig, parameters: AdapterParameters, facts: ModelFacts) -> None:
    """Check that each name in lora_config matches the model, and that the adapter can be trained."""
    assert config.lora_config is not None
    rows = config.lora_config.trainable_token_indices or []
    for name in config.lora_config.modules_to_save or []:
        if name in rows or (isinstance(rows, list) and rows and is_embedding(f"{name}.")):
            raise ConfigError(
                f"lora_config.modules_to_save: {name} is trained in full, so trainable_token_indices cannot train rows of it. Remove one."
            )
    if unmatched := list(unmatched_keys(config.lora_config, parameters)):
        raise ConfigError(
            f"{unmatched[0]} of {facts.source}"
            + "".join(f"\n  {line}" for line in unmatched[1:])
            + "\nCorrect the name, or remove it."
        )
    _check_trainable(config, parameters, "lora_config", facts)


def check_adapter(
    config: FinetuneConfig,
    adapter: AdapterFacts,
    parameters: AdapterParameters,
    wrong: Mismatch | None,
    facts: ModelFacts,
) -> None:
    """Check that a continued adapter's file fits its configuration and the model, and that it can be trained.

    Args:
        config: The YAML.
        adapter: The adapter.
        parameters: What PEFT builds from its configuration.
        wrong: How its file differs from that.
        facts: The base model.
    """
    file = f"{adapter.source}/{ADAPTER_FILE}"
    if wrong:
        more = [f"… and {len(wrong.lines) - 3} more"] if len(wrong.lines) > 3 else []
        raise ModelError(
            f"initial_adapter_model_ckpt_path: {file} (trained on {adapter.base_model or 'an unnamed model'}) does not fit its "
            f"adapter_config.json on the model {facts.source}:\n{listed([*wrong.lines[:3], *more])}\n{wrong.fix}"
        )
    _check_trainable(config, parameters, f"adapter {adapter.source}", facts)
    _check_reference(config, adapter, parameters)


def check_same_adapter(
    adapter: AdapterFacts, lora: LoraConfig, targets: Sequence[str], asked_targets: Sequence[str]
) -> None:
    """Check that the YAML's lora_config matches the continued adapter; see `adapter_differences`."""
    if changed := adapter_differences(adapter, lora, targets, asked_targets):
        raise ConfigError(
            f"initial_adapter_model_ckpt_path: lora_config differs from the adapter {adapter.source}, which keeps its shape:\n"
            f"{listed(changed)}\nRemove lora_config, or write the adapter's values."
        )


def _check_trainable(
    config: FinetuneConfig, parameters: AdapterParameters, where: str, facts: ModelFacts
) -> None:
    """Check that the trainer and the export support what the adapter contains."""
    if parameters.head in parameters.ranks:
        raise ConfigError(
            f"{where}: target_modules or ensure_weight_tying adapts {parameters.head}, the LM head, but the loss reads the head's weight "
            f"directly, so its adapter would not be trained. Write modules_to_save: [{parameters.head}] instead."
        )
    has_lora_bias = any(name.endswith(".bias") and ".lora_B." in name for name in parameters.trainable)
    if has_lora_bias and parameters.without_bias:
        raise ConfigError(
            f"{where}: lora_bias adds a bias to {parameters.without_bias[0]}, but this layer of {facts.source} has no bias, so the adapter "
            "could never be merged. Remove lora_bias."
        )
    preference = config.preference
    if config.task == "preference_tuning" and preference.needs_reference and parameters.trains_biases:
        raise ConfigError(
            f"{where}: bias trains biases of the base model, but {preference.loss} compares the model with its state before training, "
            "which PEFT cannot restore for biases. Write bias: none, or loss: orpo."
        )


def _check_reference(config: FinetuneConfig, adapter: AdapterFacts, parameters: AdapterParameters) -> None:
    """Check that PEFT can hold a frozen copy of a continued adapter beside the trained one, as the reference."""
    if config.task != "preference_tuning" or not config.preference.needs_reference:
        return
    if adapter.lora.get("ensure_weight_tying") and parameters.saved_modules:
        raise ConfigError(
            f"adapter {adapter.source}: ensure_weight_tying ties {' and '.join(parameters.saved_modules)}, and PEFT cannot hold a second, "
            f"frozen copy of tied modules, which {config.preference.loss} needs as its reference. Merge the adapter with main.py export and write "
            "the merged model as model_id, or write loss: orpo."
        )
