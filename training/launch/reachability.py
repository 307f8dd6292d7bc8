"""The check that the cluster at RAY_ADDRESS answers, before it is joined. Importing this module does not import Ray."""

import os
from pathlib import Path

from training.planning.endpoints import (
    ClusterError,
    ClusterTarget,
    check_address_answers,
    describe_missing_token,
)
from utils.console import library_output_in
from utils.errors import first_line


def check_cluster_answers(target: ClusterTarget) -> None:
    """Check that the cluster of a target answers and accepts this machine's token. A local cluster is started later, so it passes.

    Call `set_ray_environment` before, because this imports Ray for other clusters.
    """
    if target.is_local:
        return
    import ray.exceptions

    from training.loop.ray_internals import ask_gcs, cluster_on_this_machine

    address = target.address
    if address == "auto":
        try:
            address = cluster_on_this_machine()
        except ConnectionError as error:
            raise ClusterError(
                "RAY_ADDRESS: auto, but no Ray cluster runs on this machine. Start one with `ray start --head`, write HOST:6379, or unset "
                "RAY_ADDRESS to run without one."
            ) from error
    check_address_answers(ClusterTarget(address))
    if address and "://" not in address:
        try:
            with library_output_in(Path(os.devnull)):  # the error contains what Ray prints
                ask_gcs(address)
        except ray.exceptions.RayError as error:
            raise cannot_connect(address, error) from error


def cannot_connect(address: str, error: Exception) -> ClusterError:
    """Return the error of a cluster that does not answer as a Ray head, or that rejects this machine's token."""
    from ray.exceptions import AuthenticationError

    causes = f"{error} {error.__cause__}"
    if "AuthenticationError" in causes or isinstance(error, AuthenticationError):
        return ClusterError(f"RAY_ADDRESS: the cluster at {address} {describe_missing_token()}")
    return ClusterError(
        f"RAY_ADDRESS: cannot connect to the cluster at {address} ({first_line(error)}). Check that the port is that of a Ray head (6379 "
        "by default), with the same versions of Ray and Python as this machine."
    )
