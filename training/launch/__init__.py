"""The driver side of a run: cluster, TorchTrainer, elastic worker groups, submission, failures, results."""
