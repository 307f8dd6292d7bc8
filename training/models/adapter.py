"""LoRA adapters: what PEFT builds from a configuration, without weights, compared with the tensors of an adapter file."""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from configs.schema import LoraConfig
from training.models.architecture import MetaModel, Shape, is_embedding, is_expert, is_head, is_router
from training.models.files import AdapterFacts, ModelError, ModelFacts
from training.models.new_tokens import grow_vocabulary, rows_needed
from utils.errors import first_line
from utils.processes import importing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_PREFIX = "base_model.model."
_LONGEST_REASON = 300
"""Characters of an error of PEFT in a message; some list all modules."""
# Keys of adapter_config.json that do not change what the loaded adapter computes.
_RECORDED = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "corda_config",
    "lora_ga_config",
    "megatron_core",
    "merge_weights",  # early PEFT merged the weights for evaluation, and separated them again for training
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}
_OF_ONE_EXPERT = re.compile(r"(.+\.experts\.)(\d+)(\..+)")
"""Name of a tensor that belongs to one expert, as older releases wrote it: before, number, after."""
_TASK_TYPES = (None, "CAUSAL_LM", "SEQ_2_SEQ_LM")
"""Task types whose adapters have no head of their own. Some trainers write SEQ_2_SEQ_LM for every model."""
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations that subtract the initial adapter from the base weights, or quantize them."""

_STARTS = ("true", "false", "none", "gaussian", "orthogonal", "eva")
"""Initializations that leave the base weights unchanged. MiCA trains one of the two matrices only."""


@dataclass(frozen=True)
class AdapterParameters:
    """The parameters that an adapter adds to a base model, or trains in it."""

    trainable: Mapping[str, Shape]
    """Name in the PEFT model -> shape of each trainable parameter."""
    stored: Mapping[str, Shape]
    """Name -> shape of each tensor that adapter_model.safetensors must contain."""
    stored_embeddings: Mapping[str, Shape]
    """Name -> shape of the base weights that PEFT also saves if an embedding has an adapter."""
    targets: tuple[str, ...]
    """Modules and parameters of the base model that have an adapter, sorted."""
    ranks: Mapping[str, int]
    """Module of the base model, or the one that holds adapted parameters -> rank of its adapter."""
    target_parameters: tuple[str, ...]
    """Parameters of the base model that have an adapter themselves, such as fused experts."""
    saved_modules: tuple[str, ...]
    """Modules of the base model that are trained in full, or of which some tokens are trained."""
    without_bias: tuple[str, ...]
    """Modules with an adapter that have no bias."""
    head: str | None
    """Module of the LM head."""
    unmatched_patterns: tuple[str, ...] = ()
    """Keys of rank_pattern and alpha_pattern that match no module, which PEFT ignores."""

    @property
    def trains_biases(self) -> bool:
        """Return whether biases of the base model are trained."""
        return any(map(is_bias_of_base, self.trainable))


@dataclass(frozen=True)
class Mismatch:
    """Differences between an adapter's file and what PEFT builds from its configuration."""

    lines: list[str]
    """A line per tensor: one that is missing, one that is too many, one with another shape, and the rest."""
    fix: str


def is_bias_of_base(name: str) -> bool:
    """Return whether a trained parameter is a bias of the base model, neither of LoRA nor of a module that is trained in full."""
    return name.endswith(".bias") and not any(part in name for part in (".lora_", ".modules_to_save."))


def new_adapter(base: MetaModel, lora: LoraConfig) -> AdapterParameters:
    """Return the parameters of a new adapter; raise ModelError if PEFT cannot add it to the model.

    Args:
        base: The base model.
        lora: The YAML's lora_config.
    """
    where = "lora_config"
    settings = lora.model_dump() | {"init_lora_weights": True}
    adapted = _adapted(base, settings, where)
    _check_tying(adapted, base.source)
    parameters = _parameters(adapted)
    if lora.init_lora_weights == "orthogonal" and parameters.target_parameters:
        raise ModelError(
            f"{where}.init_lora_weights: orthogonal is not available for {parameters.target_parameters[0]} of {base.source}, which is a "
            "parameter and not a layer. Write true or gaussian."
        )
    return parameters


