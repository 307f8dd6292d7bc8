cd /tmp/wt/discovery; export PYTHONDONTWRITEBYTECODE=1
for f in findings/peft-hot*.sh findings/router-loss*.sh findings/transformers-drops*.sh /tmp/wt/disc-scratch/real/train-loss*.sh; do echo "== $f"; bash /tmp/wt/disc-scratch/fast.sh $f; done > /tmp/wt/disc-scratch/fast.log 2>&1
cd /tmp/wt/disc-scratch; timeout 100 /work/main/.venv/bin/python sm.py > sm.log 2>&1
