"""The owner of the service's application on a cluster: the `serve` process that deletes it when it stops."""

import secrets
import time

_OWNER, _SUCCESSOR = "owner of the service", "successor of the owner"
_CLAIM_SECONDS = 120
"""Time after which a claim that was not repeated has no effect: its process was killed while it started."""


class Ownership:
    """What one `serve` process has recorded in the cluster's GCS about the ownership.

    A process claims the application before it deploys its own, and takes it once that is running. If the owner stops meanwhile,
    it passes the application on to the claimant instead of deleting it.
    """

    def __init__(self):
        self._id = secrets.token_hex(8)

    def claim(self) -> None:
        """Record that this process is about to take the application; repeat this until it has."""
        _store(_SUCCESSOR, f"{self._id} {int(time.time())}")

    def take(self) -> None:
        """Record that the application is the one of this process."""
        _store(_OWNER, self._id)

    def is_mine(self) -> bool:
        """Return whether the application is still the one of this process."""
        return _value(_OWNER) == self._id

    def leave(self) -> bool:
        """Give up claim and ownership; return whether this process has to delete the application."""
        successor = _claimant()
        if successor == self._id:
            _store(_SUCCESSOR, "")
        if not self.is_mine():
            return False
        if successor in (None, self._id):
            return True
        _store(_OWNER, successor)
        # It may have stopped just now, and does not know that the application was passed on.
        return _claimant() is None


def _claimant() -> str | None:
    """Return the process that is about to take the application, or took it in the last minutes."""
    process, _, claimed_at = (_value(_SUCCESSOR) or "").partition(" ")
    return process if process and time.time() - int(claimed_at) < _CLAIM_SECONDS else None


def _value(name: str) -> str | None:
    from training.loop.ray_internals import cluster_value  # imports Ray Train

    return cluster_value(name)


def _store(name: str, value: str) -> None:
    from training.loop.ray_internals import set_cluster_value

    set_cluster_value(name, value)
