"""API keys: the bucket has their hashes, and each belongs to a project."""

import hashlib
import json
import secrets
import time
from dataclasses import dataclass
from threading import Lock

from service.errors import ApiError
from service.layout import PROJECT_NAME
from utils.command_line import main_line
from utils.errors import AnnealError
from utils.storage.bucket import AlreadyExistsError
from utils.storage.s3 import S3Store

_KEYS = "keys/"
_CACHE_SECONDS = 2.0
_MAX_CACHED = 10_000


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
    store.write(_key_of(key), json.dumps(record).encode(), only_if_absent=True)
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


class Keyring:
    """The keys that requests send, with answers of the bucket cached for seconds."""

    def __init__(self, store: S3Store):
        self._store = store
        self._cache: dict[str, tuple[float, Caller | None]] = {}
        self._lock = Lock()

    def caller(self, authorization: str) -> Caller:
        """Return the caller of a request.

        Args:
            authorization: The Authorization header.

        Raises:
            ApiError: 401 for no key, a wrong key or a revoked key.
        """
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _unauthorized("You didn't provide an API key. Send it as `Authorization: Bearer KEY`.")
        name = _key_of(key.strip())
        with self._lock:
            until, caller = self._cache.get(name, (0.0, None))
        if until < time.monotonic():
            content = self._store.read_if_exists(name)
            record = KeyRecord(**json.loads(content)) if content else None
            caller = Caller(record.project, record.id) if record and record.revoked_at is None else None
            with self._lock:
                if len(self._cache) >= _MAX_CACHED:
                    self._cache.clear()
                self._cache[name] = (time.monotonic() + _CACHE_SECONDS, caller)
        if caller is None:
            raise _unauthorized("Incorrect API key provided, or the key was revoked.", "invalid_api_key")
        return caller


def _unauthorized(message: str, code: str | None = None) -> ApiError:
    return ApiError(status=401, message=message, code=code, headers={"WWW-Authenticate": "Bearer"})


def _key_of(key: str) -> str:
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
