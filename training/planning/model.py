"""Decisions of a plan before rows are read: where the run computes and writes, its base model and its adapter."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.schema import FinetuneConfig, LoraConfig
from training.checkpoints.weights import fetch_model
from training.data.prepared import PREPARED
from training.data.shards import ShardMap
from training.models.adapter import (
    AdapterParameters,
    check_finite,
    continued_adapter,
    new_adapter,
    without_base_weights,
)
from training.models.architecture import (
    MetaModel,
    ModelShape,
    build_on_meta_device,
    check_custom_code,
    check_is_causal,
    check_packing,
    check_tensors,
    is_embedding,
    is_expert,
    is_head,
    model_shape,
)
from training.models.attention import (
    Attention,
    AttentionTraits,
    check_sequence_parallel,
    choose_attention,
    read_traits,
)
from training.models.files import (
    ADAPTER_FILE,
    AdapterFacts,
    ModelFacts,
    base_model_facts,
    check_dtypes,
    check_finite_weights,
    count_lora_parameters,
    is_model_file,
    is_targeted,
    is_tokenizer_file,
    read_adapter_facts,
    targeted_modules,
)
from training.models.generation import Corrections, check_generation, check_savable
from training.models.kernels import Device
from training.models.new_tokens import (
    NewTokens,
    add_tokens,
    rows_needed,
    trained_ends,
    vocabulary_rows,
    with_grown_vocabulary,
    with_token_rows,
)
from training.models.tokenizer import load_tokenizer, read_chat_template
from training.planning.checks import (
    check_adapter,
    check_adapter_tokenizer,
    check_disk,
    check_exclusions,
    check_new_adapter,
    check_quantization,
    check_same_adapter,
    check_targets,
    check_tied_head,
    check_token_ids,
    check_token_indices,
    check_token_rows,
    check_vocabulary,
    check_zero_3_adapter,
)
from training.planning.deepspeed import Execution, check_optimizer, check_resharding
from training.planning.devices import runs_here
from training.planning.endpoints import ClusterTarget
from training.planning.exportable import check_export, check_vllm_adapter, check_vllm_base
from training.planning.paths import about_key
from training.planning.resume import starting_weights
from utils.storage.bucket import join_uri

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Settings:
    """Decisions that the YAML and this machine determine, before anything is read."""

    target: ClusterTarget
    device: Device
    execution: Execution


@dataclass(frozen=True)
class Storage:
    """The locations to which the run writes."""

    uri: str
    """The directory or prefix that holds the runs."""
    scratch: Path
    """Absolute directory for the node cache and unfinished files."""
    on_cluster: ShardMap | None = None
    """Runs work on many rows on the cluster's nodes; None: this machine does it."""

    @property
    def prepared(self) -> str:
        """URI of the prepared rows."""
        return join_uri(self.uri, PREPARED)

    @property
    def cache(self) -> Path:
        """The node cache."""
        return self.scratch / "cache"


@dataclass(frozen=True)
class Start:
    """The weights that a run starts from."""

    base: str
    """Hub id, absolute directory or URI of the base model."""
    adapter: str | None
    """Directory or URI of the adapter to continue."""
    parent: str | None
    """URI of the weights that the run continues; None for a plain model."""
    adapter_facts: AdapterFacts | None


@dataclass(frozen=True)
class Model:
    """The base model, and the adapter that the run continues."""

    base: str
    """Hub id, absolute directory or URI."""
    adapter: str | None
    """Directory or URI of the adapter to continue."""
    parent: str | None
    """URI of the weights that the run continues; None for a plain model."""
    facts: ModelFacts
    adapter_facts: AdapterFacts | None
    meta: MetaModel
    """The base model without weights, which is built once."""
    shape: ModelShape | None
    """Dimensions; None for unsupported architectures."""
    traits: AttentionTraits
    attention: Attention
    corrections: Corrections
    """Generation settings that are not saved, because they have no effect or no valid value."""
    unused_tensors: list[str]
    """Tensors of the weight files that the model does not load."""
    directory: Path
    """Local directory with the base model's configs."""
    tokenizer_source: str
    """Hub id, directory or URI whose tokenizer is used: the adapter's if it has one, else the base model's."""
    tokenizer_directory: Path
    tokenizer: "PreTrainedTokenizerFast"
    """It includes the new tokens of the YAML."""
    new_tokens: NewTokens | None
    chat_template: str | None


@dataclass(frozen=True)
class Adapter:
    """The trainable parameters."""

    parameters: AdapterParameters | None
    """The adapter's parameters, if PEFT counted them."""
    trainable_parameters: int


