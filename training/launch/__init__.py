"""The driver side of a run: cluster, TorchTrainer, elastic worker groups, job submission, failures and results."""
