"""Checkpoints in the bucket: store, committer, restore, lease."""
