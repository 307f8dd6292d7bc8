"""The service YAML: where state is stored, which base models are offered, and the limits of keys and projects."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from configs.loading import ConfigError, LoadedConfig, load_config
from configs.schema import DeepspeedFile, PositiveInt, Resources, Section, StorageUri, Text, uri_keys
from configs.sequence_parallel import error_with
from configs.yaml_source import Document, Origin, dotted, parse_yaml, shown
from training.models.files import is_hub_id
from training.models.tokenizer import read_chat_template
from training.planning.paths import absolute
from utils.storage.bucket import EMBEDDED_BUCKET

Auto = Literal["auto"]
_UNSUPPORTED_BY_VLLM = ("load_in_4bit", "trust_remote_code")
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$", max_length=100)]


def _in_s3(uri: str) -> str:
    if not uri.startswith("s3://"):
        raise ValueError("records need conditional writes: use s3://bucket/prefix")
    return uri


class Hyperparameters(Section):
    """Defaults for `auto`, with the names of OpenAI's API."""

    n_epochs: Annotated[int, Field(ge=1, le=50)] | Auto = "auto"
    """Passes over the training file; auto: num_epochs of the base model's YAML rounded up, else 3."""

    batch_size: Annotated[int, Field(ge=1, le=4096)] | Auto = "auto"
    """Rows per optimizer step; auto: as in the base model's YAML."""

    learning_rate_multiplier: Annotated[float, Field(gt=0, le=1000)] | Auto = "auto"
    """Factor on the learning rate of the base model's YAML; auto: 1."""


class DpoHyperparameters(Hyperparameters):
    """Defaults for `auto` in DPO jobs."""

    beta: Annotated[float, Field(gt=0, le=10)] | Auto = "auto"
    """Strength of the pull towards the reference model; auto: 0.1."""


class MethodDefaults(Section):
    """Default hyperparameters of each method."""

    supervised: Hyperparameters = Hyperparameters()
    """Defaults of supervised jobs."""

    dpo: DpoHyperparameters = DpoHyperparameters()
    """Defaults of DPO jobs."""


class BaseModelSettings(Section):
    """A base model that the service fine-tunes and answers with."""

    config: Text
    """Path of a training YAML, relative to the service YAML; absolute once loaded. Jobs train with its keys; files, length, batch size and
    learning rate come from the job."""

    hyperparameters: MethodDefaults = MethodDefaults()
    """Default hyperparameters of each method."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """Engine of /v1/chat/completions."""

    max_adapters: PositiveInt = 4
    """Adapters that one replica of the engine holds in memory; the least recently used one leaves first."""

    num_replicas: PositiveInt = 1
    """Replicas of the engine."""

    resources: Resources = {}
    """Ray resources per replica of the engine, such as `{GPU: 1}`; one CPU unless it sets CPU."""

    @property
    def engine_resources(self) -> dict[str, float]:
        """Return the Ray resources of all replicas of the engine."""
        return {name: amount * self.num_replicas for name, amount in ({"CPU": 1} | self.resources).items()}


class Limits(Section):
    """Limits. A request above one is answered with 429."""

    requests_per_minute: PositiveInt = 600
    """Requests per minute of each key, counted in each replica: with `num_replicas: 2`, a key may send up to twice as many."""

    jobs: PositiveInt = 20
    """Unfinished jobs of each project."""

    stored_bytes: PositiveInt = 100 * 1000**3
    """Bytes of all files of each project."""

    file_bytes: PositiveInt = 1000**3
    """Size of one file. A larger one is answered with 413."""


class ServiceConfig(Section):
    """One fine-tuning service."""

    storage_path: Annotated[StorageUri, AfterValidator(_in_s3)] = f"s3://{EMBEDDED_BUCKET}/service"
    """Bucket prefix of all records, files and runs; the default is in the embedded bucket."""

    models: Annotated[dict[ModelName, BaseModelSettings], Field(min_length=1)]
    """Name of the base model -> its settings. Requests name models by this name."""

    publish_path: Annotated[StorageUri, AfterValidator(_in_s3)] | None = None
    """Bucket prefix to which the adapter of each job is exported, in the folder `BASE/JOB`. So `publish_path/BASE` is what Ray
    Serve LLM expects as the `dynamic_lora_loading_path` of this base model; null: do not export."""

    host: Text = "127.0.0.1"
    """Address to listen on."""

    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port to listen on."""

    num_replicas: PositiveInt = 1
    """Replicas that answer requests; they share nothing but the bucket."""

    limits: Limits = Limits()
    """Limits of keys and projects."""


