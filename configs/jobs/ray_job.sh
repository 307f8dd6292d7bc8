#!/usr/bin/env bash
# Run a YAML as a Ray job and retry it when it fails. Each attempt resumes from the latest checkpoint.
#
#   RAY_ADDRESS=http://HEAD:8265 configs/jobs/ray_job.sh CONFIG.yaml [key=value ...]
#
# Requires an installed project. RETRIES (default 3) is the number of attempts after the first one.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
: "${RAY_ADDRESS:?is not set. Fix: set RAY_ADDRESS=http://HEAD:8265}"

for ((attempt = 0; attempt <= ${RETRIES:-3}; attempt++)); do
  python main.py "$@" --submit "$RAY_ADDRESS"
  code=$?
  # 0: done. 2: rejected, and a retry would be rejected as well. Above 128: stopped by a signal.
  if ((code != 1)); then exit "$code"; fi
done
exit "$code"