def continued_adapter(base: MetaModel, adapter: AdapterFacts) -> tuple[AdapterParameters, Mismatch | None]:
    """Return the parameters that PEFT builds from an adapter's own configuration, and how its file differs from them.

    Args:
        base: The base model.
        adapter: The adapter's configuration and the shapes in its file.
    """
    where = f"adapter {adapter.source}: adapter_config.json"
    _check_settings(adapter, where)
    known = {name: value for name, value in adapter.lora.items() if name in LoraConfig.model_fields}
    settings = known | {"init_lora_weights": True, "task_type": "CAUSAL_LM"}
    adapted = _adapted(base, settings, where)
    parameters = _parameters(adapted)
    built = adapted.peft_config["default"]
    unmatched = [
        f"{key}: {pattern}"
        for key in ("rank_pattern", "alpha_pattern")
        for pattern in _unmatched_patterns(getattr(built, key), parameters)
    ]
    _check_fused_patterns(unmatched, adapter, where)
    parameters = replace(parameters, unmatched_patterns=tuple(unmatched))
    wrong = _mismatch(parameters, _as_loaded(adapted, adapter), adapter)
    if wrong and (lacking := _lacking_experts(adapter.parameter_shapes, parameters)):
        wrong = Mismatch([f"{name} is missing from the file" for name in lacking], _fix([], []))
    return parameters, wrong


def without_base_weights(
    adapter: AdapterFacts, file: Path, base: ModelFacts, model: "PreTrainedModel"
) -> AdapterFacts:
    """Return an adapter without the embeddings in its file that equal the base model's, as save_embedding_layers writes them.

    Args:
        adapter: The adapter.
        file: Local copy of its adapter_model.safetensors.
        base: The base model. Embeddings are compared only if its weights are in a local directory.
        model: The base model without weights.
    """
    import torch
    from safetensors import safe_open

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = head is None or head.weight is embedding.weight
    # Files of a base model may name its ends otherwise than the model does, and have a tied one only once.
    ends = [name for name in base.tensors if is_embedding(name) or is_head(name)]
    equal = set()
    for name, shape in adapter.parameter_shapes.items():
        if not (is_embedding(name) or is_head(name)):
            continue
        for end in ends:
            stored = base.tensors[end]
            weights = Path(base.source) / stored.file
            is_same_end = is_tied or is_head(end) == is_head(name)
            if not (is_same_end and stored.shape == shape and weights.exists()):
                continue
            with safe_open(file, "pt") as ours, safe_open(weights, "pt") as theirs:
                saved, original = ours.get_tensor(name), theirs.get_tensor(end)
            if torch.equal(saved.float(), original.float()):
                equal.add(name)
    # The trained modules of modules_to_save have the same names, and may still equal the base model.
    saved_modules = adapter.lora.get("modules_to_save") or []
    shapes = {
        name: shape
        for name, shape in adapter.parameter_shapes.items()
        if name not in equal or any(f".{module}." in name for module in saved_modules)
    }
    return replace(adapter, parameter_shapes=shapes)


def check_finite(file: Path, where: str) -> None:
    """Check that all weights in an adapter's file are floating-point numbers of 16 bits or more, and finite.

    Args:
        file: Local copy of adapter_model.safetensors.
        where: Name of the file in messages.
    """
    import torch
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            tensor = tensors.get_tensor(name)
            if not tensor.is_floating_point() or tensor.element_size() < 2:
                dtype = str(tensor.dtype).removeprefix("torch.")
                raise ModelError(
                    f"{where}: the tensor {name} is stored as {dtype}, but weights must be bf16, fp16 or fp32. Save it in one of these."
                )
            if not torch.isfinite(tensor).all():
                raise ModelError(
                    f"{where}: the tensor {name} contains NaN or infinite values. Use an earlier checkpoint of the run that trained it."
                )