def read_start(config: FinetuneConfig, storage: Storage) -> Start:
    """Find the weights to start from, and read the configuration of the adapter to continue."""
    base, adapter, parent = starting_weights(config, storage.uri)
    return Start(base, adapter, parent, read_adapter_facts(adapter) if adapter else None)


def read_model(config: FinetuneConfig, settings: Settings, storage: Storage, start: Start) -> Model:
    """Read the facts of the base model, and load the tokenizer; reject models that cannot be trained."""
    base, adapter_facts = start.base, start.adapter_facts
    facts = base_model_facts(base)
    check_quantization(config, facts)
    if runs_here(config, settings.device, settings.target):
        check_disk(base, facts, storage.scratch)
    # A continued adapter is trained on the commit of its base model, not on a later one.
    trained_on = adapter_facts.base_revision if adapter_facts and adapter_facts.base_model == base else None
    directory = fetch_model(base, storage.cache, is_tokenizer_file, trained_on)
    trust = config.trust_remote_code
    check_custom_code(directory, base, trust_remote_code=trust)
    check_is_causal(directory, base, trust_remote_code=trust)
    shape = model_shape(directory, base, trust_remote_code=trust)
    traits = read_traits(directory, base, trust_remote_code=trust)
    attention = choose_attention(config, traits, settings.device, settings.execution.kernels.provider)
    check_sequence_parallel(config, traits, shape, base)
    if config.packing:
        check_packing(directory, base, trust_remote_code=trust)
    meta = build_on_meta_device(directory, base, trust_remote_code=trust)
    unused = check_tensors(meta, facts)
    check_dtypes(facts, meta.shapes, unused)
    check_finite_weights(facts, unused)
    is_mixture = any(map(is_expert, meta.shapes))
    renames = _matches_no_module(config, facts) if is_mixture else config.trains_adapter
    if adapter_facts or facts.quantization or unused or renames:
        # The architecture names every module; weight files may be packed, use older names or have tensors that are not loaded.
        facts = replace(facts, parameter_shapes=meta.shapes)
    check_generation(directory, base, vocabulary_rows(facts, default=sys.maxsize))
    corrections = check_savable(directory, base, trust_remote_code=trust)
    with about_key("export"):
        check_export(config, facts)
    template = read_chat_template(config)
    source, tokenizer_directory, tokenizer = _load_tokenizer(
        config, base, directory, adapter_facts, storage.cache, template
    )
    check_token_indices(config, adapter_facts, len(tokenizer), facts)
    if source != base:
        assert adapter_facts is not None
        rows = rows_needed(adapter_facts.lora.get("trainable_token_indices"))
        facts = with_grown_vocabulary(facts, rows)
        check_vocabulary(len(tokenizer), source, facts)
    new = add_tokens(config, tokenizer, source)
    if new is not None:
        facts = with_grown_vocabulary(facts, new.rows)
        shape = shape and replace(shape, vocabulary=max(shape.vocabulary, new.rows))
        if config.trains_adapter:
            check_token_rows(config, settings.execution.zero_stage)
            new = trained_ends(new, meta)
    return Model(
        base=base,
        adapter=start.adapter,
        parent=start.parent,
        facts=facts,
        adapter_facts=adapter_facts,
        meta=meta,
        shape=shape,
        traits=traits,
        attention=attention,
        corrections=corrections,
        unused_tensors=unused,
        directory=directory,
        tokenizer_source=source,
        tokenizer_directory=tokenizer_directory,
        tokenizer=tokenizer,
        new_tokens=new,
        chat_template=template,
    )


def _load_tokenizer(
    config: FinetuneConfig,
    base: str,
    directory: Path,
    adapter: AdapterFacts | None,
    cache: Path,
    template: str | None,
) -> tuple[str, Path, "PreTrainedTokenizerFast"]:
    """Return (where the tokenizer comes from, its local directory, the tokenizer): the adapter's own if it has one, else the base's."""
    trust = config.trust_remote_code
    if adapter:
        check_adapter_tokenizer(config, adapter)
    if adapter is None or not adapter.has_tokenizer:
        return (
            base,
            directory,
            load_tokenizer(directory, trust_remote_code=trust, source=base, chat_template=template),
        )
    own = fetch_model(adapter.source, cache, is_tokenizer_file)
    tokenizer = load_tokenizer(
        own, trust_remote_code=trust, source=adapter.source, chat_template=template, owner="adapter"
    )
    if not _have_same_tokenizer(directory, own):
        check_token_ids(
            adapter,
            tokenizer,
            load_tokenizer(directory, trust_remote_code=trust, source=base, chat_template=None),
        )
    return adapter.source, own, tokenizer


