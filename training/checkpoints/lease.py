"""The lease of a run: one driver at a time holds and renews it, and every commit checks that it is still valid.

A lease is an object `claim/000001.json` in the run, created with a conditional write (only if absent). Its owner rewrites it
every few seconds and deletes it at the end. A lease that is not renewed expires. The next driver then creates the lease with
the next number, and the former owner can no longer commit.
"""

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from runs.layout import LEASE_EXPIRES_SECONDS, LEASES, Lease, StopRequest, lease_key, stop_key
from runs.reading import read_lease
from utils.command_line import main_line
from utils.errors import AnnealError
from utils.processes import started_after_boot, this_machine, user_and_host
from utils.storage.bucket import AlreadyExistsError, BucketError, DamagedError, Store

RENEW_SECONDS = 5.0
_POLL_SECONDS = 1.0


class LeaseError(AnnealError):
    """A conflict with another driver that trains the run; the message names its owner."""


@contextmanager
def held_lease(
    store: Store,
    *,
    waiting: Callable[[str], None],
    on_stop: Callable[[StopRequest], None] = lambda request: None,
) -> Iterator[Lease]:
    """Hold the lease of a run within the block; raise LeaseError if another driver holds it.

    Args:
        store: The run.
        waiting: Called with the owner of an existing lease while it is unknown whether that process is alive.
        on_stop: Called once, on the renewing thread, when another process requests this driver to stop.
    """
    lease = _take(store, waiting)
    stop = threading.Event()
    renewing = threading.Thread(target=_renew, args=(store, lease, stop, on_stop), name="lease", daemon=True)
    renewing.start()
    try:
        yield lease
    finally:
        stop.set()
        renewing.join()
        with suppress(BucketError):  # a lease that is not deleted expires
            stale = [lease_key(number) for number in _numbers(store) if number <= lease.number]
            store.delete([*stale, stop_key(lease.token)])


def check_lease(store: Store, lease: Lease) -> None:
    """Check that this is still the latest lease of the run; raise LeaseError if another driver has taken over."""
    latest = _latest(store)
    if latest is None or latest.token != lease.token:
        what = f"was taken over by {latest.owner}" if latest else "was taken over or removed"
        raise LeaseError(
            f"{store.uri}: this driver's lease expired, and the run {what}. This attempt has committed nothing since. Follow that run, "
            "or stop it and rerun this command."
        )


def check_not_held(store: Store) -> None:
    """Check that no driver on this machine trains the run; raise LeaseError if one does."""
    latest = _latest(store)
    if latest is not None and latest.owner_lives():
        raise _held(store, latest)


def _held(store: Store, lease: Lease) -> LeaseError:
    return LeaseError(
        f"{store.uri} is being trained by {lease.owner} since {lease.since}. Wait until it ends, stop it with "
        f"`{main_line('stop', store.uri)}`, or choose another run_name. If its machine is gone, its lease expires {LEASE_EXPIRES_SECONDS:.0f} s "
        "after the last sign of life."
    )


def _take(store: Store, waiting: Callable[[str], None]) -> Lease:
    numbers = _numbers(store)
    latest = _latest_of(store, numbers)
    if latest is not None and _is_alive(store, latest, waiting):
        raise _held(store, latest)
    number = max(numbers, default=0) + 1  # from the same listing, so that a newer lease conflicts
    process = os.getpid()
    started = started_after_boot(process)
    assert started is not None
    lease = Lease(
        number=number,
        token=secrets.token_hex(8),
        owner=f"{user_and_host()}, process {process}",
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=this_machine(),
        process=process,
        process_started=started,
    )
    try:
        store.write(lease_key(number), _content(lease), only_if_absent=True)
    except AlreadyExistsError:
        return _take(store, waiting)  # another driver was faster: report it, or wait for it
    return lease


def _is_alive(store: Store, lease: Lease, waiting: Callable[[str], None]) -> bool:
    """Return whether the owner is alive: by its process on this machine, else by waiting for a renewal."""
    lives = lease.owner_lives()
    if lives is not None:
        return lives
    first = age = store.age(lease_key(lease.number))
    while age is not None and age < LEASE_EXPIRES_SECONDS:
        if first is None or age < first:
            return True
        waiting(lease.owner)
        first = age
        time.sleep(_POLL_SECONDS)
        age = store.age(lease_key(lease.number))
    return False


def _renew(store: Store, lease: Lease, stop: threading.Event, on_stop: Callable[[StopRequest], None]) -> None:
    is_requested = False
    while not stop.wait(RENEW_SECONDS):
        try:
            if max(_numbers(store), default=0) != lease.number:
                return  # taken over: renewing would restore the lease after its successor has ended
            store.write(lease_key(lease.number), _content(lease))
            if not is_requested and (request := store.read_if_exists(stop_key(lease.token))) is not None:
                is_requested = True
                on_stop(StopRequest.model_validate_json(request))
        except BucketError:
            continue  # in a long outage the lease expires, and the next commit fails


def _latest(store: Store) -> Lease | None:
    return _latest_of(store, _numbers(store))


def _latest_of(store: Store, numbers: list[int]) -> Lease | None:
    for number in sorted(numbers, reverse=True):
        try:
            lease = read_lease(store, lease_key(number))
        except DamagedError as error:
            raise LeaseError(f"{error}.") from error
        if lease is not None:  # None: its owner has just deleted it
            return lease
    return None


def _numbers(store: Store) -> list[int]:
    names = (Path(stored.key) for stored in store.list(f"{LEASES}/"))
    return [int(name.stem) for name in names if name.stem.isdigit()]


def _content(lease: Lease) -> bytes:
    return lease.model_dump_json(indent=2).encode()