def describe_mixture(parameters: AdapterParameters, names: Iterable[str]) -> str | None:
    """Return which parts of a mixture of experts an adapter changes; None for a dense model.

    Args:
        parameters: The adapter's parameters.
        names: Names of the model's parameters.
    """
    if not any(map(is_expert, names)):
        return None
    changed = [f".{name}." for name in (*parameters.targets, *parameters.saved_modules)]
    experts, router = any(map(is_expert, changed)), any(map(is_router, changed))
    if experts and router:
        return "changes the experts and the router"
    if experts or router:
        part, other = ("experts", "router") if experts else ("router", "experts")
        return f"changes the {part}, but not the {other}"
    return "changes neither the experts nor the router"


def base_of(model: Any) -> Any:
    """Return the base model under an adapter, or the model itself if it has no adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def unmatched_keys(lora: LoraConfig, parameters: AdapterParameters) -> Iterator[str]:
    """Yield an error for each name in a new adapter's settings that matches nothing, and would therefore train nothing."""
    adapted = parameters.targets
    for name in lora.modules_to_save or []:
        if not any(_ends_with(module, name) for module in parameters.saved_modules):
            yield f"lora_config.modules_to_save: {name} matches no module"
    for name in lora.target_parameters or []:
        if not any(_ends_with(parameter, name) for parameter in parameters.target_parameters):
            yield f"lora_config.target_parameters: {name} matches no parameter"
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(lora, key)
        for pattern in _unmatched_patterns(patterns, parameters):
            yield f"lora_config.{key}: {pattern} matches no module that has an adapter"
        for pattern in _hidden_patterns(patterns, parameters):
            yield f"lora_config.{key}: {pattern} follows a key that matches the same modules"
    if lora.bias != "none" and not parameters.trains_biases:
        yield f"lora_config.bias: {lora.bias} matches no bias"
    layers = lora.layers_to_transform
    for layer in layers if isinstance(layers, list) else [] if layers is None else [layers]:
        if not any(f".{layer}." in module for module in adapted):
            yield f"lora_config.layers_to_transform: {layer} matches no layer"
    if isinstance(lora.trainable_token_indices, dict):
        for name in lora.trainable_token_indices:
            is_end = is_embedding(f"{name}.") or is_head(f"{name}.")
            if not is_end or not any(_ends_with(module, name) for module in parameters.saved_modules):
                yield f"lora_config.trainable_token_indices: {name} matches no embedding or LM head"


def _unmatched_patterns(patterns: Iterable[str], parameters: AdapterParameters) -> list[str]:
    return [each for each in patterns if not any(_matches_pattern(each, name) for name in parameters.targets)]


def _hidden_patterns(patterns: Iterable[str], parameters: AdapterParameters) -> list[str]:
    """Return the patterns that PEFT never uses, because each module that they match also matches an earlier one."""
    matching = [[each for each in patterns if _matches_pattern(each, name)] for name in parameters.targets]
    used, matched = {found[0] for found in matching if found}, {each for found in matching for each in found}
    return [each for each in patterns if each in matched - used]


def _check_fused_patterns(unmatched: Iterable[str], adapter: AdapterFacts, where: str) -> None:
    """Reject patterns for single experts of an older release, which PEFT drops where it fuses the experts."""
    modules = {name.removeprefix(_PREFIX).partition(".lora_")[0] for name in adapter.parameter_shapes}
    for entry in unmatched:
        key, _, pattern = entry.partition(": ")
        if any(_matches_pattern(pattern, module) for module in modules):
            raise ModelError(
                f"{where}: {key}: {pattern} matches experts that transformers now fuses, and PEFT drops it. Merge the adapter with the release "
                "that trained it, and write the merged model as model_id."
            )


