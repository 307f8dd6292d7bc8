"""Errors of the command line: one line, the fix, and exit code 2."""

import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

import main
from runs.stop_and_remove import find_run
from runs.summaries import read_run
from tests.support.jobs import PROJECT, environment
from tests.support.messages import assert_names
from tests.support.stored_runs import write_run
from training.inference.checkpoint_model import trained_model
from training.launch.reachability import check_cluster_answers
from training.loop import ray_internals
from training.planning import endpoints
from training.planning.endpoints import ClusterError, ClusterTarget, check_address_answers, target_cluster
from training.train import Options
from utils.command_line import main_line
from utils.storage.bucket import NotFoundError, open_store


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["trian"], ("trian", "no such file or command", "runs", "evaluate")),
        (["exprot"], ("exprot", "main.py export")),
        (["help"], ("help", "no such file or command")),
        (
            ["resume", "run.yaml"],
            ("resume: the command that started a run also resumes it: ", "main.py run.yaml"),
        ),
        (["run.yaml", "--learning_rate=3"], ("--learning_rate:", " learning_rate=3 ")),
        (["run.yaml", "--max_steps", "20"], ("--max_steps", " max_steps=20 ")),
        (["run.yaml", "--max_steps", "--json"], ("--max_steps", " max_steps=VALUE ")),
        (["run.yaml", "--num_train_epochs", "3"], ("--num_train_epochs", "`num_epochs=3`")),
        (["run.yaml", "--bf16"], ("--bf16", "`dtype=bf16`")),
        (["run.yaml", "--hf_token=abc"], ("--hf_token: ", "environment (HF_TOKEN")),
        (["run.yaml", "--tf32", "true"], ("--tf32", "without a counterpart")),
        (["train"], ("train: training needs no command: ", "main.py CONFIG.yaml")),
        (["train", "no.yaml"], ("training needs no command", "no.yaml", "no such file")),
        (["run.yaml", "--dry-rum"], ("--dry-rum", "--dry-run", "main.py CONFIG.yaml --help")),
        (["run.yaml", "--detach"], ("--detach", "--submit")),
        (["run.yaml", "--print-config", "--dry-run"], ("--dry-run", "--print-config")),
        ([""], ("empty",)),
        (
            ["outputs/tiny/a", "export", "--no-merge"],
            ("did you mean", "main.py export outputs/tiny/a --no-merge?"),
        ),
        (["run:a", "chat"], ("main.py chat run:a?",)),
        (["run.yaml", "export"], ("main.py export RUN?",)),
        (["run.yaml", "--dry-run", "runs"], ("main.py runs STORAGE_PATH --dry-run?",)),
        (["other.yaml", "convert", "--to", "new.yaml"], ("main.py convert other.yaml --to new.yaml?",)),
        (["run.yaml", "train", "a=1"], ("main.py run.yaml a=1?",)),
        (["chat", "run:a", "hello", "you"], ("main.py chat run:a --prompt 'hello you'?",)),
        (["convert", "other.yaml", "new.yaml"], ("main.py convert other.yaml --to new.yaml?",)),
        (["chat", "run:a", "b", "--prompt", "c"], ("unrecognized arguments: b",)),
        (["show", "run:a", "b"], ("unrecognized arguments: b",)),
        (["rows/train.jsonl"], ("is a data file", "main.py CONFIG.yaml train_path=rows/train.jsonl")),
    ],
)
def test_wrong_arguments_raise_an_error_in_one_line(
    arguments: list[str], facts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
):
    try:
        code = main.main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    assert code == main.REJECTED
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1
    assert_names(printed, *facts)


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (
            [
                "run.yaml",
                "--tf32",
                "--lr",
                "1e-4",
                "--learning_rat=3",
                "--foo",
                "--max_steps",
                "20",
                "--dry-rum",
            ],
            (
                ("--dry-rum", "--dry-run"),
                ("--lr", " learning_rate=1e-4?"),
                ("--learning_rat", " learning_rate=3?"),
                ("--max_steps", " max_steps=20"),
                ("--tf32", "without a counterpart"),
                ("--foo",),
            ),
        ),
        (
            ["run.yaml", "--use_gpu", "--dry_run"],
            (("--dry_run", "--dry-run"), ("--use_gpu", " device=cuda?")),
        ),
        (
            ["evaluate", "run:x", "--dta", "f", "--num_devices", "2"],
            (("--dta", "--data"), ("--num_devices", "--num-devices")),
        ),
        (["--config", "run.yaml"], (("--config", " main.py run.yaml"),)),
        (["export", "--foo", "--dtyp", "bf16"], (("--dtyp", "--dtype"), ("--foo",))),
    ],
)
def test_all_unknown_options_are_reported_at_once_the_most_important_first(
    arguments: list[str], lines: tuple[tuple[str, ...], ...], capsys: pytest.CaptureFixture[str]
):
    """Also before a missing argument is reported: a misspelled option may be the reason."""
    with pytest.raises(SystemExit) as caught:
        main.main(arguments)
    assert caught.value.code == main.REJECTED
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == len(lines)
    for line, facts in zip(printed, lines, strict=True):
        assert_names(line, "unknown argument", *facts)
        assert len(line) <= 160
    assert "--help)" in printed[-1]


