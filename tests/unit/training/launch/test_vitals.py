"""The watch over Ray's processes: what it says about a port that refuses connections."""

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.messages import assert_names
from tests.support.ports import free_port
from training.launch.vitals import ClusterLostError, LostInterrupt, Vitals

_SIGNAL = signal.SIGRTMIN + 2


@contextmanager
def watched(address: str) -> Iterator[Vitals]:
    vitals = Vitals(address)
    try:
        yield vitals
    finally:
        vitals.end()
        vitals.left()


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return an address that refuses connections, which counts as lost at the first probe."""
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "0")
    return f"127.0.0.1:{free_port()}"


def test_lost_cluster_is_an_error_of_the_process_and_not_of_what_ray_raised_meanwhile(closed: str):
    """The interruption may arrive later than Ray's error, whose cause is then unknown."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {_SIGNAL})
    try:
        with watched(closed) as vitals, pytest.raises(ClusterLostError) as raised:
            vitals.raise_if_lost()
        assert_names(str(raised.value), "GCS", closed, "gcs_server.out", "Run the same command again.")
    finally:
        signal.signal(_SIGNAL, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {_SIGNAL})


def test_lost_cluster_interrupts_a_thread_that_does_not_ask(closed: str):
    with watched(closed), pytest.raises(LostInterrupt):
        signal.pause()


def test_cluster_that_answers_is_not_lost():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        with watched(address) as vitals:
            vitals.raise_if_lost()
            assert vitals.is_answering