def _matches_pattern(pattern: str, name: str) -> bool:
    """Return whether a key of rank_pattern or alpha_pattern matches a module, as PEFT does."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _check_settings(adapter: AdapterFacts, where: str) -> None:
    """Reject settings of an adapter that this project does not train, so that none is dropped silently."""
    lora = adapter.lora
    if lora.get("task_type") not in _TASK_TYPES:
        raise ModelError(
            f"{where}: task_type {lora['task_type']} adds another head than that of a causal language model. Use an adapter that was "
            "trained with task_type CAUSAL_LM."
        )
    unknown = [
        name
        for name, value in lora.items()
        if value and name not in _RECORDED and name not in LoraConfig.model_fields
    ]
    if unknown:
        raise ModelError(
            f"{where}: {', '.join(sorted(unknown))} cannot be trained further, because it changes what the adapter computes. Use an "
            "adapter without it."
        )
    start = str(lora.get("init_lora_weights", True)).lower()
    if not start.startswith((*_REWRITES_BASE, *_STARTS)):
        raise ModelError(
            f"{where}: init_lora_weights: {start} is not an initialization whose adapters can be trained further. Write true if the "
            "published base model with this adapter is what was trained."
        )
    if start.startswith(_REWRITES_BASE):
        raise ModelError(
            f"{where}: init_lora_weights: {start} rewrites the base weights, so the adapter belongs to those weights and not to the "
            "published base model. Convert it with PEFT: save_pretrained(DIRECTORY, path_initial_model_for_weight_conversion=...), "
            "or merge it and write the merged model as model_id."
        )


def _adapted(base: MetaModel, settings: dict[str, Any], where: str) -> Any:
    """Return a copy of the model with its adapter. Initialization does not affect shapes."""
    with importing():
        import peft
        import torch

    model: Any = deepcopy(base.model)  # PEFT changes it
    grow_vocabulary(model, rows_needed(settings.get("trainable_token_indices")))
    try:
        with torch.device("meta"), warnings.catch_warnings():
            # PEFT warns of pattern keys that match parameters, and of names that `unmatched_keys` reports.
            warnings.simplefilter("ignore")
            adapted = peft.get_peft_model(model, peft.LoraConfig(**deepcopy(settings)))
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, NotImplementedError) as error:
        reason = shorten(first_line(error), _LONGEST_REASON, placeholder=" …")
        raise ModelError(
            f"{where}: PEFT cannot add this adapter to {base.source}: {reason.rstrip('.')}. {_fix_of(str(error), where)}"
        ) from error
    _check_modules(adapted, base.source, where)
    for key in ("rank_pattern", "alpha_pattern"):
        _check_order(adapted, key, settings.get(key) or {}, base.source, where)
    return adapted


def _fix_of(error: str, where: str) -> str:
    if "lora_dropout" in error:
        return "Write lora_dropout: 0."
    if where == "lora_config":
        return "Correct lora_config."
    return "Write the model that it was trained on as model_id, or restore the file as PEFT's save_pretrained wrote it."


def _check_modules(adapted: Any, source: str, where: str) -> None:
    """Reject modules that PEFT adds, but that fail in training or compute something else."""
    from peft.tuners.lora import Embedding
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
    from torch import nn

    for name, module in adapted.named_modules():
        base_name = name.removeprefix(_PREFIX).replace(".token_adapter.base_layer", "")
        if isinstance(module, Embedding):
            base = module.get_base_layer()
            # An embedding that computes something else than a look-up, such as OPT's positions. PEFT multiplies by embed_scale itself.
            if type(base).forward is not nn.Embedding.forward and not hasattr(base, "embed_scale"):
                raise ModelError(
                    f"{where}: target_modules: PEFT cannot train {base_name} of {source}, a {type(base).__name__}. Remove it."
                )
        elif isinstance(module, ModulesToSaveWrapper) and ".token_adapter." in name:
            raise ModelError(
                f"{where}: modules_to_save trains {base_name} in full, but trainable_token_indices trains rows of the embedding, to which "
                f"{source} ties it. Remove one of the two."
            )
        elif isinstance(module, TrainableTokensWrapper) and (
            getattr(module.token_adapter.get_base_layer(), "bias", None) is not None
        ):
            raise ModelError(
                f"{where}: trainable_token_indices: {base_name} of {source} has a bias, which PEFT drops where it trains the rows of "
                f"tokens. Write modules_to_save: [{base_name}] instead, or remove it."
            )


def _check_tying(adapted: Any, source: str) -> None:
    """Reject ensure_weight_tying where PEFT changes the embedding or the LM head, but does not tie them."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    model = adapted.get_base_model()
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    changed = [isinstance(end, LoraLayer | AuxiliaryTrainingWrapper) for end in ends]
    is_tied = model.config.get_text_config().tie_word_embeddings
    if adapted.peft_config["default"].ensure_weight_tying and is_tied and changed[0] != changed[1]:
        raise ModelError(
            f"lora_config.ensure_weight_tying: PEFT would train an embedding of {source} without its tied LM head, because it knows tied "
            "embeddings by the names embed_tokens and lm_head. Write modules_to_save: [lm_head], or remove ensure_weight_tying."
        )


