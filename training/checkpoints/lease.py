"""Who trains a run: one driver at a time holds its claim and renews it; every commit looks whether it still does.

A claim is an object `claim/000001.json` in the run, made with the storage's own "only if absent". Its owner writes it
again every few seconds and deletes it at the end. A claim that is not renewed expires: the next driver makes the next
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

from runs.layout import CLAIM_EXPIRES_SECONDS, CLAIMS, Claim, claim_key
from runs.reading import read_claim
from utils.errors import AnnealError
from utils.processes import started_after_boot, this_machine
from utils.storage.bucket import AlreadyExistsError, BucketError, DamagedError, Store

RENEW_SECONDS = 5.0
_LOOK_SECONDS = 1.0


class ClaimError(AnnealError):
    """Somebody else trains the run; the message names who."""


@contextmanager
def claimed(store: Store, *, waiting: Callable[[str], None]) -> Iterator[Claim]:
    """Hold the claim on a run for the length of the block.

    Args:
        store: The run.
        waiting: Told whom we are waiting for, while it is not clear whether an owner still lives.

    Raises:
        ClaimError: another driver holds it.
        BucketError: storage refuses or fails.
    """
    claim = _take(store, waiting)
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(store, claim, ended), name="claim", daemon=True)
    renewing.start()
    try:
        yield claim
    finally:
        ended.set()
        renewing.join()
        with suppress(BucketError):  # a claim that stays expires
            store.delete([claim_key(number) for number in _numbers(store) if number <= claim.number])


def check_claim(store: Store, claim: Claim) -> None:
    """Make sure that the claim is still the newest.

    Raises:
        ClaimError: another driver has taken the run over.
    """
    newest = _newest(store)
    if newest is None or newest.token != claim.token:
        successor = f" by {newest.owner}" if newest else ""
        raise ClaimError(
            f"{store.uri}: this driver's claim had expired and the run was taken over{successor}. Nothing of this attempt was committed "
            "since; look at that run."
        )


def _take(store: Store, waiting: Callable[[str], None]) -> Claim:
    numbers = _numbers(store)
    newest = _newest_of(store, numbers)
    if newest is not None and _lives(store, newest, waiting):
        raise ClaimError(
            f"{store.uri} is being trained by {newest.owner}, since {newest.since}. Wait for its end, stop it (its claim expires after "
            f"{CLAIM_EXPIRES_SECONDS:.0f} s), or choose another run_name."
        )
    number = max(numbers, default=0) + 1  # of the same listing: a claim made since then must be in our way
    process = os.getpid()
    started = started_after_boot(process)
    assert started is not None
    claim = Claim(
        number=number,
        token=secrets.token_hex(8),
        owner=f"{_user()}@{socket.gethostname()}, process {process}",
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=this_machine(),
        process=process,
        process_started=started,
    )
    try:
        store.write(claim_key(number), _content(claim), only_if_absent=True)
    except AlreadyExistsError:
        return _take(store, waiting)  # somebody was faster: say who, or wait for them
    return claim


def _lives(store: Store, claim: Claim, waiting: Callable[[str], None]) -> bool:
    """Whether the owner still renews; on our own machine the kernel knows it at once."""
    lives = claim.owner_lives()
    if lives is not None:
        return lives
    first = age = store.age(claim_key(claim.number))
    while age is not None and age < CLAIM_EXPIRES_SECONDS:
        if first is None or age < first:
            return True
        waiting(claim.owner)
        first = age
        time.sleep(_LOOK_SECONDS)
        age = store.age(claim_key(claim.number))
    return False


def _renew(store: Store, claim: Claim, ended: threading.Event) -> None:
    while not ended.wait(RENEW_SECONDS):
        try:
            if max(_numbers(store), default=0) != claim.number:
                return  # taken over: it must not come back when its successor has ended
            store.write(claim_key(claim.number), _content(claim))
        except BucketError:
            continue  # an outage longer than CLAIM_EXPIRES_SECONDS costs the claim, which the next commit finds out


def _newest(store: Store) -> Claim | None:
    return _newest_of(store, _numbers(store))


def _newest_of(store: Store, numbers: list[int]) -> Claim | None:
    for number in sorted(numbers, reverse=True):
        try:
            claim = read_claim(store, claim_key(number))
        except DamagedError as error:
            raise ClaimError(f"{error}.") from error
        if claim is not None:  # else its owner has just ended
            return claim
    return None


def _numbers(store: Store) -> list[int]:
    names = (Path(stored.key) for stored in store.list(f"{CLAIMS}/"))
    return [int(name.stem) for name in names if name.stem.isdigit()]


def _content(claim: Claim) -> bytes:
    return claim.model_dump_json(indent=2).encode()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without an entry for this id
        return str(os.getuid())
