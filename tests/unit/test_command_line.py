"""Errors of the command line: one line, the fix, and exit code 2."""

import platform
import socket
import subprocess
import sys

import pytest

import main
from tests.support.jobs import PROJECT
from tests.support.messages import assert_names
from training.planning import endpoints
from training.planning.endpoints import ClusterError, ClusterTarget, check_cluster_answers, target_cluster


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["trian"], ("trian", "no such file or command", "runs", "evaluate")),
        (["exprot"], ("exprot", "main.py export")),
        (["help"], ("help", "no such file or command")),
        (["run.yaml", "--learning_rate=3"], ("--learning_rate=3", " learning_rate=3 ")),
        (["run.yaml", "--max_steps", "20"], ("--max_steps", " max_steps=20 ")),
        (["run.yaml", "--max_steps", "--json"], ("--max_steps", " max_steps=VALUE ")),
        (["run.yaml", "--num_train_epochs", "3"], ("--num_train_epochs", "num_epochs=VALUE")),
        (["run.yaml", "--tf32", "true"], ("--tf32", "no counterpart")),
        (["train", "my run.yaml", "seed=3"], ("train", "main.py 'my run.yaml' seed=3")),
        (["run.yaml", "--dry-rum"], ("--dry-rum", "--dry-run", "main.py CONFIG.yaml --help")),
        (["run.yaml", "--detach"], ("--detach", "--submit")),
        (["run.yaml", "--print-config", "--dry-run"], ("--dry-run", "--print-config")),
        ([""], ("empty",)),
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


@pytest.mark.parametrize("address", ["garbage", "head", "head:port", ":6379", "ray://head"])
def test_address_that_names_no_port_raises_an_error(address: str):
    with pytest.raises(ClusterError) as caught:
        check_cluster_answers(ClusterTarget(address))
    assert_names(str(caught.value), "RAY_ADDRESS", address, "HOST:6379")


def test_address_of_another_client_is_left_to_ray():
    check_cluster_answers(ClusterTarget("anyscale://cluster"))


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
            check_cluster_answers(ClusterTarget(address))
    assert_names(str(caught.value), "RAY_ADDRESS", address, "no Ray cluster")


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
