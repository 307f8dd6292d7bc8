"""Checks of recorded S3 requests against an IAM policy."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from tests.support.bucket_proxy import Request


def needed(requests: Iterable[Request]) -> set[tuple[str, str]]:
    """Return the (action, resource) pairs that requests need, as AWS documents them for each operation."""
    return {(_action(request), resource) for request in requests for resource in _resources(request)}


def is_allowed(policy: Mapping[str, Any], action: str, resource: str) -> bool:
    """Return whether a policy of Allow statements allows an action on a resource."""
    return any(
        action in statement["Action"]
        and any(fnmatchcase(resource, pattern) for pattern in _as_list(statement["Resource"]))
        for statement in policy["Statement"]
    )


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _action(request: Request) -> str:
    query = set(request.query)
    if request.method == "GET" and not request.is_download:
        return "s3:ListBucketMultipartUploads" if "uploads" in query else "s3:ListBucket"
    if request.method == "DELETE":
        return "s3:AbortMultipartUpload" if "uploadId" in query else "s3:DeleteObject"
    if request.method == "POST":
        return "s3:DeleteObject" if "delete" in query else "s3:PutObject"
    return {"GET": "s3:GetObject", "HEAD": "s3:GetObject", "PUT": "s3:PutObject"}[request.method]


def _resources(request: Request) -> list[str]:
    bucket, _, key = request.path.strip("/").partition("/")
    keys = request.deleted or (key,)
    return [f"arn:aws:s3:::{bucket}/{key}" if key else f"arn:aws:s3:::{bucket}" for key in keys]
