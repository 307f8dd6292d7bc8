"""Engines: what a chat request asks of a base model's engine, what the engine answers, and its Ray Serve deployment."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from configs.schema import FinetuneConfig
from service.config import BaseModelSettings
from service.errors import ApiError
from service.models import ServedModel
from utils.processes import importing

if TYPE_CHECKING:
    from ray.serve import Application

FinishReason = Literal["stop", "length", "tool_calls"]

MAX_ONGOING_REQUESTS = 512
"""Requests that one replica of an engine accepts; it batches as many of them as memory allows."""

_LEAST_TEMPERATURE = 1e-5
"""Below it, the most likely token is chosen, as vLLM does: logits divided by less overflow."""


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of an answer, and where it ends."""

    max_tokens: int | None = None
    """Tokens of each choice; None: up to the end of the context."""
    temperature: float = 1.0
    """0: the most likely token."""
    top_p: float = 1.0
    seed: int | None = None
    n: int = 1
    """Number of choices."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are not part of it."""
    top_logprobs: int | None = None
    """Alternatives reported with each token's log probability; None: no log probabilities."""

    @property
    def is_greedy(self) -> bool:
        """Return whether each token is the most likely one, so that all choices are the same."""
        return self.temperature < _LEAST_TEMPERATURE


@dataclass(frozen=True)
class ChatRequest:
    """A validated chat request."""

    model: ServedModel
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    variables: Mapping[str, Any]
    """Variables of the chat template, in addition to those of the model."""
    sampling: Sampling


@dataclass(frozen=True)
class TokenLogprob:
    """The log probability of a token, before temperature and top_p."""

    token: str
    bytes: tuple[int, ...]
    logprob: float
    top: tuple["TokenLogprob", ...] = ()


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool in an answer."""

    name: str
    arguments: str
    """JSON text."""


@dataclass(frozen=True)
class Accepted:
    """The first event of a request: it is valid and its model is loaded."""

    prompt_tokens: int


@dataclass(frozen=True)
class Delta:
    """The next piece of one choice."""

    choice: int
    text: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    completion_tokens: int = 0
    """Tokens of the complete choice; set together with `finish_reason`."""


@dataclass(frozen=True)
class Failed:
    """The last event of a request that has no answer, with the fields of ApiError."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, error: ApiError) -> "Failed":
        """Return the event for an error."""
        return cls(error.status, error.message, error.type, error.param, error.code, error.headers)

    def error(self) -> ApiError:
        """Return the error of the event."""
        return ApiError(
            status=self.status,
            message=self.message,
            type=self.type,
            param=self.param,
            code=self.code,
            headers=self.headers,
        )


Event = Accepted | Delta | Failed


class Engine(Protocol):
    """An engine: one base model and the checkpoints that were trained from it."""

    def chat(self, request: ChatRequest) -> AsyncGenerator[Event]:
        """Answer a request: `Accepted` and the deltas of its choices, or `Failed`. Closing the iterator cancels it."""
        ...


@dataclass(frozen=True)
class EngineSettings:
    """Everything that an engine needs to start; Ray sends it to the replicas."""

    base: str
    """Name of the base model in the service YAML."""
    model_uri: str
    """Hub id, directory or URI of the base model."""
    config: FinetuneConfig
    """The training YAML of the base model: dtype, 4-bit loading, chat template."""
    max_adapters: int
    threads: int | None
    """CPU threads of an engine without a GPU; None: all cores."""
    has_fixed_rope: bool = False
    """True if the engine computes RoPE of requests of any length alike, as vLLM does."""


def engine_deployment(base: str, settings: BaseModelSettings, config: FinetuneConfig) -> "Application":
    """Return the Ray Serve application of a base model's engine, whose streaming method is `chat`.

    Args:
        base: Name of the base model in the service YAML.
        settings: Its settings.
        config: Its training YAML, with a path that the replicas can read.
    """
    from ray import serve

    resources = dict(settings.resources)
    cpus, gpus = resources.pop("CPU", None), resources.pop("GPU", 0)
    options: dict[str, Any] = {"num_cpus": 1 if cpus is None else cpus, "num_gpus": gpus}
    if "memory" in resources:
        options["memory"] = resources.pop("memory")
    if resources:
        options["resources"] = resources
    deployment: Any = serve.deployment(
        EngineReplica if settings.num_replicas == 1 else reporting(EngineReplica, settings.max_adapters),
        name=f"engine-{base.replace('/', '-')}",
        num_replicas=settings.num_replicas,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        ray_actor_options=options,
    )
    return deployment.bind(
        settings.engine,
        EngineSettings(
            base=base,
            model_uri=config.model_id,
            config=config,
            max_adapters=settings.max_adapters,
            threads=None if cpus is None else max(1, int(cpus)),
        ),
    )


class EngineReplica:
    """A replica of an engine. It imports the engine itself: the process that deploys it would need seconds for torch and PEFT."""

    def __init__(self, engine: Literal["transformers", "vllm"], settings: EngineSettings):
        """Start an engine of this kind."""
        with importing():
            if engine == "vllm":
                from service.vllm_engine import VllmEngine as Chosen
            else:
                from service.transformers_engine import TransformersEngine as Chosen
        self._engine = Chosen(settings)

    async def chat(self, request: ChatRequest) -> AsyncGenerator[Event]:
        """Answer a request; see `Engine.chat`."""
        async with aclosing(self._engine.chat(request)) as events:
            async for event in events:
                yield event

    def check_health(self) -> None:
        """Raise an error if the engine cannot answer any more; Serve then replaces the replica."""
        self._engine.check_health()


def reporting(engine: Any, most: int) -> type:
    """Return an engine that reports its last `most` checkpoints to Serve, whose router sends requests for these to the replica."""
    from ray import serve

    class ReportingEngine(engine):
        @serve.multiplexed(max_num_models_per_replica=most)
        async def _report(self, checkpoint: str) -> str:
            return checkpoint

        async def chat(self, request: ChatRequest) -> AsyncGenerator[Event]:
            """Answer a request; see `Engine.chat`."""
            if request.model.checkpoint is not None:
                report: Any = self._report  # decorated
                await report(request.model.checkpoint)
            async with aclosing(super().chat(request)) as events:
                async for event in events:
                    yield event

    return ReportingEngine
