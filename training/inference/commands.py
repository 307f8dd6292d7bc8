"""The `export`, `chat` and `evaluate` commands."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import datetime
from typing import TYPE_CHECKING, Literal

from rich.console import Console

from configs.loading import ConfigError
from configs.schema import ExportConfig
from runs.layout import Export
from runs.listing import run_uri
from utils.console import library_output_in, open_consoles
from utils.storage.bucket import open_store

if TYPE_CHECKING:
    from training.inference.checkpoint_model import TrainedModel

COMMANDS = {
    "export": "export the best checkpoint as a merged model, or only its adapter",
    "chat": "chat with the best checkpoint in a terminal, or generate one answer",
    "evaluate": "generate answers to held-out rows on Ray workers and report exact match",
}
"""Help text of each command. A YAML file with the name of a command needs a path, such as ./export."""


def export_command(
    run: str,
    base: str | None,
    to: str | None,
    dtype: Literal["bf16", "fp16", "fp32"],
    merge: bool,
    gguf: bool,
    gguf_type: Literal["f32", "f16", "bf16", "q8_0"] | None,
    verify: bool | None,
    push: str | None,
    private: bool,
    as_json: bool,
) -> None:
    """Export the best checkpoint of a run, and push the export to the Hub if `push` names a repository."""
    if private and not push:
        raise ConfigError(
            "--private: only --push creates a repository. Add --push ORG/NAME, or remove --private."
        )
    if gguf_type and not gguf:
        raise ConfigError("--gguf-type: is the type of a GGUF file. Add --gguf, or remove --gguf-type.")
    run_uri(run)  # reject a YAML or a misspelled name before libraries are imported
    output, errors = open_consoles()
    if push:
        from training.models.hub import check_hub_access

        check_hub_access("--push")
    to = open_store(to).uri if to else None
    settings = ExportConfig(merge=merge, dtype=dtype, to=to, gguf=gguf, gguf_type=gguf_type, verify=verify)
    screen = errors if as_json else output
    exported = export_run(run, settings, screen, errors, base=base)
    if push:
        push_export(exported, push, private or None, screen, errors)
    if as_json:
        output.print(exported.model_dump_json(), soft_wrap=True)


def export_run(
    run: str, settings: ExportConfig, screen: Console, progress: Console, *, base: str | None = None
) -> Export:
    """Export the best checkpoint of a run and print the export's location."""
    from training.inference.checkpoint_model import trained_model
    from training.inference.display import show_export
    from training.inference.export import export
    from training.launch.display import Watch

    with (
        trained_model(run, settings.to or "", base=base) as trained,
        _library_output_to_log(trained),
        Watch(progress) as watch,
    ):
        exported = export(trained, settings, progress=watch.phase)
    show_export(screen, exported)
    return exported


def push_export(
    exported: Export, repository: str, private: bool | None, screen: Console, progress: Console
) -> None:
    """Push an export to a model repository on the Hugging Face Hub and print its URL.

    Args:
        exported: The export.
        repository: Id of the repository.
        private: Whether a new repository is private; None: the default of the account.
        screen: Console for the URL.
        progress: Console for progress.
    """
    from runs.display import print_facts
    from training.inference.checkpoint_model import trained_model
    from training.inference.export import push
    from training.launch.display import Watch

    with (
        trained_model(exported.checkpoint, exported.uri) as trained,
        _library_output_to_log(trained),
        Watch(progress) as watch,
    ):
        watch.phase(f"pushing to {repository}")
        url = push(exported, trained.cache, repository, private=private)
    print_facts(screen, [("pushed", url)])


def chat_command(run: str, base: str | None, prompt: str | None, max_new_tokens: int) -> None:
    """Chat with the best checkpoint of a run."""
    from training.inference.chat import Conversation, import_libraries
    from training.inference.checkpoint_model import trained_model
    from training.launch.display import Watch
    from training.models.libraries import unused_packages, withhold

    run_uri(run)  # as for export, and before a prompt is read
    output, errors = open_consoles()
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise ConfigError("no prompt: set --prompt TEXT, or pipe a non-empty text to standard input")

    # The bucket starts, and the run is found, while the libraries are imported.
    with ThreadPoolExecutor(1) as thread:
        imported = thread.submit(import_libraries)
        with trained_model(run, base=base) as trained, _library_output_to_log(trained):
            with Watch(errors) as watch:
                watch.phase(f"loading {trained.checkpoint}")
                withhold(unused_packages(trained.config))
                imported.result()
                conversation = Conversation(trained)
            if prompt is not None:
                conversation.answer(prompt.strip(), output.write, max_new_tokens=max_new_tokens)
                output.write("\n")
                return
            errors.print("To quit, press Ctrl-D, Ctrl-C, or Enter on an empty line.")
            while prompt := _ask(errors):
                conversation.answer(prompt, output.write, max_new_tokens=max_new_tokens)
                output.write("\n")


def _ask(errors: Console) -> str:
    errors.print("> ", end="")
    return sys.stdin.readline().strip()


def evaluate_command(
    run: str,
    base: str | None,
    data: str,
    match: Literal["number", "text"] | None,
    columns: list[tuple[str, str]],
    name: str | None,
    num_devices: int,
    device: Literal["auto", "cuda", "cpu"] | None,
    batch_size: int,
    max_new_tokens: int,
    as_json: bool,
) -> None:
    """Evaluate the best checkpoint of a run on held-out rows."""
    run_uri(run)  # as for export
    from training.events import Phase
    from training.inference.checkpoint_model import trained_model
    from training.launch.answering import check_cluster_answers
    from training.launch.display import Watch
    from training.planning.devices import choose_device
    from training.planning.endpoints import set_ray_environment, target_cluster

    target = target_cluster()
    set_ray_environment(target)
    output, errors = open_consoles()
    check_cluster_answers(target)
    with trained_model(run, data, base=base) as trained, _library_output_to_log(trained):
        config = trained.config
        overrides = {
            "device": device or config.device,
            "num_devices": num_devices,
            "worker_resources": {},
        }
        chosen = choose_device(config.model_copy(update=overrides), target)
        from training.inference.display import show_evaluation
        from training.inference.evaluate import EvaluationSettings, evaluate

        settings = EvaluationSettings(
            match=match or ("text" if config.task == "classification" else "number"),
            columns=dict(columns) or {str(ours): name for ours, name in config.columns.items()},
            num_devices=num_devices,
            device=chosen,
            target=target,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
        )
        with Watch(errors) as watch:
            evaluation = evaluate(
                trained,
                data,
                name,
                settings,
                progress=lambda text, fraction: watch.on_event(Phase(text, fraction)),
            )
    if as_json:
        output.print(evaluation.model_dump_json(), soft_wrap=True)
    else:
        show_evaluation(output, evaluation)


def _library_output_to_log(trained: "TrainedModel") -> AbstractContextManager[None]:
    """Redirect library output to a log file of this process."""
    log = trained.cache.parent / "logs" / f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.log"
    return library_output_in(log)