def _check_order(adapted: Any, key: str, given: Mapping[str, float], source: str, where: str) -> None:
    """Reject patterns whose values depend on their order: PEFT takes the first that matches, and sorts them when it saves.

    Args:
        adapted: The model with its adapter.
        key: rank_pattern or alpha_pattern.
        given: The patterns of the configuration. For fused experts, PEFT adds a pattern, or replaces one.
        source: Name of the base model in messages.
        where: Name of the configuration in messages.
    """
    used = getattr(adapted.peft_config["default"], key)
    for name in _targets(adapted):
        matching = [pattern for pattern in used if _matches_pattern(pattern, name)]
        ours = [pattern for pattern in matching if pattern in given]
        if not ours:
            continue
        first, saved_first = matching[0], min(matching)
        if used[ours[0]] != given[ours[0]] or (
            used[first] != used[saved_first] and len(ours) < len(matching)
        ):
            raise ModelError(
                f"{where}: {key}: {ours[0]} matches {name} of {source}, but PEFT sets a value of its own for experts of target_modules. Write "
                "target_modules as a list without the experts, and target_parameters with them."
            )
        if used[first] != used[saved_first]:
            raise ModelError(
                f"{where}: {key}: {first} and {saved_first} both match {name} of {source}. PEFT trains with the first key, but sorts the keys "
                "when it saves, so the saved adapter would be another one. Write keys that match different modules."
            )


def _targets(adapted: Any) -> list[str]:
    """Return the modules and parameters that have an adapter, with their names in the base model."""
    return [*adapted.base_model.targeted_module_names, *adapted.base_model.targeted_parameter_names]


