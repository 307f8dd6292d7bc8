"""The addresses of clusters and job servers: whether something answers there, before anything waits for it."""

import os
import re
import socket
from dataclasses import dataclass

from utils.errors import AnnealError

TOKEN_ADVICE = "It asks for a token: set RAY_AUTH_MODE=token, with the token in ~/.ray/auth_token or where RAY_AUTH_TOKEN_PATH points."
_REACH_SECONDS = 10
_HIGHEST_PORT = 65535


class ClusterError(AnnealError):
    """The cluster cannot take the job; the message says what it lacks and what to do."""


@dataclass(frozen=True)
class ClusterTarget:
    """Where a run's workers are placed: a cluster, or this machine."""

    address: str | None
    """The cluster's address, or that of the job server that takes the run; None: a cluster of this machine, started for the run."""

    @property
    def is_local(self) -> bool:
        """Whether the workers run on this machine."""
        return self.address is None


def target_cluster() -> ClusterTarget:
    """Return the cluster that RAY_ADDRESS names. Called once, at the entrance: everything else is handed the result."""
    return ClusterTarget(os.environ.get("RAY_ADDRESS") or None)


def set_ray_environment(target: ClusterTarget) -> None:
    """Set what Ray reads from the environment when it is imported."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A local cluster gets no preemption notices, and watching for them is a process on the cores that train.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0" if target.is_local else "1")
    # A report waits for the next health check.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Ray's patch of print breaks the hashing of datasets.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")


def check_cluster_answers(target: ClusterTarget) -> None:
    """Make sure that something listens where RAY_ADDRESS points; Ray itself retries for minutes.

    Raises:
        ClusterError: nothing answers, or it is a job server, which no driver can join.
    """
    address = target.address or ""
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"RAY_ADDRESS: {address} is a job server. Hand the run over to it with --submit {address}, or write RAY_ADDRESS=HEAD:6379 "
            "to join its cluster from one of its machines."
        )
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdigit():
        return  # unset, or "auto" and the like: Ray looks for a cluster on this machine
    check_answers(
        "RAY_ADDRESS",
        address,
        host,
        int(port),
        "Start the cluster, correct the address, or unset RAY_ADDRESS to run on this machine.",
    )


def check_job_server_answers(address: str) -> None:
    """As `check_cluster_answers`, for what --submit names.

    Raises:
        ClusterError: nothing answers, or it is no address of a job server.
    """
    match = re.fullmatch(r"https?://([^/:@\s]+|\[[0-9a-f:]+\])(?::(\d+))?(?:/\S*)?", address)
    if match is None:
        raise ClusterError(
            f"--submit: {address} is no address of a job server. Write http://HEAD:8265, where Ray's dashboard is."
        )
    host, port = match[1], int(match[2] or (443 if address.startswith("https") else 80))
    check_answers("--submit", address, host, port, "Start the cluster, or correct the address.")


def check_answers(said: str, address: str, host: str, port: int, advice: str) -> None:
    """Raises ClusterError, with what said the address and what to do, when nothing listens there."""
    if port > _HIGHEST_PORT:  # the system would ask another one
        raise ClusterError(
            f"{said}: {address} names the port {port}, and ports end at {_HIGHEST_PORT}. {advice}"
        )
    try:
        socket.create_connection((host.strip("[]"), port), _REACH_SECONDS).close()
    except OSError as error:
        raise ClusterError(f"{said}: nothing answers at {address} ({error}). {advice}") from error
