"""The configuration of a run: the YAML, its keys, and all checks that need only the file."""
