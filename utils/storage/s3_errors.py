"""S3 errors: which are worth a retry, and a clear message for each."""

import urllib.parse
from typing import Any

from utils.files import BucketError
from utils.storage.store import NotFoundError

CHANGED = "the object changed during the download; run again"
NO_S3 = "the endpoint is not an S3 server; check AWS_ENDPOINT_URL_S3"
ELSEWHERE = "the server only redirects; check AWS_ENDPOINT_URL_S3"
EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_BUSY = {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "RequestTimeout"}
_BUSY_STATUSES = {408, 429, 500, 502, 503, 504}


def error_code(error: Any) -> str:
    """Return the S3 error code of a botocore ClientError; the HTTP status if the response had none."""
    return error.response.get("Error", {}).get("Code", "")


def may_pass(error: Any) -> bool:
    """Return whether a retry may succeed: storage is busy or unreachable, or the credentials can be renewed."""
    from botocore import exceptions

    if isinstance(error, exceptions.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status in _BUSY_STATUSES or error_code(error) in _BUSY | EXPIRED | {
            "ConditionalRequestConflict"
        }
    if isinstance(error, exceptions.SSLError | exceptions.InvalidProxiesConfigError) or _is_too_deep(error):
        return False
    return isinstance(
        error,
        exceptions.ConnectionError
        | exceptions.HTTPClientError
        | exceptions.IncompleteReadError
        | exceptions.CredentialRetrievalError
        | exceptions.MetadataRetrievalError,
    )


_ADVICE = {
    "NoSuchBucket": "there is no bucket {bucket!r}; create it, or fix the URI or AWS_ENDPOINT_URL_S3",
    "NoSuchKey": "there is no such object",
    "404": "there is no such object",
    "AccessDenied": "access denied; these credentials need s3:ListBucket, s3:GetObject, s3:PutObject and "
    "s3:DeleteObject there",
    "403": "access denied; the credentials are wrong, expired, or lack permission",
    "InvalidAccessKeyId": "the server does not know the access key; check AWS_ACCESS_KEY_ID or AWS_PROFILE",
    "SignatureDoesNotMatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY or AWS_PROFILE",
    **dict.fromkeys(EXPIRED, "the credentials have expired; renew them and run again"),
    "InvalidToken": "the session token is not valid; check AWS_SESSION_TOKEN, or renew the credentials",
    "RequestTimeTooSkewed": "the clock of this machine is wrong; set it",
    **dict.fromkeys(("PreconditionFailed", "412"), CHANGED),
    **dict.fromkeys(
        ("PermanentRedirect", "AuthorizationHeaderMalformed", "301"),
        "the bucket is in another region; set AWS_REGION",
    ),
    **dict.fromkeys(
        ("SlowDown", "ServiceUnavailable", "503"),
        "storage is overloaded and rejected every attempt; run again later",
    ),
}


def explain_rejection(error: Any, where: str, bucket: str) -> BucketError:
    """Return the BucketError for a botocore ClientError: the server answered with an error."""
    details = error.response.get("Error", {})
    code = details.get("Code", "")
    if not code or (code == "404" and error.operation_name != "HeadObject"):
        return BucketError(f"{where}: {NO_S3}")
    advice = _ADVICE.get(code)
    if advice is None:
        return BucketError(f"{where}: storage answered {code} ({details.get('Message', '')})")
    kind = NotFoundError if code in ("NoSuchKey", "404") else BucketError
    return kind(f"{where}: {advice.format(bucket=bucket)}")


def explain_failure(error: Any) -> str:
    """Return the message for a BotoCoreError: the server is unreachable, or the client lacks a setting or credentials."""
    from botocore import exceptions

    if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
        return "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if isinstance(error, exceptions.ProfileNotFound):
        return f"AWS_PROFILE is {error.kwargs['profile']!r}, but ~/.aws/config and ~/.aws/credentials have no such profile"
    if isinstance(error, exceptions.EndpointProviderError):
        return f"{str(error).rstrip('.')}; check AWS_ENDPOINT_URL_S3 and AWS_ENDPOINT_URL"
    if isinstance(error, exceptions.SSOError | exceptions.TokenRetrievalError | exceptions.LoginError):
        return "the sign-in has expired; run `aws sso login` or `aws login` and try again"
    if isinstance(error, exceptions.SSLError):
        if "WRONG_VERSION_NUMBER" in str(error):
            return "the server does not use TLS; write http:// in AWS_ENDPOINT_URL_S3"
        if "No such file" in str(error) or "NO_CERTIFICATE" in str(error):
            return "AWS_CA_BUNDLE is not a file with certificates"
        return "the server's certificate is not trusted; set AWS_CA_BUNDLE to the file of its certificate authority"
    if isinstance(error, exceptions.ProxyConnectionError):
        proxy = _address(error.kwargs["proxy_url"])
        return f"the proxy {proxy} does not answer; check HTTP_PROXY, HTTPS_PROXY and NO_PROXY"
    if _is_too_deep(error):
        return ELSEWHERE
    if isinstance(error, exceptions.ConnectionError | exceptions.HTTPClientError):
        request_url = getattr(error, "kwargs", {}).get("endpoint_url", "")
        server = _address(request_url)
        return f"the storage server {server} does not answer; check the network and AWS_ENDPOINT_URL_S3"
    return str(error)


def _is_too_deep(error: Any) -> bool:
    """Return whether a recursion error inside a request stopped botocore, caused by a server that only redirects."""
    return isinstance(getattr(error, "kwargs", {}).get("error"), RecursionError)


def _address(url: object) -> str:
    """Return host and port of a URL, without a password."""
    text = str(url)
    return urllib.parse.urlsplit(text if "://" in text else f"//{text}").netloc.rpartition("@")[2]