def _have_same_tokenizer(*directories: Path) -> bool:
    files = [directory / "tokenizer.json" for directory in directories]
    return all(file.exists() for file in files) and len({file.read_bytes() for file in files}) == 1


def _matches_no_module(config: FinetuneConfig, facts: ModelFacts) -> bool:
    return config.lora_config is not None and not targeted_modules(facts, config.lora_config)


def count_trainable(config: FinetuneConfig, settings: Settings, storage: Storage, model: Model) -> Adapter:
    """Count trainable parameters; reject adapters that do not fit, and optimizers that cannot index so many entries."""
    parameters = None
    if config.lora_config:
        lora = with_token_rows(config.lora_config, model.new_tokens)
        config = config.model_copy(update={"lora_config": lora})
    if model.adapter_facts:
        parameters = _continued_adapter(config, storage, model, model.adapter_facts)
    elif config.lora_config:
        check_targets(config.lora_config, model.facts)
        targets: Sequence[str] = targeted_modules(model.facts, config.lora_config)
        if _only_peft_can_count(config.lora_config, model):
            parameters = new_adapter(model.meta, config.lora_config)
            check_new_adapter(config, parameters, model.facts)
            targets = parameters.targets
        check_exclusions(config.lora_config, targets, model.facts)
    continued = model.adapter_facts.lora if model.adapter_facts else {}
    rows = rows_needed(continued.get("trainable_token_indices"))
    if model.new_tokens:
        rows = model.new_tokens.rows
    check_tied_head(model.meta, model.facts, parameters, rows, model.unused_tensors)
    if parameters and settings.execution.zero_stage == 3:
        check_zero_3_adapter(parameters, model.adapter_facts)
    if config.final_export and not config.final_export.merge:
        check_vllm_base(model.facts)
        check_vllm_adapter(*_stored_adapter(config, model, parameters))
    if parameters:
        trained = sum(map(math.prod, parameters.trainable.values()))
    elif config.lora_config:
        trained = count_lora_parameters(model.facts, config.lora_config)
    else:
        trained = model.facts.parameters
    if settings.device == "cuda":
        check_optimizer(config, settings.execution.zero_stage, trained)
    if config.fewest_devices < config.most_devices:
        check_resharding(config, settings.execution)
    return Adapter(parameters, trained)


def _continued_adapter(
    config: FinetuneConfig, storage: Storage, model: Model, facts: AdapterFacts
) -> AdapterParameters:
    """Compare the continued adapter with what PEFT builds from its configuration, and read its weights."""
    file = fetch_model(facts.source, storage.cache, is_model_file) / ADAPTER_FILE
    facts = without_base_weights(facts, file, model.facts, model.meta.model)
    parameters, wrong = continued_adapter(model.meta, facts)
    check_adapter(config, facts, parameters, wrong, model.facts)
    if config.lora_config:
        given = "target_modules" in config.lora_config.model_fields_set
        asked = new_adapter(model.meta, config.lora_config).targets if given else parameters.targets
        check_same_adapter(facts, config.lora_config, parameters.targets, asked)
    check_finite(file, f"adapter {facts.source}/{ADAPTER_FILE}")
    return parameters


def _stored_adapter(
    config: FinetuneConfig, model: Model, parameters: AdapterParameters | None
) -> tuple[Mapping[str, Any], Iterable[str]]:
    """Return the configuration and the names of the tensors that the run's checkpoints will contain."""
    lora: Mapping[str, Any] = {}
    if model.adapter_facts:
        lora = (
            model.adapter_facts.lora
        )  # a continued adapter keeps its settings, and lora_config has defaults
    elif config.lora_config:
        lora = config.lora_config.model_dump()
    if parameters is None:
        return lora, ()
    return {**lora, "target_parameters": parameters.target_parameters}, parameters.stored


def _only_peft_can_count(lora: LoraConfig, model: Model) -> bool:
    """Return whether an adapter has more than matrices and DoRA magnitudes of linear layers; importing PEFT takes seconds."""
    plain = LoraConfig(
        target_modules=lora.target_modules,
        exclude_modules=lora.exclude_modules,
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        init_lora_weights=lora.init_lora_weights,
    )
    has_other_layers = model.shape is None or model.shape.experts > 0 or lora.target_modules is None
    if lora != plain or has_other_layers or lora.target_modules == "all-linear":
        return lora != plain or has_other_layers
    targets = {name for name, _ in model.meta.model.named_modules() if is_targeted(lora, name)}
    has_ends = any(is_embedding(f"{name}.") or is_head(f"{name}.") for name in targets)
    # Modules without a matrix of their own: a tied LM head, and what PEFT rejects.
    return has_ends or targets != set(targeted_modules(model.facts, lora))
