"""A job that runs on a cluster, and the commands that follow and stop it."""

import json
from dataclasses import dataclass

from ray.job_submission import JobSubmissionClient

from utils.command_line import ray_command


@dataclass(frozen=True)
class SubmittedJob:
    """A job that the job server has accepted."""

    client: JobSubmissionClient
    submission_id: str
    address: str

    def to_json(self) -> str:
        """Return id and address as JSON."""
        return json.dumps({"submission_id": self.submission_id, "address": self.address})

    @property
    def follow_command(self) -> list[str]:
        """Return the command that prints the job's output from the start."""
        return ray_command("job", "logs", "--follow", "--address", self.address, self.submission_id)

    @property
    def stop_command(self) -> list[str]:
        """Return the command that stops the job after it has committed a checkpoint."""
        return ray_command("job", "stop", "--address", self.address, self.submission_id)
