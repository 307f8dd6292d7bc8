"""A bucket that is reached as a user's own is: through the AWS variables, not as the embedded one."""

from contextlib import suppress
from typing import TYPE_CHECKING

from utils.storage.embedded_bucket import EmbeddedBucket
from utils.storage.fsspec_store import PACKAGES

if TYPE_CHECKING:  # benchmarks go without it
    import pytest


def variables_of(server: EmbeddedBucket) -> dict[str, str]:
    """The AWS variables that lead there."""
    return {
        "AWS_ENDPOINT_URL_S3": server.endpoint,
        "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_SECRET_ACCESS_KEY": server.secret_key,
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def reach_as_a_user(environment: "pytest.MonkeyPatch", server: EmbeddedBucket, bucket: str) -> str:
    """Set the variables, and make the bucket where it is not there yet; returns its URI."""
    from boto3.session import Session

    for name, value in variables_of(server).items():
        environment.setenv(name, value)
    client = Session().client("s3")
    with suppress(client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


def reach_through_fsspec(environment: "pytest.MonkeyPatch", server: EmbeddedBucket, bucket: str) -> str:
    """As `reach_as_a_user`, by another way: what fsspec opens there."""
    environment.setitem(PACKAGES, *S3_THROUGH_FSSPEC)
    return reach_as_a_user(environment, server, bucket).replace("s3://", "s3a://")


S3_THROUGH_FSSPEC = ("s3a", "s3fs")
"""A scheme that fsspec knows and `open_store` does not."""
