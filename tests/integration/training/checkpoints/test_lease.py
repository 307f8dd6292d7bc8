"""Tests that one driver at a time holds the lease of a run, in a local directory and on a real S3 server with both clients."""

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from runs.layout import LEASES, Lease, lease_key
from tests.support.own_buckets import S3_THROUGH_FSSPEC, set_up_fsspec_bucket
from tests.support.waiting import wait_until
from training.checkpoints import lease as lease_module
from training.checkpoints.lease import LeaseError, check_lease, held_lease
from utils.storage.bucket import Store, open_store
from utils.storage.embedded_bucket import EmbeddedBucket
from utils.storage.fsspec_store import PACKAGES


@pytest.fixture(params=["local", "s3", pytest.param("s3fs", marks=pytest.mark.slow)])
def run_uri(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "local":
        return str(tmp_path / "run")
    server = request.getfixturevalue("bucket")
    if request.param == "s3":
        return request.getfixturevalue("bucket_uri")
    return f"{set_up_fsspec_bucket(monkeypatch, server, 'leases')}/{tmp_path.name}"


def fail_if_waiting(owner: str) -> None:
    raise AssertionError(f"the driver waits for {owner}")


def hold_lease(uri: str, ready: Connection) -> None:
    """Take the lease in a child process, send it to the parent and hold it."""
    PACKAGES.update([S3_THROUGH_FSSPEC])
    with held_lease(open_store(uri), waiting=fail_if_waiting) as lease:
        ready.send(lease.model_dump_json())
        time.sleep(60)


def killed_owner(uri: str) -> Lease:
    """Start a driver that takes the lease, kill it, and return its lease."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    owner = spawn.Process(target=hold_lease, args=(uri, sender), daemon=True)
    owner.start()
    lease = Lease.model_validate_json(receiver.recv())
    assert owner.pid is not None
    os.kill(owner.pid, signal.SIGKILL)
    owner.join()
    return lease


def write_remote_lease(store: Store) -> Lease:
    """Write a new lease owned by a driver on another machine; return it."""
    lease = Lease(
        number=1,
        token="theirs",
        owner="ann@elsewhere, process 7",
        since="2026-01-01T00:00:00+00:00",
        machine="another",
        process=7,
        process_started=0.0,
    )
    store.write(lease_key(1), lease.model_dump_json().encode(), only_if_absent=True)
    return lease


def test_second_driver_raises_an_error_with_the_process_of_the_owner(run_uri: str):
    store = open_store(run_uri)
    with held_lease(store, waiting=fail_if_waiting) as lease:
        check_lease(store, lease)
        with (
            pytest.raises(LeaseError, match=rf"process {os.getpid()}\b"),
            held_lease(store, waiting=fail_if_waiting),
        ):
            pass
        check_lease(store, lease)
    assert store.list(f"{LEASES}/") == [], "a driver deletes its lease when it exits"


def test_lease_of_a_killed_driver_is_taken_over_and_becomes_invalid(run_uri: str):
    store = open_store(run_uri)
    expired = killed_owner(run_uri)
    with held_lease(store, waiting=fail_if_waiting) as lease:
        assert lease.number == expired.number + 1
        check_lease(store, lease)
        with pytest.raises(LeaseError, match="taken over"):
            check_lease(store, expired)
    with pytest.raises(LeaseError, match="expired"):
        check_lease(store, expired)


@pytest.mark.slow
def test_remote_owner_that_renews_its_lease_is_alive(run_uri: str):
    store = open_store(run_uri)
    lease = write_remote_lease(store)
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(2):  # S3 reports ages in whole seconds
            store.write(lease_key(1), lease.model_dump_json().encode())

    renewing = threading.Thread(target=renew)
    renewing.start()
    try:
        with pytest.raises(LeaseError, match="ann@elsewhere"), held_lease(store, waiting=lambda owner: None):
            pass
    finally:
        stop.set()
        renewing.join()


@pytest.mark.slow
def test_lease_that_a_remote_owner_does_not_renew_expires(run_uri: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease_module, "LEASE_EXPIRES_SECONDS", 3.0)
    store = open_store(run_uri)
    remote = write_remote_lease(store)
    waited_for: list[str] = []
    with held_lease(store, waiting=waited_for.append) as lease:
        assert lease.number == 2
        with pytest.raises(LeaseError):
            check_lease(store, remote)
    assert "ann@elsewhere, process 7" in waited_for


def test_one_of_many_concurrent_drivers_takes_the_lease(run_uri: str):
    killed_owner(run_uri)
    store = open_store(run_uri)
    barrier = threading.Barrier(6)
    stop = threading.Event()

    def driver(_: int) -> bool:
        barrier.wait()
        try:
            with held_lease(store, waiting=fail_if_waiting):
                stop.wait(60)
            return True
        except LeaseError:
            return False

    with ThreadPoolExecutor(6) as pool:
        results = [pool.submit(driver, number) for number in range(6)]
        wait_until(lambda: sum(result.done() for result in results) == 5)
        stop.set()
        assert sorted(result.result() for result in results) == [False] * 5 + [True]


def test_lease_that_was_taken_over_stays_invalid(run_uri: str, monkeypatch: pytest.MonkeyPatch):
    """The successor has exited and deleted all leases; the former owner must not become the owner again."""
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 0.05)
    store = open_store(run_uri)
    with held_lease(store, waiting=fail_if_waiting) as lease:
        successor = lease.model_copy(update={"number": lease.number + 1, "token": "theirs"})
        store.write(lease_key(successor.number), successor.model_dump_json().encode())
        wait_until(lambda: all(thread.name != "lease" for thread in threading.enumerate()))
        store.delete([lease_key(lease.number), lease_key(successor.number)])
        with pytest.raises(LeaseError, match="taken over"):
            check_lease(store, lease)


def test_damaged_lease_raises_an_error_with_its_key(bucket: EmbeddedBucket, bucket_uri: str):
    store = open_store(bucket_uri)
    store.write(lease_key(3), b"{")
    with (
        pytest.raises(LeaseError, match=r"/000003\.json .*delete"),
        held_lease(store, waiting=fail_if_waiting),
    ):
        pass