def test_text_of_an_option_may_start_with_dashes():
    _, commands = main.build_parser()
    given = ["run:x", "--prompt", "--verbose does what?"]
    commands["chat"].reject_unknown(given)
    assert commands["chat"].parse_intermixed_args(given).prompt == given[-1]


def error_in(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main.main(arguments) == main.REJECTED
    (line,) = capsys.readouterr().err.splitlines()
    return line


AXOLOTL = "base_model: a/b\nmicro_batch_size: 2\nsequence_len: 512\nlora_r: 8\ndatasets: [{path: x, type: alpaca}]\n"


def test_train_as_a_command_names_the_line_that_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Not one line that raises the next error: the YAML may be another tool's."""
    ours, theirs = tmp_path / "my run.yaml", tmp_path / "axolotl.yaml"
    ours.write_text("model_id: a/b\n")
    theirs.write_text(AXOLOTL)
    line = error_in(["train", str(ours), "train_path=c.jsonl", "--dry-run"], capsys)
    assert line.endswith(main_line(str(ours), "train_path=c.jsonl", "--dry-run"))
    line = error_in(["train", str(theirs)], capsys)
    assert "training needs no command" in line
    assert line.endswith(main_line("convert", str(theirs), "--to", "NEW.yaml"))


@pytest.mark.parametrize("command", ["chat", "export", "runs", "show", "stop"])
def test_yaml_in_place_of_a_run_raises_an_error_with_the_runs_storage(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """No prompt is read before: reading standard input would fail here."""
    settings = f"model_id: a/b\ntrain_path: c.jsonl\nstorage_path: {tmp_path}/runs\n"
    ours, theirs = tmp_path / "run.yaml", tmp_path / "axolotl.yaml"
    ours.write_text(settings)
    theirs.write_text(AXOLOTL)
    line = error_in([command, str(ours)], capsys)
    assert_names(
        line, "is a YAML, not a run", f"{tmp_path}/runs/NAME", f"`{main_line('runs', f'{tmp_path}/runs')}`"
    )
    ours.write_text(f"{settings}run_name: mine\n")
    assert f" {tmp_path}/runs/mine; " in error_in([command, str(ours)], capsys)
    assert_names(error_in([command, str(theirs)], capsys), "is a YAML, not a run", f"`{main_line('runs')}`")


def test_run_outside_of_the_default_storage_path_is_found_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ANYSCALE_ARTIFACT_STORAGE", f"{tmp_path}/default")
    write_run(open_store(f"{tmp_path}/outputs/tiny"), "mine", [], result=None)
    for name in ("mine", "run:mine"):
        line = error_in(["show", name], capsys)
        assert_names(line, f"{tmp_path}/default/anneal", "default storage path")
        assert line.endswith("Did you mean outputs/tiny/mine?")
    for name in ("other", "run:other"):
        assert_names(
            error_in(["show", name], capsys), "by its path", f"`{main_line('runs', 'outputs/tiny')}`"
        )


@pytest.mark.parametrize("read", [read_run, find_run, lambda uri: trained_model(uri).__enter__()])
def test_storage_path_in_place_of_a_run_names_the_command_that_lists_it(
    read: Callable[[str], object], tmp_path: Path
):
    """In show and compare, in stop and remove, and in chat, export and evaluate."""
    write_run(open_store(f"{tmp_path}/runs"), "mine", [], result=None)
    with pytest.raises(NotFoundError) as caught:
        read(f"{tmp_path}/runs")
    assert_names(str(caught.value), "is a storage path, not a run", main_line("runs", f"{tmp_path}/runs"))


@pytest.mark.parametrize(
    ("command", "line"),
    [("merge-lora", ["export", "RUN"]), ("merge_lora", ["export", "RUN"]), ("inference", ["chat", "RUN"])],
)
def test_command_of_another_tool_gets_the_line_that_works(
    command: str, line: list[str], capsys: pytest.CaptureFixture[str]
):
    assert_names(error_in([command, "x.yaml"], capsys), command, main_line(*line))


@pytest.mark.parametrize(
    ("address", "mode", "job_server", "variable"),
    [
        ("head:6379", None, None, "RAY_ADDRESS=head:6379 "),
        ("head:6379", "token", None, "RAY_ADDRESS=head:6379 RAY_AUTH_MODE=token "),
        ("local", "token", None, ""),
        (None, None, None, ""),
        ("head:6379", "token", "http://head:8265", "RAY_AUTH_MODE=token "),
    ],
)
def test_command_that_resumes_a_run_names_its_cluster(
    address: str | None,
    mode: str | None,
    job_server: str | None,
    variable: str,
    monkeypatch: pytest.MonkeyPatch,
):
    """In a shell without the variables, the command would start a local cluster or be denied access."""
    for name, value in (("RAY_ADDRESS", address), ("RAY_AUTH_MODE", mode)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    submit = ["--submit", job_server] if job_server else []
    _, commands = main.build_parser()
    options = Options(**vars(commands["train"].parse_args(["run.yaml", *submit])))
    assert shlex.join(options.command) == variable + main_line("run.yaml", *submit)


@pytest.mark.parametrize("address", ["garbage", "head", "head:port", ":6379", "ray://head:10001"])
def test_address_that_names_no_port_raises_an_error(address: str):
    with pytest.raises(ClusterError) as caught:
        check_address_answers(ClusterTarget(address))
    assert_names(str(caught.value), "RAY_ADDRESS", address, ":6379")


def test_address_of_another_client_is_left_to_ray():
    check_address_answers(ClusterTarget("anyscale://cluster"))


@pytest.mark.parametrize(
    ("address", "is_local"),
    [(None, True), ("", True), ("local", True), ("auto", False), ("head:6379", False)],
)
def test_ray_address_names_a_cluster_or_this_machine(
    address: str | None, is_local: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert target_cluster().is_local == is_local


def test_server_that_is_no_cluster_raises_an_error(monkeypatch: pytest.MonkeyPatch):
    """It accepts connections and never answers, like a stopped process; Ray would wait for minutes."""
    monkeypatch.setattr(endpoints, "_REACH_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ClusterError) as caught:
            check_address_answers(ClusterTarget(address))
    assert_names(str(caught.value), "RAY_ADDRESS", address, "no Ray cluster")


def test_server_that_is_no_ray_head_raises_an_error_at_once():
    """It speaks gRPC, like the port of a raylet; ray.init would try for 20 s."""
    server = grpc.server(ThreadPoolExecutor(1))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    began = time.monotonic()
    try:
        with pytest.raises(ClusterError) as caught:
            check_cluster_answers(ClusterTarget(address))
    finally:
        server.stop(None)
    assert_names(str(caught.value), "RAY_ADDRESS", address, "6379")
    assert time.monotonic() - began < 10


class _DenyAccess(grpc.ServerInterceptor):
    """Answers as a Ray head with another token does."""

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(
            lambda _, context: context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        )


_CHECK_ADDRESS = """
import sys
from training.launch.reachability import check_cluster_answers
from training.planning.endpoints import ClusterError, ClusterTarget
try:
    check_cluster_answers(ClusterTarget(sys.argv[1]))
except ClusterError as error:
    print(error)
"""


@pytest.mark.slow  # each process imports Ray
@pytest.mark.parametrize(
    ("variables", "token", "facts"),
    [
        ({}, True, ("requires a token: set RAY_AUTH_MODE=token.", "~/.ray/auth_token")),
        ({"RAY_AUTH_MODE": "token"}, True, ("has none or another one: copy ~/.ray/auth_token",)),
        ({"RAY_AUTH_MODE": "token"}, False, ("has none or another one: copy ~/.ray/auth_token",)),
    ],
)
def test_denied_access_gets_one_line_that_starts_with_the_fix(
    variables: dict[str, str], token: bool, facts: tuple[str, ...], tmp_path: Path
):
    """Without Ray's own text of six lines. A missing token does not terminate the process either."""
    if token:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray/auth_token").write_text("a" * 64)
    server = grpc.server(ThreadPoolExecutor(1), interceptors=[_DenyAccess()])
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CHECK_ADDRESS, address],
            cwd=PROJECT,
            env=environment() | {"HOME": str(tmp_path)} | variables,
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        server.stop(None)
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"RAY_ADDRESS: the cluster at {address} requires a token")
    assert_names(line, *facts)
    assert len(line) <= 240


_FIND_CLUSTER = """
import os
from contextlib import suppress
from training.loop.ray_internals import cluster_on_this_machine
with suppress(ConnectionError):
    cluster_on_this_machine()
print(os.environ.get("RAY_AUTH_MODE"))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("variables", "mode"), [({}, "token"), ({"RAY_AUTH_MODE": "disabled"}, "disabled")])
def test_auto_uses_the_token_of_this_machine(variables: dict[str, str], mode: str, tmp_path: Path):
    """`ray start --head` has used it without RAY_AUTH_MODE."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("a" * 64)
    done = subprocess.run(
        [sys.executable, "-c", _FIND_CLUSTER],
        cwd=PROJECT,
        env=environment() | {"HOME": str(tmp_path)} | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [mode]


def test_auto_without_a_cluster_raises_an_error(monkeypatch: pytest.MonkeyPatch):
    def find_none() -> str:
        raise ConnectionError

    monkeypatch.setattr(ray_internals, "cluster_on_this_machine", find_none)  # other tests run clusters here
    with pytest.raises(ClusterError, match="RAY_ADDRESS: auto, but no Ray cluster"):
        check_cluster_answers(ClusterTarget("auto"))


def test_a_local_run_is_checked_without_importing_ray():
    check = "from training.launch.reachability import *; check_cluster_answers(ClusterTarget(None)); import sys; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], cwd=PROJECT, check=True)


def test_python_without_the_packages_raises_an_error_with_the_fix():
    done = subprocess.run(
        [sys.executable, "-S", str(PROJECT / "main.py"), "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert_names(done.stderr, sys.executable, "make setup", "on every node")


def test_version_names_the_project_and_its_packages(capsys: pytest.CaptureFixture[str]):
    assert main.main(["--version"]) == 0
    assert_names(capsys.readouterr().out, "anneal 0.1.0", platform.python_version(), "torch", "ray")


@pytest.mark.parametrize("command", ["--help", "--version", "convert"])
def test_reader_that_has_exited_is_no_error(command: str, tmp_path: Path):
    other = tmp_path / "other.yaml"
    other.write_text("base_model: m\ndatasets: [{path: a.jsonl}]\n")
    reader, writer = os.pipe()
    os.close(reader)
    arguments = ["convert", str(other)] if command == "convert" else [command]
    done = subprocess.run(
        [sys.executable, "main.py", *arguments],
        cwd=PROJECT,
        env=environment(),
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    os.close(writer)
    assert (done.returncode, "Error" in done.stderr) == (0, False), done.stderr
