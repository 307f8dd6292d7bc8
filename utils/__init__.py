"""Tools that know nothing of training: bucket transfer, embedded bucket, console, files."""
