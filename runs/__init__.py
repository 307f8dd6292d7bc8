"""The records that a run stores in the bucket, and the commands that read them."""
