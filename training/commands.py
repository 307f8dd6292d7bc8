"""The commands that use what was trained: main.py export, chat and evaluate."""

import argparse
import os
import sys
from contextlib import AbstractContextManager
from datetime import datetime
from typing import TYPE_CHECKING, get_args

from rich.console import Console

from configs.loading import ConfigError
from configs.schema import Column, ExportConfig
from runs.layout import Export
from utils.bucket import open_store
from utils.console import Output, library_output_in, open_consoles

if TYPE_CHECKING:
    from training.trained import TrainedModel

COMMANDS = ("export", "chat", "evaluate")
"""What may stand where else a YAML does; a file of that name is written ./export."""


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line of one of COMMANDS; a wrong one ends the process with code 2."""
    parser = argparse.ArgumentParser(prog="main.py", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    exporting = commands.add_parser(
        "export", help="write the best checkpoint as other programs load it: one model, or the adapter alone"
    )
    exporting.add_argument(
        "--to", metavar="URI", help="an empty prefix or directory; default: exports/ in the run"
    )
    exporting.add_argument(
        "--dtype",
        choices=("bf16", "fp16", "fp32"),
        default="bf16",
        help="of the weights; default: %(default)s",
    )
    form = exporting.add_mutually_exclusive_group()
    form.add_argument(
        "--no-merge", dest="merge", action="store_false", help="the adapter alone, as vLLM loads it"
    )
    form.add_argument(
        "--gguf", action="store_true", help="a GGUF file as well; needs llama.cpp's convert_hf_to_gguf.py"
    )
    chatting = commands.add_parser(
        "chat", help="talk with the best checkpoint: on a terminal, or one answer for --prompt or piped text"
    )
    chatting.add_argument("--prompt", metavar="TEXT", help="answer this and end")
    evaluating = commands.add_parser(
        "evaluate", help="answer held-out rows on Ray workers and count those that match"
    )
    evaluating.add_argument("--data", required=True, metavar="URI", help="rows as the run was trained on")
    evaluating.add_argument(
        "--match",
        choices=("number", "text"),
        help="compare the final number (as GSM8K marks it: #### 18), or the whole text; default: number, text for a classification",
    )
    evaluating.add_argument(
        "--column",
        dest="columns",
        action="append",
        type=_column,
        default=[],
        metavar="OURS=THEIRS",
        help="what the file calls a column, such as prompt=question; once for each; default: the run's",
    )
    evaluating.add_argument(
        "--name",
        type=_name,
        metavar="NAME",
        help="of evaluations/NAME.jsonl in the run; default: the file's, and the step",
    )
    evaluating.add_argument(
        "--num-devices",
        type=_positive,
        default=1,
        metavar="N",
        help="Ray workers, one device each; default: 1",
    )
    evaluating.add_argument("--device", choices=("auto", "cuda", "cpu"), help="default: the run's")
    evaluating.add_argument(
        "--batch-size",
        type=_positive,
        default=8,
        metavar="N",
        help="rows that a worker answers at once; default: 8",
    )
    for command in (chatting, evaluating):
        command.add_argument(
            "--max-new-tokens",
            type=_positive,
            default=512,
            metavar="N",
            help="tokens of the longest answer; default: %(default)s",
        )
    for command in (exporting, evaluating):
        command.add_argument("--json", action="store_true", help="print one line of JSON and nothing else")
    for command in (exporting, chatting, evaluating):
        command.add_argument(
            "run",
            metavar="RUN",
            help="a run's URI, run:NAME for one where runs go by default, or the URI of one of its checkpoints",
        )
    return parser.parse_args(arguments)


def run_command(options: argparse.Namespace) -> None:
    """Carry out one of COMMANDS.

    Raises:
        ConfigError, ModelError, DataError, CheckpointError, ClusterError, BucketError: it cannot be done; the message says why.
        WorkersFailedError: the workers of an evaluation failed.
    """
    output, errors = open_consoles()
    match options.command:
        case "export":
            _export(options, output, errors)
        case "chat":
            _chat(options, output, errors)
        case _:
            _evaluate(options, output, errors)


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: write a whole number of at least 1")
    return int(text)


def _column(text: str) -> tuple[str, str]:
    ours, separator, theirs = text.partition("=")
    if not separator or not theirs or ours not in get_args(Column):
        raise argparse.ArgumentTypeError(
            f"{text}: write OURS=THEIRS, with one of {', '.join(get_args(Column))} first"
        )
    return ours, theirs


def _name(text: str) -> str:
    if not text.replace("-", "").replace("_", "").replace(".", "").isalnum() or text.startswith("."):
        raise argparse.ArgumentTypeError(f"{text}: write letters, digits, '.', '_' and '-', no '.' first")
    return text


def _export(options: argparse.Namespace, output: Console, errors: Console) -> None:
    to = open_store(options.to).uri if options.to else None
    settings = ExportConfig(merge=options.merge, dtype=options.dtype, to=to, gguf=options.gguf)
    exported = export_run(options.run, settings, errors if options.json else output, errors)
    if options.json:
        output.print(exported.model_dump_json(), soft_wrap=True)


def export_run(run: str, settings: ExportConfig, screen: Console, progress: Console) -> Export:
    """Export the best checkpoint of a run, and say so on the screen.

    Raises:
        ConfigError, ModelError, CheckpointError, BucketError: it cannot be done.
    """
    from training.display import Watch, show_export
    from training.exporting import export
    from training.trained import trained_model

    with (
        trained_model(run, settings.to or "") as trained,
        _libraries_quiet(trained),
        Watch(progress) as watch,
    ):
        exported = export(trained, settings, progress=watch.phase)
    show_export(screen, exported)
    return exported


def _chat(options: argparse.Namespace, output: Output, errors: Console) -> None:
    from training.chat import Conversation
    from training.display import Watch
    from training.trained import trained_model

    prompt: str | None = options.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise ConfigError("there is no prompt: write --prompt TEXT, or send text to standard input")

    with trained_model(options.run) as trained, _libraries_quiet(trained):
        with Watch(errors) as watch:
            watch.phase(f"loading {trained.checkpoint}")
            conversation = Conversation(trained)
        if prompt is not None:
            conversation.answer(prompt.strip(), output.write, max_new_tokens=options.max_new_tokens)
            output.write("\n")
            return
        errors.print("An empty line, Ctrl-D or Ctrl-C ends the conversation.")
        while asked := _ask(errors):
            conversation.answer(asked, output.write, max_new_tokens=options.max_new_tokens)
            output.write("\n")


def _ask(errors: Console) -> str:
    errors.print("> ", end="")
    return sys.stdin.readline().strip()


def _evaluate(options: argparse.Namespace, output: Console, errors: Console) -> None:
    from training.addresses import check_cluster_answers, target_cluster
    from training.devices import choose_device
    from training.display import Watch, show_evaluation
    from training.events import Phase
    from training.trained import trained_model

    target = target_cluster()
    check_cluster_answers(target)
    with trained_model(options.run, options.data) as trained, _libraries_quiet(trained):
        config = trained.config
        asked = {
            "device": options.device or config.device,
            "num_devices": options.num_devices,
            "worker_resources": {},
        }
        device = choose_device(config.model_copy(update=asked), target)
        from training.evaluation import HowToEvaluate, evaluate

        how = HowToEvaluate(
            match=options.match or ("text" if config.task == "classification" else "number"),
            columns=dict(options.columns) or {str(ours): name for ours, name in config.columns.items()},
            num_devices=options.num_devices,
            device=device,
            target=target,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
        )
        with Watch(errors) as watch:
            evaluation = evaluate(
                trained,
                options.data,
                options.name,
                how,
                progress=lambda text, fraction: watch.on_event(Phase(text, fraction)),
            )
    if options.json:
        output.print(evaluation.model_dump_json(), soft_wrap=True)
    else:
        show_evaluation(output, evaluation)


def _libraries_quiet(trained: "TrainedModel") -> AbstractContextManager[None]:
    """What libraries print goes to a log file of this process."""
    log = trained.cache.parent / "logs" / f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.log"
    return library_output_in(log)
