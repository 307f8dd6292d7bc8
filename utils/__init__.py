"""General utilities that do not depend on training: storage, the embedded bucket, console output, files."""
