"""Checkpoints in the bucket: store, committer, restore, resharding, weights to start from, lease."""
