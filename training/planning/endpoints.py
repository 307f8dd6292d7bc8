"""Addresses of clusters and job servers, and quick checks that they answer before anything waits for them."""

import os
import re
import socket
from dataclasses import dataclass

from utils.command_line import ADDRESS_VARIABLE
from utils.errors import AnnealError

AUTH_MODE_VARIABLE = "RAY_AUTH_MODE"
AUTH_VARIABLES = (AUTH_MODE_VARIABLE, "RAY_AUTH_TOKEN_PATH")
WRITTEN_VARIABLE = "ANNEAL_YAML_AS_WRITTEN"
"""The variable of a submitted job with the path of the YAML as the user wrote it."""

_REACH_SECONDS = 10
_HIGHEST_PORT = 65535
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_EMPTY_SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""A frame: 3 bytes of length, the type (4: SETTINGS), flags and 4 bytes of stream."""
_FRAME_TYPE = 3


class ClusterError(AnnealError):
    """A cluster that cannot run the job; the message names what is missing and the fix."""


@dataclass(frozen=True)
class ClusterTarget:
    """The cluster or machine where a run's workers are placed."""

    address: str | None
    """Address of the cluster or of the job server; None for a local cluster that is started for the run."""

    @property
    def is_local(self) -> bool:
        """True if the workers run on this machine."""
        return self.address is None

    @property
    def is_job_server(self) -> bool:
        """True if the run is submitted: its driver, too, runs in the cluster's environment and not in this one."""
        return (self.address or "").startswith(("http://", "https://"))


def target_cluster() -> ClusterTarget:
    """Return the cluster that RAY_ADDRESS names; entry points call this once and pass the result on."""
    address = os.environ.get(ADDRESS_VARIABLE) or None
    return ClusterTarget(None if address == "local" else address)


def set_ray_environment(target: ClusterTarget) -> None:
    """Set the environment variables that Ray reads at import."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A local cluster gets no preemption notices, and the watcher process would use cores that train.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0" if target.is_local else "1")
    # Each report waits for the next health check.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Ray's patch of print breaks fingerprinting in datasets.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")


def check_address_answers(target: ClusterTarget) -> None:
    """Check that a gRPC server answers at RAY_ADDRESS; Ray itself would retry for minutes. Reject addresses of other servers."""
    address = target.address or ""
    if target.is_job_server:
        raise ClusterError(
            f"RAY_ADDRESS: {address} is a job server. Submit the run with --submit {address}, or set RAY_ADDRESS=HEAD:6379 on a machine "
            "of the cluster."
        )
    if not address:
        return
    if address.startswith("ray://"):
        raise ClusterError(
            f"RAY_ADDRESS: {address} is an address for Ray Client, which Anneal does not support. Set RAY_ADDRESS=HEAD:6379 on a machine "
            "of the cluster, or submit the run with --submit http://HEAD:8265."
        )
    if "://" in address:
        return  # the address of another client that Ray loads by its scheme, such as anyscale://
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ClusterError(
            f"RAY_ADDRESS: {address} is not the address of a cluster. Write HOST:6379, or auto for a cluster on this machine; unset it to "
            "run without one."
        )
    advice = "Start the cluster, correct the address, or unset RAY_ADDRESS to run on this machine."
    check_answers("RAY_ADDRESS", address, host, int(port), advice)
    if os.environ.get("RAY_USE_TLS", "0") in ("0", "") and not _speaks_grpc(host, int(port)):
        raise ClusterError(
            f"RAY_ADDRESS: {address} accepts connections, but no Ray cluster answered within {_REACH_SECONDS} s. {advice}"
        )


def _speaks_grpc(host: str, port: int) -> bool:
    """Return whether a server answers the start of an HTTP/2 connection with its settings, as every gRPC server does (RFC 9113, 3.4)."""
    try:
        with socket.create_connection((host.strip("[]"), port), _REACH_SECONDS) as connection:
            connection.sendall(_HTTP2_PREFACE + _EMPTY_SETTINGS)
            header = connection.recv(len(_EMPTY_SETTINGS))
    except OSError:
        return False
    return len(header) > _FRAME_TYPE and header[_FRAME_TYPE] == _EMPTY_SETTINGS[_FRAME_TYPE]


def check_job_server_answers(address: str) -> None:
    """Check that `--submit` names the URL of a job server, and that it answers."""
    match = re.fullmatch(r"https?://([^/:@\s]+|\[[0-9a-f:]+\])(?::(\d+))?(?:/\S*)?", address)
    if match is None:
        raise ClusterError(
            f"--submit: {address} is not the URL of a job server. Write http://HEAD:8265, the address of Ray's dashboard."
        )
    host, port = match[1], int(match[2] or (443 if address.startswith("https") else 80))
    check_answers("--submit", address, host, port, "Start the cluster, or correct the address.")


def describe_missing_token() -> str:
    """Return what a cluster requires that denied access, with the fix; as Ray, this looks at RAY_AUTH_MODE."""
    if os.environ.get(AUTH_MODE_VARIABLE, "").lower() == "token":
        return (
            "requires a token, and this machine has none or another one: copy ~/.ray/auth_token from the head, or name a copy in "
            "RAY_AUTH_TOKEN_PATH."
        )
    return (
        "requires a token: set RAY_AUTH_MODE=token. Ray then reads the token from ~/.ray/auth_token, a copy of the head's, or from the "
        "file that RAY_AUTH_TOKEN_PATH names."
    )


def check_answers(said: str, address: str, host: str, port: int, advice: str) -> None:
    """Check that a TCP port answers; the error names the setting (`said`), the address and the fix (`advice`)."""
    if port > _HIGHEST_PORT:  # the system would connect to another port
        raise ClusterError(
            f"{said}: {address} has port {port}, but the highest port is {_HIGHEST_PORT}. {advice}"
        )
    try:
        socket.create_connection((host.strip("[]"), port), _REACH_SECONDS).close()
    except OSError as error:
        raise ClusterError(f"{said}: nothing answers at {address} ({error}). {advice}") from error
