"""Object stores behind one interface: S3, local, fsspec, the node cache and the embedded bucket; the door is `bucket`."""
