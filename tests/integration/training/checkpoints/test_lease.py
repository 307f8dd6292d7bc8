"""One driver at a time trains a run; a dead one's claim expires. On a local directory and on a real S3 server, by two ways."""

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

from runs.layout import CLAIMS, Claim, claim_key
from tests.support.own_buckets import S3_THROUGH_FSSPEC, reach_through_fsspec
from training.checkpoints import lease as claims
from training.checkpoints.lease import ClaimError, check_claim, claimed
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
    with claimed(open_store(uri), waiting=nobody) as claim:
        ready.send(claim.model_dump_json())
        time.sleep(60)


def killed_owner(uri: str) -> Claim:
    """The claim of a driver that took it and was killed."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    owner = spawn.Process(target=hold, args=(uri, sender), daemon=True)
    owner.start()
    claim = Claim.model_validate_json(receiver.recv())
    assert owner.pid is not None
    os.kill(owner.pid, signal.SIGKILL)
    owner.join()
    return claim


def elsewhere(store: Store) -> Claim:
    """A claim from another machine, just made."""
    claim = Claim(
        number=1,
        token="theirs",
        owner="ann@elsewhere, process 7",
        since="2026-01-01T00:00:00+00:00",
        machine="another",
        process=7,
        process_started=0.0,
    )
    store.write(claim_key(1), claim.model_dump_json().encode(), only_if_absent=True)
    return claim


def test_a_second_driver_raises_an_error_with_the_owners_process(run_uri: str):
    store = open_store(run_uri)
    with claimed(store, waiting=nobody) as claim:
        check_claim(store, claim)
        with (
            pytest.raises(ClaimError, match=rf"process {os.getpid()}\b"),
            claimed(store, waiting=nobody),
        ):
            pass
        check_claim(store, claim)
    assert store.list(f"{CLAIMS}/") == [], "an ended driver leaves nothing"


def test_a_killed_drivers_claim_is_taken_over_and_its_workers_cannot_commit(run_uri: str):
    store = open_store(run_uri)
    dead = killed_owner(run_uri)
    with claimed(store, waiting=nobody) as claim:
        assert claim.number == dead.number + 1
        check_claim(store, claim)
        with pytest.raises(ClaimError, match="taken over"):
            check_claim(store, dead)
    with pytest.raises(ClaimError, match="expired"):
        check_claim(store, dead)


def test_an_owner_elsewhere_that_renews_is_alive(run_uri: str):
    store = open_store(run_uri)
    claim = elsewhere(store)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(2):  # S3 tells ages in whole seconds
            store.write(claim_key(1), claim.model_dump_json().encode())

    renewing = threading.Thread(target=renew)
    renewing.start()
    try:
        with pytest.raises(ClaimError, match="ann@elsewhere"), claimed(store, waiting=lambda owner: None):
            pass
    finally:
        ended.set()
        renewing.join()


def test_an_owner_elsewhere_that_stays_silent_expires(run_uri: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(claims, "CLAIM_EXPIRES_SECONDS", 3.0)
    store = open_store(run_uri)
    theirs = elsewhere(store)
    waited_for: list[str] = []
    with claimed(store, waiting=waited_for.append) as claim:
        assert claim.number == 2
        with pytest.raises(ClaimError):
            check_claim(store, theirs)
    assert "ann@elsewhere, process 7" in waited_for


def test_of_many_at_once_one_takes_it(run_uri: str):
    killed_owner(run_uri)
    store = open_store(run_uri)
    everybody = threading.Barrier(6)
    ended = threading.Event()

    def driver(_: int) -> bool:
        everybody.wait()
        try:
            with claimed(store, waiting=nobody):
                ended.wait(60)
            return True
        except ClaimError:
            return False

    with ThreadPoolExecutor(6) as pool:
        results = [pool.submit(driver, number) for number in range(6)]
        _until(lambda: sum(result.done() for result in results) == 5)
        ended.set()
        assert sorted(result.result() for result in results) == [False] * 5 + [True]


def test_a_claim_that_was_taken_over_does_not_come_back(run_uri: str, monkeypatch: pytest.MonkeyPatch):
    """Its successor has ended and taken all claims away; who was taken over must not pass for the owner again."""
    monkeypatch.setattr(claims, "RENEW_SECONDS", 0.05)
    store = open_store(run_uri)
    with claimed(store, waiting=nobody) as claim:
        successor = claim.model_copy(update={"number": claim.number + 1, "token": "theirs"})
        store.write(claim_key(successor.number), successor.model_dump_json().encode())
        _until(lambda: all(thread.name != "claim" for thread in threading.enumerate()))
        store.delete([claim_key(claim.number), claim_key(successor.number)])
        with pytest.raises(ClaimError, match="taken over"):
            check_claim(store, claim)


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "never came"
        time.sleep(0.05)


def test_a_damaged_claim_is_named(bucket: EmbeddedBucket, bucket_uri: str):
    store = open_store(bucket_uri)
    store.write(claim_key(3), b"{")
    with (
        pytest.raises(ClaimError, match=r"/000003\.json .*delete"),
        claimed(store, waiting=nobody),
    ):
        pass
