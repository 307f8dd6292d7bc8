"""Search the learning rate and the LoRA rank with Ray Tune. Each trial is a run of main.py; ASHA stops poor trials early.

    python cookbooks/modifying_hyperparameters/search.py CONFIG.yaml [key=value ...] [--trials 6] [--at-once 1]

Without RAY_ADDRESS, each run starts its own cluster on this machine. With it, all runs share that cluster.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ray
from ray import tune
from ray.tune.result import DONE
from ray.tune.schedulers import ASHAScheduler
from rich.console import Console
from rich.table import Table

from configs.loading import ConfigError, load_config
from runs.layout import EvalLoss
from runs.reading import eval_losses_of, read_metrics
from training.planning.endpoints import target_cluster
from training.planning.paths import needs_embedded_bucket, storage_path
from utils.command_line import ADDRESS_VARIABLE
from utils.storage.bucket import join_uri, open_store
from utils.storage.embedded_bucket import embedded_bucket

PROJECT = Path(__file__).resolve().parents[2]

# The search space. Any YAML key is allowed.
SPACE: dict[str, Any] = {
    "learning_rate": tune.loguniform(3e-5, 1e-3),
    "lora_config.r": tune.choice([2, 4, 8, 16]),
    # Proportional to r: with a fixed alpha, a higher rank would also lower the effective learning rate.
    "lora_config.lora_alpha": tune.sample_from(lambda drawn: 2 * drawn["lora_config.r"]),
}
_POLL_SECONDS = 1.0
_STOP_SECONDS = 300.0


class Trial(tune.Trainable):
    """A run of main.py. Each Tune step returns one recorded evaluation."""

    def setup(  # noqa: D102  # pyright: ignore[reportIncompatibleMethodOverride]  # tune.with_parameters adds parameters
        self, config: dict[str, Any], command: list[str], address: str | None, logs: Path
    ) -> None:
        self._run, self._reported = config["run"], 0
        self._log = (logs / f"{Path(self._run).name}.log").open("wb")
        self._process = subprocess.Popen(
            [
                *command,
                *(f"{key}={_format(config[key])}" for key in SPACE),
                f"run_name={Path(self._run).name}",
            ],
            cwd=PROJECT,
            env=_environment(address),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def step(self) -> dict[str, Any]:  # noqa: D102
        while True:
            code = self._process.poll()
            losses = eval_losses_of(read_metrics(open_store(self._run)))
            if len(losses) > self._reported:
                self._reported += 1
                return _metrics(losses[self._reported - 1])
            if code == 0 and losses:
                return {**_metrics(losses[-1]), DONE: True}
            if code is not None:
                end = Path(self._log.name).read_text("utf-8", "replace")[-1000:]
                raise RuntimeError(f"{self._run} exited with code {code}:\n{end}")
            time.sleep(_POLL_SECONDS)

    def cleanup(self) -> None:  # noqa: D102
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)  # the run commits a checkpoint and exits
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._log.close()


def _environment(address: str | None) -> dict[str, str]:
    """Return this process's environment without Ray's variables for the trial, plus the shared cluster's address."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    kept = {name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH") if name in os.environ}
    return ours | kept | ({ADDRESS_VARIABLE: address} if address else {})


def _format(value: object) -> str:
    """Format a value for the run and for the table, so that a copied value gives the same run."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _metrics(loss: EvalLoss) -> dict[str, Any]:
    return {"eval_loss": loss.eval_loss, "training_step": loss.step}


def main(arguments: list[str]) -> int:
    """Run the trials, print them with the best first, and return the exit code."""
    options = _parse(arguments)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # each run writes its own metrics.jsonl
    try:
        config = load_config(options.config, options.overrides).config
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if config.valid_path is None:
        print(
            f"error: {options.config}: valid_path: not set, but the search compares eval losses. Fix: set valid_path.",
            file=sys.stderr,
        )
        return 2
    search = f"{options.config.stem}-search-{time.strftime('%Y%m%d-%H%M%S')}"
    address = target_cluster().address
    with ExitStack() as stack:
        if needs_embedded_bucket(config):
            stack.enter_context(embedded_bucket())
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="anneal-search-")))
        ray.init(
            address=address or "local",
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": str(PROJECT)}},
            **({} if address else {"num_cpus": options.at_once, "include_dashboard": False}),
        )
        stack.callback(ray.shutdown)
        # Pin trials to this node, which has the project and the YAML. Each run requests its own devices.
        here = {f"node:{ray.util.get_node_ip_address()}": 0.001}
        command = [
            sys.executable,
            str(PROJECT / "main.py"),
            str(options.config.absolute()),
            *options.overrides,
        ]
        trial = tune.with_parameters(Trial, command=command, address=address, logs=logs)
        results = tune.Tuner(
            tune.with_resources(trial, tune.PlacementGroupFactory([here])),
            param_space=SPACE
            | {
                "run": tune.sample_from(
                    lambda _: join_uri(storage_path(config), f"{search}-{os.urandom(3).hex()}")
                )
            },
            tune_config=tune.TuneConfig(
                metric="eval_loss",
                mode="min",
                num_samples=options.trials,
                max_concurrent_trials=options.at_once,
                # After the 2nd, 4th, 8th ... evaluation (the first is before any step), only the better half continues.
                scheduler=ASHAScheduler(grace_period=2, reduction_factor=2, max_t=1000),
            ),
            run_config=tune.RunConfig(
                name=search,
                storage_path=str(logs / "tune"),
                verbose=1,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # each run writes its own
            ),
        ).fit()
        for error in results.errors:
            print(f"error: a trial failed: {error}", file=sys.stderr)
        if len(results.errors) == len(results):
            return 1
        _show(results)
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="search.py CONFIG.yaml [key=value ...] [--trials N] [--at-once N]",
        description=f"Search {' and '.join(SPACE)} with Ray Tune.",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override for every run")
    parser.add_argument(
        "--trials", type=int, default=6, metavar="N", help="number of runs; default: %(default)s"
    )
    parser.add_argument(
        "--at-once", type=int, default=1, metavar="N", help="number of concurrent runs; default: %(default)s"
    )
    return parser.parse_intermixed_args(arguments)


def _show(results: tune.ResultGrid) -> None:
    table = Table("run", *SPACE, "best eval loss", "at step", "evaluations")
    configs = [result.config for result in results if result.config]
    tried = [(config, eval_losses_of(read_metrics(open_store(config["run"])))) for config in configs]
    ranked = sorted(
        ((_best(losses), len(losses), config) for config, losses in tried if losses),
        key=lambda trial: trial[0].eval_loss,
    )
    for best, evaluations, config in ranked:
        values = [_format(config[key]) for key in SPACE]
        table.add_row(
            Path(config["run"]).name, *values, f"{best.eval_loss:.4f}", str(best.step), str(evaluations)
        )
    console = Console()
    console.print(table)
    winner = ranked[0][2]["run"]
    console.print(f"best: {winner}", soft_wrap=True)
    console.print(f"details: python main.py show {winner}", soft_wrap=True)


def _best(losses: Sequence[EvalLoss]) -> EvalLoss:
    return min(losses, key=lambda loss: loss.eval_loss)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
