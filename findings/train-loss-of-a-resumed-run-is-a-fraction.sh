cd /tmp/wt/discovery
timeout 300 .venv/bin/python -m pytest -q -p no:cacheprovider tests/unit/training/loop/test_router_loss.py tests/unit/training/loop/test_rehearsal.py > /tmp/wt/disc-scratch/t2.log 2>&1
timeout 200 .venv/bin/python -m pytest -q -p no:cacheprovider tests/integration/training/inference/test_export.py -k "everything_that_a_server" > /tmp/wt/disc-scratch/t3.log 2>&1