@dataclass(frozen=True)
class LoadedService:
    """A validated service YAML with the training YAML of each base model."""

    config: ServiceConfig
    bases: dict[str, LoadedConfig]


def load_service(path: Path, port: int | None = None) -> LoadedService:
    """Read a service YAML and the training YAMLs that it names.

    Args:
        path: The service YAML.
        port: A port that replaces the YAML's.

    Raises:
        ConfigError: with file, line and key of every error.
    """
    document = _read(path)
    if port is not None:
        document.data["port"] = port
    try:
        config = ServiceConfig.model_validate(document.data)
    except ValidationError as error:
        raise ConfigError("\n".join(_problems(document, error))) from error
    bases, models = {}, {}
    for name, base in config.models.items():
        where = document.origin(("models", name, "config")).label
        yaml = (path.parent / base.config).resolve()
        bases[name] = _load_base(where, name, yaml)
        if base.engine == "vllm":
            for key in _UNSUPPORTED_BY_VLLM:
                if getattr(bases[name].config, key):
                    raise ConfigError(
                        f"{document.origin(('models', name, 'engine')).label}: `models.{name}.engine`: vllm does not support `{key}: true` "
                        f"of {yaml}: remove it there, or use engine: transformers"
                    )
        if config.publish_path and not bases[name].config.trains_adapter:
            raise ConfigError(
                f"{document.origin(('publish_path',)).label}: `publish_path` is for adapters, but models.{name} trains all weights: add "
                f"lora_config to {yaml}, or remove publish_path"
            )
        models[name] = base.model_copy(update={"config": str(yaml)})
    return LoadedService(config.model_copy(update={"models": models}), bases)


def _load_base(where: str, name: str, path: Path) -> LoadedConfig:
    try:
        loaded = load_config(path)
    except ConfigError as error:
        raise ConfigError(f"{where}: `models.{name}.config`: {error}") from error
    config = loaded.config
    if config.task != "instruction_tuning" or config.prompt_template is not None:
        raise ConfigError(
            f"{where}: `models.{name}.config`: {path} must train chats: set task: instruction_tuning and remove prompt_template"
        )
    if config.sequence_parallel_size > 1:
        raise ConfigError(f"{where}: `models.{name}.config`: {path}: {error_with('`models` of the service')}")
    try:
        chat_template = read_chat_template(config)
    except ConfigError as error:
        raise ConfigError(f"{where}: `models.{name}.config`: {path}: {error}") from error
    # Jobs and engines run in other directories, or on other nodes.
    changes: dict[str, Any] = {"chat_template": chat_template}
    for key in uri_keys("model"):
        changes[key] = _absolute_model(getattr(config, key))
    if isinstance(config.deepspeed, DeepspeedFile):
        changes["deepspeed"] = DeepspeedFile(config_path=absolute(config.deepspeed.config_path))
    return replace(loaded, config=config.model_copy(update=changes))


def _absolute_model(uri: str | None) -> str | None:
    """Return the URI of a model with a local path as an absolute path."""
    if uri is None or uri.startswith("run:") or is_hub_id(uri):
        return uri
    return absolute(uri)


def _read(path: Path) -> Document:
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {reason}. Give the path of a service YAML") from error
    document = parse_yaml(text, lambda line: Origin(f"{path}:{line}", line))
    if document.problems:
        raise ConfigError("\n".join(str(problem) for problem in document.problems))
    if not isinstance(document.data, dict):
        raise ConfigError(f"{path}:1: write lines of `key: value`, at least `models`")
    return document


def _problems(document: Document, error: ValidationError) -> Iterator[str]:
    for found in error.errors(include_url=False):
        path = tuple(part for part in found["loc"] if part != "[key]")
        known = _known_part(document.data, path)
        label = document.origin(known).label
        if found["type"] == "missing":
            yield f"{label}: `{dotted(path)}` is missing"
        elif found["type"] == "extra_forbidden":
            yield f"{label}: `{dotted(path)}` is not a key of a service YAML: remove it or check the spelling"
        else:
            yield f"{label}: `{dotted(known)}` is {shown(found['input'])}: {found['msg']}"


def _known_part(data: Any, path: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Return the part of pydantic's location that exists in the document; the rest names types."""
    known: tuple[int | str, ...] = ()
    for part in path:
        if not isinstance(data, dict) or part not in data:
            break
        data, known = data[part], (*known, part)
    return known
