"""A bucket that is reached as a user's own is: through the AWS variables, not as the embedded one."""

from contextlib import suppress

import pytest

from utils.embedded_bucket import EmbeddedBucket
from utils.fsspec_store import PACKAGES


def reach_as_a_user(environment: pytest.MonkeyPatch, server: EmbeddedBucket, bucket: str) -> str:
    """Set the variables, and make the bucket where it is not there yet; returns its URI."""
    from boto3.session import Session

    environment.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)
    environment.setenv("AWS_ACCESS_KEY_ID", server.access_key)
    environment.setenv("AWS_SECRET_ACCESS_KEY", server.secret_key)
    environment.setenv("AWS_REGION", "us-east-1")
    client = Session().client("s3")
    with suppress(client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


def reach_through_fsspec(environment: pytest.MonkeyPatch, server: EmbeddedBucket, bucket: str) -> str:
    """As `reach_as_a_user`, by another way: what fsspec opens there."""
    environment.setitem(PACKAGES, *S3_THROUGH_FSSPEC)
    return reach_as_a_user(environment, server, bucket).replace("s3://", "s3a://")


S3_THROUGH_FSSPEC = ("s3a", "s3fs")
"""A scheme that fsspec knows and `open_store` does not."""
