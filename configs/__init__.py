"""What a run is: the YAML, its keys, and the checks that the file alone allows."""
