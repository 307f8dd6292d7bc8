"""Run one transfer of one contestant and print its cost: `bucket_peers.py TRANSFER CONTESTANT URI DIRECTORY`.

Clients are created and connected before the measured time, as in a run. s5cmd is a program that starts within the measured
time. Listings are also measured.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

Transfer = Callable[[], object]


def anneal(transfer: str, uri: str, directory: Path) -> Transfer:
    from utils.storage.bucket import open_store, upload_directory

    store = open_store(uri)
    store.list()
    if transfer == "up":
        names = [path.name for path in directory.iterdir()]
        return lambda: upload_directory(directory, store, "", names)
    return lambda: store.download_many({item: directory / item.key for item in store.list()})


def ray_train(transfer: str, uri: str, directory: Path) -> Transfer:
    """Call pyarrow as Ray Train's storage does: uploads without threads, 64 MB chunks."""
    from pyarrow.fs import LocalFileSystem, S3FileSystem, copy_files

    path = uri.removeprefix("s3://")
    bucket = S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL_S3"])
    bucket.get_file_info(path)
    local, chunk = LocalFileSystem(), 64 * 1024 * 1024
    if transfer == "up":
        return lambda: copy_files(str(directory), path, local, bucket, chunk_size=chunk, use_threads=False)
    return lambda: copy_files(path, str(directory), bucket, local, chunk_size=chunk)


def boto3_default(transfer: str, uri: str, directory: Path) -> Transfer:
    from boto3.session import Session

    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    client = Session().client("s3")
    keys = [item["Key"] for item in client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/")["Contents"]]
    assert transfer == "down"
    return lambda: [client.download_file(bucket, key, str(directory / Path(key).name)) for key in keys]


def s5cmd(transfer: str, uri: str, directory: Path) -> Transfer:
    # The installed command is a Python wrapper.
    program = distribution("s5cmd").locate_file("s5cmd/bin/s5cmd")
    endpoint = os.environ["AWS_ENDPOINT_URL_S3"]
    assert transfer == "down"
    command = [str(program), "--endpoint-url", endpoint, "cp", f"{uri}/*", f"{directory}/"]
    return lambda: subprocess.run(command, check=True, capture_output=True)


CONTESTANTS = {"anneal": anneal, "ray": ray_train, "boto3": boto3_default, "s5cmd": s5cmd}


def main() -> None:
    transfer, name, uri, directory = sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4])
    run_transfer = CONTESTANTS[name](transfer, uri, directory)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak memory
    memory, cpu, start = _memory("VmRSS"), _cpu_seconds(), time.perf_counter()
    run_transfer()
    seconds = time.perf_counter() - start
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu_seconds": _cpu_seconds() - cpu,
                "memory_mb": _memory("VmHWM") - memory,
            }
        )
    )


def _cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _memory(name: str) -> float:
    """Return a memory figure of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


if __name__ == "__main__":
    main()