def _parameters(adapted: Any) -> AdapterParameters:
    import peft
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    def shapes(tensors: Mapping[str, "torch.Tensor"]) -> dict[str, Shape]:
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # PEFT takes biases for shards, and announces that it saves embeddings
        stored = shapes(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
        everything = shapes(peft.get_peft_model_state_dict(adapted))
    ranks, without_bias, saved = {}, [], []
    head, output = None, adapted.get_base_model().get_output_embeddings()
    for name, module in adapted.named_modules():
        base_name = name.removeprefix(_PREFIX).replace(".base_layer", "")
        if isinstance(module, LoraLayer):
            if "default" in module.r and not isinstance(module, AuxiliaryTrainingWrapper):
                ranks[base_name] = max(module.r["default"], ranks.get(base_name, 0))
            if getattr(module.get_base_layer(), "bias", None) is None:
                without_bias.append(base_name)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            saved.append(base_name)
        if module is output:
            head = base_name
    return AdapterParameters(
        trainable={
            name: tuple(entry.shape) for name, entry in adapted.named_parameters() if entry.requires_grad
        },
        stored=stored,
        stored_embeddings={name: shape for name, shape in everything.items() if name not in stored},
        targets=tuple(sorted(_targets(adapted))),
        ranks=ranks,
        target_parameters=tuple(adapted.base_model.targeted_parameter_names),
        saved_modules=tuple(saved),
        without_bias=tuple(without_bias),
        head=head,
    )


def _as_loaded(adapted: Any, adapter: AdapterFacts) -> dict[str, Shape]:
    """Return the file's tensors as PEFT loads them: it converts the experts of older releases into fused parameters."""
    import torch
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    tensors = {name: torch.empty(shape, device="meta") for name, shape in adapter.parameter_shapes.items()}
    try:
        loaded = convert_peft_adapter_state_dict_for_transformers(
            adapted, adapted.peft_config["default"], tensors
        )
    except (ValueError, RuntimeError, KeyError, IndexError):  # experts are missing, or have different shapes
        return dict(adapter.parameter_shapes)
    return {name: tuple(tensor.shape) for name, tensor in loaded.items()}


def _lacking_experts(found: Mapping[str, Shape], parameters: AdapterParameters) -> list[str]:
    """Return the tensors that a file has for some experts of a layer only, if PEFT fuses experts when it loads them.

    Args:
        found: Name -> shape of each tensor of the file.
        parameters: What PEFT builds from its configuration.
    """
    if any(map(_OF_ONE_EXPERT.fullmatch, parameters.stored)):
        return []
    tensors = [match.groups() for match in map(_OF_ONE_EXPERT.fullmatch, found) if match]
    layers, experts, parts = ({groups[index] for groups in tensors} for index in range(3))
    names = map("".join, product(sorted(layers), sorted(experts, key=int), sorted(parts)))
    return [name for name in names if name not in found]


def _mismatch(
    parameters: AdapterParameters, found: Mapping[str, Shape], adapter: AdapterFacts
) -> Mismatch | None:
    expected = {**parameters.stored_embeddings, **parameters.stored}
    missing = sorted(parameters.stored.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    kinds = [
        [f"{name} is missing from the file" for name in missing],
        [f"{name} is in the file, but not in its configuration" for name in extra],
        [
            f"{name} is {_shown(found[name])} in the file, but must be {_shown(expected[name])}"
            for name in sorted(found.keys() & expected.keys())
            if found[name] != expected[name]
        ],
    ]
    lines = [kind[0] for kind in kinds if kind] + [line for kind in kinds for line in kind[1:]]
    if extra and not missing and all(map(is_head, extra)) and adapter.lora.get("ensure_weight_tying"):
        # PEFT removes a tied head from the list, and does not tie the embeddings of GPT-2 and BLOOM again.
        return Mismatch(
            lines,
            "Add lm_head to modules_to_save in adapter_config.json, so that PEFT ties it to the embedding.",
        )
    return Mismatch(lines, _fix(missing, extra)) if lines else None


def _fix(missing: Sequence[str], extra: Sequence[str]) -> str:
    """Return how to make an adapter's file fit; a common cause is a file that was not written by save_pretrained."""
    for name in extra:
        plain = name.replace(".default.", ".")  # the adapter's name in the PEFT model
        meant = next((each for each in missing if _ends_with(each, plain) or _ends_with(plain, each)), None)
        if meant:
            return f"Its tensors have other names than PEFT's save_pretrained writes. Rename each as this one: {name} to {meant}."
    if extra and not missing and all(is_embedding(name) or is_head(name) for name in extra):
        return (
            "Remove these tensors from the file if they equal the base model's (PEFT writes them with save_embedding_layers), or write the "
            "model that it was trained on as model_id."
        )
    return "Write the model that it was trained on as model_id, or restore both files as PEFT's save_pretrained wrote them."


def _shown(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"
