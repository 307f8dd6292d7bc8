#!/usr/bin/env bash
# Ray Train ranks a checkpoint that was reported without its metric as the best of all, if the lowest value is the best.
#
# With checkpoint_score_attribute="eval_loss" and checkpoint_score_order="min", one expects a checkpoint without an eval_loss, as between two
# evaluations or at a preemption, to count as the worst: it gets the score -inf, and so it does for "max". But for "min", the score is
# multiplied by -1 first: +inf is above every loss. With num_to_keep=1, the checkpoint with the lowest loss is deleted for it, and so is each
# better one that follows, until the end of the run. Ray logs that the metric is missing, and deletes. A loss that is NaN ranks as the worst.
#
# Here, checkpoints 1 to 4 are reported with the losses 2.0, 1.0, none and 0.5, and 5 with 1.5. The best and the latest stay: 3 and 5.
#
# Seen with ray[train]==2.60.0 and Python 3.11, local cluster.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check "ray[train]==2.60.0"
export RAY_TRAIN_HEALTH_CHECK_INTERVAL_S=0.05 RAY_USAGE_STATS_ENABLED=0 RAY_TRAIN_V2_ENABLED=1
"$directory/venv/bin/python" - "$directory" 2>"$directory/log" <<'PYTHON'
import sys
import tempfile
from pathlib import Path

import ray
from ray.train import Checkpoint, CheckpointConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

LOSSES = (2.0, 1.0, None, 0.5, 1.5)


def train(config):
    for number, loss in enumerate(LOSSES, 1):
        value = {} if loss is None else {"score": config["sign"] * loss}
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, "weights").write_text(str(number))
            ray.train.report({"number": number} | value, checkpoint=Checkpoint.from_directory(directory))


def kept(order: str, sign: int) -> list[int]:
    checkpoints = CheckpointConfig(num_to_keep=1, checkpoint_score_attribute="score", checkpoint_score_order=order)
    run = RunConfig(name=order, storage_path=f"{sys.argv[1]}/runs", checkpoint_config=checkpoints)
    DataParallelTrainer(
        train, train_loop_config={"sign": sign}, scaling_config=ScalingConfig(num_workers=1), run_config=run
    ).fit()
    return sorted(int(file.read_text()) for file in Path(sys.argv[1], "runs", order).glob("checkpoint_*/weights"))


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
lowest, highest = kept("min", 1), kept("max", -1)
print("losses", LOSSES, "- checkpoints in the storage, lowest loss is best:", lowest)
print("the same losses, negated, highest is best:", highest)
if lowest != [3, 5] or highest != [4, 5]:
    sys.exit("this has changed")
PYTHON
