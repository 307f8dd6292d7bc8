"""The TorchTrainer of a run."""

from pathlib import Path

from ray.train.torch import TorchTrainer

from training.loop.ray_internals import LeanTrainer


class LeanTorchTrainer(LeanTrainer, TorchTrainer):
    """A TorchTrainer that a run can stop, and that starts nothing which its cluster does not need."""

    @property
    def state_directory(self) -> Path:
        """Return the directory in which Ray keeps its own state of this attempt."""
        assert self.run_config.storage_path and self.run_config.name
        return Path(self.run_config.storage_path) / self.run_config.name
