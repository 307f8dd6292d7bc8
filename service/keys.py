"""API keys: the bucket has their hashes, and each belongs to a project."""

import hashlib
import json
import secrets
import time
from dataclasses import dataclass

from service.layout import PROJECT_NAME
from utils.command_line import main_line
from utils.errors import AnnealError
from utils.storage.bucket import AlreadyExistsError
from utils.storage.s3 import S3Store

_KEYS = "keys/"


class KeysError(AnnealError):
    """An error in a `keys` command."""


@dataclass(frozen=True)
class Caller:
    """The project and key of a request."""

    project: str
    key_id: str


@dataclass(frozen=True)
class KeyRecord:
    """A key as the bucket has it."""

    id: str
    project: str
    created_at: int
    revoked_at: int | None


def create_key(store: S3Store, project: str) -> str:
    """Create a key of a project and return it; only its hash is stored."""
    if not PROJECT_NAME.fullmatch(project):
        raise KeysError(
            f"{project}: is not a project name: use up to 40 lower-case letters, digits and '-', such as team-a"
        )
    key = f"sk-{secrets.token_urlsafe(36)}"
    record = {
        "id": f"key-{secrets.token_hex(6)}",
        "project": project,
        "created_at": int(time.time()),
        "revoked_at": None,
    }
    store.write(key_name(key), json.dumps(record).encode(), only_if_absent=True)
    return key


def create_first_key(store: S3Store, project: str) -> str | None:
    """Create a key if the service has none; of several processes, one does."""
    if store.first(_KEYS) is not None:
        return None
    try:
        store.write("first-key", b"{}", only_if_absent=True)
    except AlreadyExistsError:
        return None
    return create_key(store, project)


def list_keys(store: S3Store, project: str) -> list[KeyRecord]:
    """Return the keys of a project, oldest first."""
    return [record for _, record in _stored(store, project)]


def revoke_keys(store: S3Store, project: str, key_id: str | None) -> list[KeyRecord]:
    """Revoke one key of a project, or all, and return them.

    Raises:
        KeysError: the project has no such key.
    """
    found = [
        (key, record)
        for key, record in _stored(store, project)
        if record.revoked_at is None and key_id in (None, record.id)
    ]
    if not found:
        named = f"no valid key {key_id}" if key_id else "no valid key"
        raise KeysError(f"{project}: has {named}: `{main_line('keys', 'list', project)}` lists its keys")
    revoked = []
    for key, record in found:
        record = KeyRecord(record.id, record.project, record.created_at, int(time.time()))
        store.write(key, json.dumps(vars(record)).encode())
        revoked.append(record)
    return revoked


def read_caller(store: S3Store, name: str) -> Caller | None:
    """Return the caller with a key; None if there is no such key, or it was revoked.

    Args:
        store: The service's storage path.
        name: The key's name in the bucket.
    """
    content = store.read_if_exists(name)
    record = KeyRecord(**json.loads(content)) if content else None
    return Caller(record.project, record.id) if record and record.revoked_at is None else None


def key_name(key: str) -> str:
    """Return the name of a key in the bucket."""
    # A key has 288 random bits, so its hash needs no salt.
    return f"{_KEYS}{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()}.json"


def _stored(store: S3Store, project: str) -> list[tuple[str, KeyRecord]]:
    found = [
        (item.key, KeyRecord(**json.loads(content)))
        for item in store.list(_KEYS)
        if (content := store.read_if_exists(item.key))
    ]
    return sorted(
        ((key, record) for key, record in found if record.project == project),
        key=lambda each: each[1].created_at,
    )
