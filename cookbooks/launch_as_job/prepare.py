"""Write the files of this recipe: SmolLM2-135M-Instruct where the local cluster finds it, and rows to upload with the job.

python cookbooks/launch_as_job/prepare.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cookbooks.quickstart.prepare import TRAIN_ROWS, VALID_ROWS, save_model
from cookbooks.quickstart.word_problems import TRAIN_KINDS, VALID_KINDS, write_problems
from utils.console import library_output_in

HOME = Path("/tmp/anneal-cluster")


def main(home: Path = HOME) -> None:
    """Write the model and the rows. An existing model is not written again."""
    model = home / "smollm2-135m"
    home.mkdir(exist_ok=True)
    if not (model / "tokenizer.json").exists():
        print(f"launch_as_job: unpacking SmolLM2-135M-Instruct into {model} (about 30 s) …", file=sys.stderr)
        with library_output_in(home / "prepare.log"):
            save_model(model)
    (home / "train.jsonl").write_text(write_problems(TRAIN_KINDS, TRAIN_ROWS, 1), "utf-8")
    (home / "valid.jsonl").write_text(write_problems(VALID_KINDS, VALID_ROWS, 2), "utf-8")
    print(f"launch_as_job: stored the model and the rows in {home}", file=sys.stderr)


if __name__ == "__main__":
    main()
