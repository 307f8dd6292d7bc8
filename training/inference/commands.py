"""The `export`, `chat` and `evaluate` commands."""

import os
import re
import sys
from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import datetime
from typing import TYPE_CHECKING, Literal, get_args

from rich.console import Console

from configs.loading import ConfigError
from configs.schema import Column, ExportConfig
from runs.commands import A_RUN
from runs.layout import Export, run_of
from runs.summaries import run_uri
from utils.arguments import add_json_option, positive
from utils.console import library_output_in, open_consoles
from utils.storage.bucket import is_remote, join_uri, open_store

if TYPE_CHECKING:
    from training.inference.checkpoint_model import TrainedModel

COMMANDS = {
    "export": "export the best checkpoint as a merged model, or only its adapter",
    "chat": "chat with the best checkpoint in a terminal, or generate one answer",
    "evaluate": "generate answers to held-out rows on Ray workers and report exact match",
}
"""Help text of each command. A YAML file with the name of a command needs a path, such as ./export."""


def add_arguments(commands: Mapping[str, ArgumentParser]) -> None:
    """Add the commands' arguments to their parsers."""
    _add_export_arguments(commands["export"])
    _add_chat_arguments(commands["chat"])
    _add_evaluate_arguments(commands["evaluate"])


def export_command(
    run: str,
    base: str | None,
    to: str | None,
    dtype: Literal["bf16", "fp16", "fp32"],
    merge: bool,
    layout: Literal["ray-serve-llm"] | None,
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
    to = _folder_for_ray_serve_llm(run, to) if layout else open_store(to).uri if to else None
    settings = ExportConfig(
        merge=merge and not layout, dtype=dtype, to=to, gguf=gguf, gguf_type=gguf_type, verify=verify
    )
    screen = errors if as_json else output
    exported = export_run(run, settings, screen, errors, base=base)
    if push:
        push_export(exported, push, private or None, screen, errors)
    if as_json:
        output.print(exported.model_dump_json(), soft_wrap=True)


def _folder_for_ray_serve_llm(run: str, to: str | None) -> str:
    """Return the folder of one adapter below `to`, named after the run, as Ray Serve LLM expects."""
    if to is None or not is_remote(to):
        raise ConfigError(
            "--layout ray-serve-llm: needs the bucket prefix from which Ray Serve LLM loads adapters. Add --to URI with its "
            "`dynamic_lora_loading_path`, such as s3://my-bucket/loras"
        )
    uri = run_uri(run).rstrip("/")
    return join_uri(open_store(to).uri, (run_of(uri) or uri).rpartition("/")[2])


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
    from training.models.libraries import block_imports, unused_packages

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
                block_imports(unused_packages(trained.config))
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
    from training.launch.display import Watch
    from training.launch.reachability import check_cluster_answers
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


def _add_export_arguments(command: ArgumentParser) -> None:
    command.set_defaults(run_command=export_command)
    _add_checkpoint(command)
    command.add_argument(
        "--to",
        metavar="URI",
        help="empty bucket prefix or directory to export to; default: exports/ in the run",
    )
    command.add_argument(
        "--dtype",
        choices=("bf16", "fp16", "fp32"),
        default="bf16",
        help="dtype of the weights; default: %(default)s",
    )
    form = command.add_mutually_exclusive_group()
    form.add_argument(
        "--no-merge",
        dest="merge",
        action="store_false",
        help="export only the adapter, in the format that vLLM loads",
    )
    form.add_argument(
        "--layout",
        choices=("ray-serve-llm",),
        help="export only the adapter, to the folder of --to that Ray Serve LLM loads: --to is its dynamic_lora_loading_path",
    )
    form.add_argument(
        "--gguf",
        action="store_true",
        help="also write a GGUF file with llama.cpp's converter (make setup-gguf)",
    )
    command.add_argument(
        "--gguf-type",
        choices=("f32", "f16", "bf16", "q8_0"),
        help="type of the weights in the GGUF file; default: that of --dtype",
    )
    command.add_argument(
        "--verify",
        action=BooleanOptionalAction,
        help="compare the export with the model as trained before it is published, also in vLLM if it is installed (make setup-vllm); default: if memory suffices, without vLLM",
    )
    command.add_argument(
        "--push",
        type=_hub_id,
        metavar="ORG/NAME",
        help="push the export to this model repository of the Hugging Face Hub; HF_TOKEN needs write access",
    )
    command.add_argument(
        "--private", action="store_true", help="make a repository that --push creates private"
    )
    add_json_option(command)


def _add_chat_arguments(command: ArgumentParser) -> None:
    command.set_defaults(run_command=chat_command)
    _add_checkpoint(command)
    command.add_argument("--prompt", metavar="TEXT", help="answer this prompt and exit")
    _add_max_new_tokens(command)


def _add_evaluate_arguments(command: ArgumentParser) -> None:
    command.set_defaults(run_command=evaluate_command)
    _add_checkpoint(command)
    command.add_argument(
        "--data", required=True, metavar="URI", help="held-out rows in the format of the training data"
    )
    command.add_argument(
        "--match",
        choices=("number", "text"),
        help="compare the final number (GSM8K: #### 18) or the complete text; default: number, or text for classification",
    )
    command.add_argument(
        "--column",
        dest="columns",
        action="append",
        type=_column,
        default=[],
        metavar="OURS=THEIRS",
        help="map our column to the file's column, such as prompt=question; repeatable; default: the run's columns",
    )
    command.add_argument(
        "--name",
        type=_name,
        metavar="NAME",
        help="write evaluations/NAME.jsonl in the run; default: name of the data file and the step",
    )
    command.add_argument(
        "--num-devices",
        type=positive,
        default=1,
        metavar="N",
        help="number of Ray workers, with one device per worker; default: 1",
    )
    command.add_argument("--device", choices=("auto", "cuda", "cpu"), help="default: the run's device")
    command.add_argument(
        "--batch-size",
        type=positive,
        default=8,
        metavar="N",
        help="rows per batch on each worker; default: 8",
    )
    _add_max_new_tokens(command)
    add_json_option(command)


def _add_checkpoint(command: ArgumentParser) -> None:
    command.add_argument("run", metavar="RUN", help=f"{A_RUN}, or the URI of one of its checkpoints")
    command.add_argument(
        "--base",
        metavar="URI",
        help="base model of the adapter, if it is no longer where the run was trained: hub id, directory or URI",
    )


def _add_max_new_tokens(command: ArgumentParser) -> None:
    command.add_argument(
        "--max-new-tokens",
        type=positive,
        default=512,
        metavar="N",
        help="maximum number of tokens per answer; default: %(default)s",
    )


def _column(text: str) -> tuple[str, str]:
    ours, separator, theirs = text.partition("=")
    if not separator or not theirs or ours not in get_args(Column):
        raise ArgumentTypeError(f"{text}: write OURS=THEIRS, with OURS one of {', '.join(get_args(Column))}")
    return ours, theirs


def _hub_id(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", text):
        raise ArgumentTypeError(f"{text}: write ORG/NAME, a model repository of the Hugging Face Hub")
    return text


def _name(text: str) -> str:
    if not text.replace("-", "").replace("_", "").replace(".", "").isalnum() or text.startswith("."):
        raise ArgumentTypeError(f"{text}: use letters, digits, '.', '_' and '-', without a leading '.'")
    return text
