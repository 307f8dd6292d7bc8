#!/usr/bin/env bash
# Run a YAML as a job of a Ray cluster, and again when it fails; each attempt goes on from the newest checkpoint.
#
#   RAY_ADDRESS=http://HEAD:8265 configs/jobs/ray_job.sh CONFIG.yaml [key=value ...]
#
# Run it where the project is installed. RETRIES (default 3) counts the attempts behind the first.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
: "${RAY_ADDRESS:?names no job server: set RAY_ADDRESS=http://HEAD:8265}"

for ((attempt = 0; attempt <= ${RETRIES:-3}; attempt++)); do
  python main.py "$@" --submit "$RAY_ADDRESS"
  code=$?
  # 0 is done, 2 is refused (the same would be refused again), and above 128 somebody stopped it.
  if ((code != 1)); then exit "$code"; fi
done
exit "$code"
