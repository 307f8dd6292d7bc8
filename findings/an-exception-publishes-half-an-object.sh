#!/usr/bin/env bash
# An exception inside `with filesystem.open("s3://...", "wb")` publishes what was written so far as a complete object.
#
# An S3 object appears when its upload is completed, so one expects an interrupted writer to leave nothing: boto3's upload_fileobj
# aborts the multipart upload. But s3fs, fsspec.open and pyarrow's S3FileSystem complete the upload when the `with` block
# closes the file, and it does so for an exception, too. The key is visible, its checksum is right, and it has half of the
# bytes. It also replaces the complete object that had been there. Code that waits for the key, or takes the latest of a
# prefix, reads a checkpoint that ends in the middle. fsspec has `with filesystem.transaction:` for this; pyarrow needs
# another name first, and S3 has no rename.
#
# Seen with s3fs==2026.2.0, fsspec==2026.2.0, pyarrow==26.0.1 and boto3==1.43.117, on the server of moto==5.2.5.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check s3fs==2026.2.0 fsspec==2026.2.0 pyarrow==26.0.1 \
  "moto[server]==5.2.5" boto3==1.43.117 botocore==1.43.117 aiobotocore==3.10.0
export AWS_ACCESS_KEY_ID=key AWS_SECRET_ACCESS_KEY=secret AWS_DEFAULT_REGION=us-east-1 AWS_EC2_METADATA_DISABLED=true
"$directory/venv/bin/python" - 2>/dev/null <<'PYTHON'
import os
import sys
from contextlib import suppress

import boto3
import fsspec
import s3fs
from moto.server import ThreadedMotoServer
from pyarrow.fs import S3FileSystem

HALF = b"x" * (24 << 20)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
endpoint = "http://127.0.0.1:{1}".format(*server.get_host_and_port())
os.environ["AWS_ENDPOINT_URL_S3"] = endpoint
client = boto3.client("s3", endpoint_url=endpoint)
client.create_bucket(Bucket="runs")


class Failed(Exception):
    """Any error of the code that writes."""


class Source:
    """A file of which the second half cannot be read."""

    def __init__(self):
        self.left = len(HALF)

    def read(self, size: int) -> bytes:
        if not self.left:
            raise Failed
        taken = min(size, self.left)
        self.left -= taken
        return b"x" * taken


def write(opened) -> None:
    with suppress(Failed), opened as file:
        file.write(HALF)
        raise Failed


filesystem = s3fs.S3FileSystem(endpoint_url=endpoint)
write(filesystem.open("runs/s3fs", "wb"))
write(fsspec.open("s3://runs/fsspec.open", "wb", endpoint_url=endpoint))
write(S3FileSystem(endpoint_override=endpoint).open_output_stream("runs/pyarrow"))
with suppress(Failed):
    client.upload_fileobj(Source(), "runs", "boto3")
with suppress(Failed), filesystem.transaction:
    with filesystem.open("runs/transaction", "wb") as file:
        file.write(HALF)
        raise Failed

listed = {stored["Key"]: stored["Size"] for stored in client.list_objects_v2(Bucket="runs").get("Contents", [])}
server.stop()
for name in ("s3fs", "fsspec.open", "pyarrow", "boto3", "transaction"):
    print(f"{name}: {f'{listed[name] >> 20} MiB are visible' if name in listed else 'nothing is visible'}")
if listed != dict.fromkeys(("s3fs", "fsspec.open", "pyarrow"), len(HALF)):
    sys.exit("this has changed")
PYTHON
