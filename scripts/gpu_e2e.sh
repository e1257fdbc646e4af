#!/usr/bin/env bash
# Runs the end-to-end benchmark on this CUDA machine, without network, and leaves e2e.csv, the breakdowns and
# their plots in OUT_DIR.  What was measured before is kept: a run that was cut short goes on where it stopped.
# Usage: scripts/gpu_e2e.sh OUT_DIR [key=value ...]    keys of conf/bench/e2e.yaml, e.g. budget_s=420
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: scripts/gpu_e2e.sh OUT_DIR [key=value ...]}
shift
python=${PYTHON:-python3}
export PYTHONPATH=$PWD

"$python" -c 'from million_cli.ops.build import build; build()' || exit 1
for _ in 1 2 3 4 5 6; do
  "$python" -m million_cli.bench.e2e "$out" "$@"
  code=$?
  # 75: the GPU gave an error that a process does not survive.  Above 128: the process was killed.
  if [ $code -ne 75 ] && [ $code -le 128 ]; then break; fi
done
exit $code
