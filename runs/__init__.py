"""What a run leaves in the bucket."""
