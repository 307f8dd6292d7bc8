"""A program of a user: it imports OpenAI's package and nothing of this project. Only base_url and the key are ours.

    OPENAI_API_KEY=... python openai_client.py BASE_URL ROWS.jsonl MODEL

Prints one line of JSON with what it received.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import openai


def main(base_url: str, rows: str, model: str) -> None:
    client = openai.OpenAI(base_url=base_url)
    file = client.files.create(file=Path(rows), purpose="fine-tune")
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == Path(rows).read_bytes()
    assert file.id in [each.id for each in client.files.list(purpose="fine-tune", limit=1)]
    bad = client.files.create(file=("bad.jsonl", b'{"messages": []}\n{"messages": 5}\n'), purpose="fine-tune")

    job = client.fine_tuning.jobs.create(
        model=model,
        training_file=file.id,
        validation_file=file.id,
        suffix="first",
        seed=11,
        metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
    )
    cancelled = client.fine_tuning.jobs.create(model=model, training_file=file.id, seed=1)
    paused = client.fine_tuning.jobs.pause(cancelled.id)
    resumed = client.fine_tuning.jobs.resume(cancelled.id).status
    assert resumed in ("validating_files", "queued")  # the latter if it was validated before the pause
    client.fine_tuning.jobs.cancel(cancelled.id)
    seen = [job.status]
    follow(client, job.id, seen, until=("queued", "running", "succeeded", "failed"))
    # The process that has checked the first job's files is free to check these.
    failing = client.fine_tuning.jobs.create(model=model, training_file=bad.id)
    failed = follow(client, failing.id, [failing.status], until=("failed", "succeeded"))
    job = follow(client, job.id, seen, until=("succeeded", "failed"))
    listed = [each.id for each in client.fine_tuning.jobs.list(limit=1)]
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=2))
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    csv = client.files.content(job.result_files[0]).text if job.result_files else ""
    try:
        client.fine_tuning.jobs.retrieve("ftjob-unknown")
        unknown = None
    except openai.NotFoundError as error:
        unknown = error.body
    models = [each.id for each in client.models.list()]
    retrieved = client.models.retrieve(str(job.fine_tuned_model)).id
    step = client.models.retrieve(checkpoints[0].fine_tuned_model_checkpoint).id
    chats = [chat(client, named) for named in (model, str(job.fine_tuned_model), step)]
    deleted = client.models.delete(str(job.fine_tuned_model)).deleted
    client.files.delete(bad.id)
    received = {
        "seen": seen,
        "job": job.model_dump(),
        "failed": failed.model_dump(),
        "file": file.id,
        "bad": bad.id,
        "paused": paused.status,
        "cancelled": client.fine_tuning.jobs.retrieve(cancelled.id).status,
        "listed": listed,
        "expected": [failing.id, cancelled.id, job.id],
        "of_team": [each.id for each in client.fine_tuning.jobs.list(metadata={"team": "a"})],
        "events": [event.model_dump() for event in events],
        "checkpoints": [checkpoint.model_dump() for checkpoint in checkpoints],
        "csv": csv,
        "unknown": unknown,
        "models": models,
        "retrieved": [retrieved, step],
        "chats": chats,
        "deleted": deleted,
        "models_after": [each.id for each in client.models.list()],
        "files_after": [each.id for each in client.files.list()],
    }
    print(json.dumps(received))


def follow(client: openai.OpenAI, job_id: str, seen: list[str], until: tuple[str, ...]) -> Any:
    """Wait until a job has one of these statuses; add its new statuses to those seen, and return it."""
    while True:
        job = client.fine_tuning.jobs.retrieve(job_id)
        seen += [job.status] if job.status != seen[-1] else []
        if job.status in until:
            return job
        time.sleep(0.2)


def chat(client: openai.OpenAI, model: str) -> dict[str, Any]:
    """Ask a model once for a complete answer and once for a stream."""

    def ask(**how: Any) -> Any:
        return client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Ada has 3 apples and buys 4. How many?"}],
            max_completion_tokens=8,
            temperature=0,
            **how,
        )

    answer = ask(logprobs=True)
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    (choice,) = answer.choices
    return {
        "models": sorted({answer.model, *(chunk.model for chunk in chunks)}),
        "text": choice.message.content,
        "finish_reason": choice.finish_reason,
        "logprobs": [token.logprob for token in choice.logprobs.content],
        "usage": answer.usage.model_dump(),
        "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
        "streamed_usage": chunks[-1].usage.model_dump(),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
