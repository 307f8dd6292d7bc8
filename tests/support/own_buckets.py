"""Buckets that are configured as a user's own bucket: through AWS variables, not as the embedded bucket."""

import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from utils.storage.embedded_bucket import EmbeddedBucket
from utils.storage.fsspec_store import PACKAGES

if TYPE_CHECKING:  # benchmarks run without pytest
    import pytest


def aws_variables(server: EmbeddedBucket) -> dict[str, str]:
    """Return the AWS variables that configure a server's endpoint and credentials."""
    return {
        "AWS_ENDPOINT_URL_S3": server.endpoint,
        "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_SECRET_ACCESS_KEY": server.secret_key,
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def set_up_own_bucket(patch: "pytest.MonkeyPatch", server: EmbeddedBucket, bucket: str) -> str:
    """Set the AWS variables, create the bucket if it does not exist, and return its URI."""
    from boto3.session import Session

    for name, value in aws_variables(server).items():
        patch.setenv(name, value)
    client = Session().client("s3")
    with suppress(client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


def set_up_fsspec_bucket(patch: "pytest.MonkeyPatch", server: EmbeddedBucket, bucket: str) -> str:
    """Set up the bucket as `set_up_own_bucket` does, and return a URI that fsspec opens."""
    patch.setitem(PACKAGES, *S3_THROUGH_FSSPEC)
    return set_up_own_bucket(patch, server, bucket).replace("s3://", "s3a://")


S3_THROUGH_FSSPEC = ("s3a", "s3fs")
"""A URI scheme that fsspec supports and `open_store` does not, with its package."""


def unreachable_endpoint() -> tuple[int, dict[str, str]]:
    """Return (a port that nothing listens on, environment variables that name it as the S3 endpoint)."""
    with socket.create_server(("127.0.0.1", 0)) as closed_soon:
        port = closed_soon.getsockname()[1]
    return port, {
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
    }
