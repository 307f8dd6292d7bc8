"""The TorchTrainer of a run: where its controller runs, and which of Ray's callbacks it has."""

import asyncio
from pathlib import Path
from typing import Any

from ray.train.torch import TorchTrainer

from training.loop.ray_internals import (
    DatasetsCallback,
    ElasticPolicy,
    FixedSize,
    LocalController,
    LocalWorkers,
    PlacementGroupCleanerCallback,
)


class LeanTorchTrainer(TorchTrainer):
    """A TorchTrainer with an optional scaling policy, and without what a local cluster or Anneal does not need.

    - `DatasetsCallback` serves Ray Data, which is not used.
    - `PlacementGroupCleanerCallback` removes placement groups after the driver is lost. A local cluster ends with its driver,
      which would wait up to 12 s for the cleaner.
    - With a fixed number of workers on a local cluster, the controller runs in the driver and not in an actor, and nothing asks
      an autoscaler.
    """

    def __init__(
        self,
        *arguments: Any,
        is_local: bool,
        scaling_policy: ElasticPolicy | None = None,
        local_workers: LocalWorkers | None = None,
        **keywords: Any,
    ):
        super().__init__(*arguments, **keywords)
        self._is_local = is_local
        self._scaling_policy = scaling_policy
        self._local_workers = local_workers
        self._controller: LocalController | None = None
        self._is_stopped = False

    @property
    def runs_in_driver(self) -> bool:
        """Return whether the controller runs in this process."""
        return self._is_local and self._scaling_policy is None

    @property
    def state_directory(self) -> Path:
        """Return the directory in which Ray keeps its own state of this attempt."""
        assert self.run_config.storage_path and self.run_config.name
        return Path(self.run_config.storage_path) / self.run_config.name

    def stop(self, *, terminate_workers: bool) -> None:
        """Let `fit` raise CancelledError if its controller runs in this process; otherwise do nothing.

        Args:
            terminate_workers: True to terminate the workers that the controller may wait for; False if their cluster is lost.
        """
        self._is_stopped = True
        if self._controller is not None:
            self._controller.stop()
            if terminate_workers:
                self._controller.terminate_workers()

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        if self._scaling_policy is not None:
            arguments["scaling_policy"] = self._scaling_policy
        if not self.runs_in_driver:
            return super()._initialize_and_run_controller(**arguments)
        arguments["scaling_policy"] = FixedSize(self.scaling_config)
        self._controller = LocalController(local_workers=self._local_workers, **arguments)
        if self._is_stopped:
            self._controller.stop()
        asyncio.run(self._controller.run())
        return self._controller.get_result()

    def _create_default_callbacks(self) -> list[Any]:
        needless: list[type] = [DatasetsCallback]
        if self._is_local:
            needless.append(PlacementGroupCleanerCallback)
        return [each for each in super()._create_default_callbacks() if not isinstance(each, tuple(needless))]
