"""Clients that poll a running fine-tuning job, as OpenAI's client is used."""

import asyncio
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.support.served import Served
from tests.support.service import Api


def start_long_job(service: Served, content: bytes, scratch: Path, **keys: Any) -> "LongJob":
    """Create a job and return it after its first steps.

    Args:
        service: The service.
        content: The training file.
        scratch: The `output_dir` of the base model's YAML.
        keys: Further keys of the request.
    """
    assert service.key
    api = Api(service.base_url.removesuffix("/v1"), service.key)
    identifier = api.create_job(api.upload(content)["id"], **keys)["id"]
    job = LongJob(service, api, identifier, scratch / "jobs" / f"{identifier}.stderr")
    while job.step() < 20:
        status = api.get(f"/v1/fine_tuning/jobs/{identifier}")["status"]
        assert status in ("validating_files", "queued", "running"), status
        time.sleep(0.5)
    return job


class LongJob:
    """A running job."""

    def __init__(self, service: Served, api: Api, identifier: str, printed: Path):
        self._service, self._api, self.id, self._printed = service, api, identifier, printed

    def step(self) -> int:
        """Return the latest step that its driver has printed."""
        steps = re.findall(rb"step (\d+)/", self._printed.read_bytes()) if self._printed.exists() else []
        return int(steps[-1]) if steps else 0

    def cancel(self) -> None:
        """Cancel the job."""
        assert self._api.post(f"/v1/fine_tuning/jobs/{self.id}/cancel")["status"] == "cancelled"

    def speed(self, clients: int, seconds: float) -> tuple[float, Counter[int]]:
        """Return (steps/s, how often each status was answered) while clients poll the job."""
        first, began = self.step(), time.monotonic()
        statuses = asyncio.run(self._poll(clients, seconds))
        return (self.step() - first) / (time.monotonic() - began), statuses

    async def _poll(self, clients: int, seconds: float) -> Counter[int]:
        """Let each client ask for the job and its newest events once a second.

        The clients of a service are on other machines; these take as little of its cores as possible.
        """
        statuses: Counter[int] = Counter()
        until = time.monotonic() + seconds
        host, port = self._service.base_url.removeprefix("http://").removesuffix("/v1").split(":")
        headers = f"Host: {host}\r\nAuthorization: Bearer {self._service.key}"
        path = f"/v1/fine_tuning/jobs/{self.id}"

        async def client(number: int) -> None:
            reader, writer = await asyncio.open_connection(host, int(port))
            await asyncio.sleep(number / 100)
            while time.monotonic() < until:
                for asked in (path, f"{path}/events?limit=20"):
                    writer.write(f"GET {asked} HTTP/1.1\r\n{headers}\r\n\r\n".encode())
                    head = (await reader.readuntil(b"\r\n\r\n")).decode()
                    fields = dict(line.lower().split(": ", 1) for line in head.splitlines()[1:-1])
                    await reader.readexactly(int(fields["content-length"]))
                    statuses[int(head.split()[1])] += 1
                await asyncio.sleep(1)
            writer.close()

        await asyncio.gather(asyncio.sleep(seconds), *(client(number) for number in range(clients)))
        return statuses
