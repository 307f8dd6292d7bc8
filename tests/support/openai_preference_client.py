"""A program of a user that trains on preferences: it imports OpenAI's package and nothing of this project.

    OPENAI_API_KEY=... python openai_preference_client.py BASE_URL ROWS.jsonl MODEL

Prints one line of JSON with what it received.
"""

import json
import sys
import time
from pathlib import Path

import openai


def main(base_url: str, rows: str, model: str) -> None:
    client = openai.OpenAI(base_url=base_url)
    file = client.files.create(file=Path(rows), purpose="fine-tune")
    chats = client.files.create(
        file=("chats.jsonl", b'{"messages": [{"role": "user", "content": "Hi"}]}\n'), purpose="fine-tune"
    )
    job = client.fine_tuning.jobs.create(
        model=model,
        training_file=file.id,
        validation_file=file.id,
        suffix="preferred",
        seed=3,
        method={"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 2, "batch_size": 4, "beta": 0.3}}},
        integrations=[{"type": "wandb", "wandb": {"project": "tuning", "name": "first", "tags": ["a"]}}],
    )
    failing = client.fine_tuning.jobs.create(
        model=model, training_file=chats.id, method={"type": "dpo", "dpo": {}}
    )
    while job.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(0.2)
        job = client.fine_tuning.jobs.retrieve(job.id)
    while (failed := client.fine_tuning.jobs.retrieve(failing.id)).status != "failed":
        time.sleep(0.2)
    answer = client.chat.completions.create(
        model=str(job.fine_tuned_model), messages=[{"role": "user", "content": "2 + 2?"}], max_tokens=3
    )
    received = {
        "job": job.model_dump(),
        "failed": failed.model_dump(),
        "chats": chats.id,
        "events": [event.model_dump() for event in client.fine_tuning.jobs.list_events(job.id)],
        "checkpoints": [each.model_dump() for each in client.fine_tuning.jobs.checkpoints.list(job.id)],
        "csv": client.files.content(job.result_files[0]).text if job.result_files else "",
        "answered_by": answer.model,
    }
    print(json.dumps(received))


if __name__ == "__main__":
    main(*sys.argv[1:])
