"""Who trains a run: one driver at a time holds its lease and renews it; every commit looks whether it still does.

A lease is an object `claim/000001.json` in the run, made with the storage's own "only if absent". Its owner writes it
again every few seconds and deletes it at the end. A lease that is not renewed expires: the next driver makes the next
number, and what is left of the former owner cannot commit any more.
"""

import getpass
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from runs.layout import LEASE_EXPIRES_SECONDS, LEASES, Lease, lease_key
from runs.reading import read_lease
from utils.errors import AnnealError
from utils.processes import started_after_boot, this_machine
from utils.storage.bucket import AlreadyExistsError, BucketError, DamagedError, Store

RENEW_SECONDS = 5.0
_LOOK_SECONDS = 1.0


class LeaseError(AnnealError):
    """Somebody else trains the run; the message names who."""


@contextmanager
def held_lease(store: Store, *, waiting: Callable[[str], None]) -> Iterator[Lease]:
    """Hold the lease on a run for the length of the block.

    Args:
        store: The run.
        waiting: Told whom we are waiting for, while it is not clear whether an owner still lives.

    Raises:
        LeaseError: another driver holds it.
        BucketError: storage refuses or fails.
    """
    lease = _take(store, waiting)
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(store, lease, ended), name="lease", daemon=True)
    renewing.start()
    try:
        yield lease
    finally:
        ended.set()
        renewing.join()
        with suppress(BucketError):  # a lease that stays expires
            store.delete([lease_key(number) for number in _numbers(store) if number <= lease.number])


def check_lease(store: Store, lease: Lease) -> None:
    """Make sure that the lease is still the newest.

    Raises:
        LeaseError: another driver has taken the run over.
    """
    newest = _newest(store)
    if newest is None or newest.token != lease.token:
        successor = f" by {newest.owner}" if newest else ""
        raise LeaseError(
            f"{store.uri}: this driver's lease had expired and the run was taken over{successor}. Nothing of this attempt was committed "
            "since; look at that run."
        )


def _take(store: Store, waiting: Callable[[str], None]) -> Lease:
    numbers = _numbers(store)
    newest = _newest_of(store, numbers)
    if newest is not None and _lives(store, newest, waiting):
        raise LeaseError(
            f"{store.uri} is being trained by {newest.owner}, since {newest.since}. Wait for its end, stop it (its lease expires after "
            f"{LEASE_EXPIRES_SECONDS:.0f} s), or choose another run_name."
        )
    number = max(numbers, default=0) + 1  # of the same listing: a lease made since then must be in our way
    process = os.getpid()
    started = started_after_boot(process)
    assert started is not None
    lease = Lease(
        number=number,
        token=secrets.token_hex(8),
        owner=f"{_user()}@{socket.gethostname()}, process {process}",
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=this_machine(),
        process=process,
        process_started=started,
    )
    try:
        store.write(lease_key(number), _content(lease), only_if_absent=True)
    except AlreadyExistsError:
        return _take(store, waiting)  # somebody was faster: say who, or wait for them
    return lease


def _lives(store: Store, lease: Lease, waiting: Callable[[str], None]) -> bool:
    """Whether the owner still renews; on our own machine the kernel knows it at once."""
    lives = lease.owner_lives()
    if lives is not None:
        return lives
    first = age = store.age(lease_key(lease.number))
    while age is not None and age < LEASE_EXPIRES_SECONDS:
        if first is None or age < first:
            return True
        waiting(lease.owner)
        first = age
        time.sleep(_LOOK_SECONDS)
        age = store.age(lease_key(lease.number))
    return False


def _renew(store: Store, lease: Lease, ended: threading.Event) -> None:
    while not ended.wait(RENEW_SECONDS):
        try:
            if max(_numbers(store), default=0) != lease.number:
                return  # taken over: it must not come back when its successor has ended
            store.write(lease_key(lease.number), _content(lease))
        except BucketError:
            continue  # an outage longer than LEASE_EXPIRES_SECONDS costs the lease, which the next commit finds out


def _newest(store: Store) -> Lease | None:
    return _newest_of(store, _numbers(store))


def _newest_of(store: Store, numbers: list[int]) -> Lease | None:
    for number in sorted(numbers, reverse=True):
        try:
            lease = read_lease(store, lease_key(number))
        except DamagedError as error:
            raise LeaseError(f"{error}.") from error
        if lease is not None:  # else its owner has just ended
            return lease
    return None


def _numbers(store: Store) -> list[int]:
    names = (Path(stored.key) for stored in store.list(f"{LEASES}/"))
    return [int(name.stem) for name in names if name.stem.isdigit()]


def _content(lease: Lease) -> bytes:
    return lease.model_dump_json(indent=2).encode()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without an entry for this id
        return str(os.getuid())
