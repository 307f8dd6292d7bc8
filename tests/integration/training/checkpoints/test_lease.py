"""One driver at a time trains a run; a dead one's lease expires. On a local directory and on a real S3 server, by two ways."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from runs.layout import LEASES, Lease, lease_key
from tests.support.own_buckets import S3_THROUGH_FSSPEC, reach_through_fsspec
from training.checkpoints import lease as lease_module
from training.checkpoints.lease import LeaseError, check_lease, held_lease
from utils.storage.bucket import Store, open_store
from utils.storage.embedded_bucket import EmbeddedBucket
from utils.storage.fsspec_store import PACKAGES


@pytest.fixture(params=["local", "s3", "s3fs"])
def run_uri(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "local":
        return str(tmp_path / "run")
    server = request.getfixturevalue("bucket")
    if request.param == "s3":
        return request.getfixturevalue("bucket_uri")
    return f"{reach_through_fsspec(monkeypatch, server, 'claims')}/{tmp_path.name}"


def nobody(owner: str) -> None:
    raise AssertionError(f"waits for {owner}")


def hold(uri: str, ready: Connection) -> None:
    PACKAGES.update([S3_THROUGH_FSSPEC])
    with held_lease(open_store(uri), waiting=nobody) as lease:
        ready.send(lease.model_dump_json())
        time.sleep(60)


def killed_owner(uri: str) -> Lease:
    """The lease of a driver that took it and was killed."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    owner = spawn.Process(target=hold, args=(uri, sender), daemon=True)
    owner.start()
    lease = Lease.model_validate_json(receiver.recv())
    assert owner.pid is not None
    os.kill(owner.pid, signal.SIGKILL)
    owner.join()
    return lease


def elsewhere(store: Store) -> Lease:
    """A lease from another machine, just made."""
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


def test_a_second_driver_raises_an_error_with_the_owners_process(run_uri: str):
    store = open_store(run_uri)
    with held_lease(store, waiting=nobody) as lease:
        check_lease(store, lease)
        with (
            pytest.raises(LeaseError, match=rf"process {os.getpid()}\b"),
            held_lease(store, waiting=nobody),
        ):
            pass
        check_lease(store, lease)
    assert store.list(f"{LEASES}/") == [], "an ended driver leaves nothing"


def test_a_killed_drivers_claim_is_taken_over_and_its_workers_cannot_commit(run_uri: str):
    store = open_store(run_uri)
    dead = killed_owner(run_uri)
    with held_lease(store, waiting=nobody) as lease:
        assert lease.number == dead.number + 1
        check_lease(store, lease)
        with pytest.raises(LeaseError, match="taken over"):
            check_lease(store, dead)
    with pytest.raises(LeaseError, match="expired"):
        check_lease(store, dead)


def test_an_owner_elsewhere_that_renews_is_alive(run_uri: str):
    store = open_store(run_uri)
    lease = elsewhere(store)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(2):  # S3 tells ages in whole seconds
            store.write(lease_key(1), lease.model_dump_json().encode())

    renewing = threading.Thread(target=renew)
    renewing.start()
    try:
        with pytest.raises(LeaseError, match="ann@elsewhere"), held_lease(store, waiting=lambda owner: None):
            pass
    finally:
        ended.set()
        renewing.join()


def test_an_owner_elsewhere_that_stays_silent_expires(run_uri: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease_module, "LEASE_EXPIRES_SECONDS", 3.0)
    store = open_store(run_uri)
    theirs = elsewhere(store)
    waited_for: list[str] = []
    with held_lease(store, waiting=waited_for.append) as lease:
        assert lease.number == 2
        with pytest.raises(LeaseError):
            check_lease(store, theirs)
    assert "ann@elsewhere, process 7" in waited_for


def test_of_many_at_once_one_takes_it(run_uri: str):
    killed_owner(run_uri)
    store = open_store(run_uri)
    everybody = threading.Barrier(6)
    ended = threading.Event()

    def driver(_: int) -> bool:
        everybody.wait()
        try:
            with held_lease(store, waiting=nobody):
                ended.wait(60)
            return True
        except LeaseError:
            return False

    with ThreadPoolExecutor(6) as pool:
        results = [pool.submit(driver, number) for number in range(6)]
        _until(lambda: sum(result.done() for result in results) == 5)
        ended.set()
        assert sorted(result.result() for result in results) == [False] * 5 + [True]


def test_a_lease_that_was_taken_over_stays_lost(run_uri: str, monkeypatch: pytest.MonkeyPatch):
    """Its successor has ended and deleted all leases; the former owner must not count as the owner again."""
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 0.05)
    store = open_store(run_uri)
    with held_lease(store, waiting=nobody) as lease:
        successor = lease.model_copy(update={"number": lease.number + 1, "token": "theirs"})
        store.write(lease_key(successor.number), successor.model_dump_json().encode())
        _until(lambda: all(thread.name != "lease" for thread in threading.enumerate()))
        store.delete([lease_key(lease.number), lease_key(successor.number)])
        with pytest.raises(LeaseError, match="taken over"):
            check_lease(store, lease)


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "never came"
        time.sleep(0.05)


def test_a_damaged_claim_is_named(bucket: EmbeddedBucket, bucket_uri: str):
    store = open_store(bucket_uri)
    store.write(lease_key(3), b"{")
    with (
        pytest.raises(LeaseError, match=r"/000003\.json .*delete"),
        held_lease(store, waiting=nobody),
    ):
        pass
