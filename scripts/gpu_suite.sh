#!/usr/bin/env bash
# Builds the kernels, runs the GPU tests, the sanitizers and the kernel benchmark on this CUDA machine, and writes
# OUT_DIR/<gpu>/suite.json and kernel.csv.  No network.  Usage: scripts/gpu_suite.sh OUT_DIR  (e.g. results)
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:?usage: scripts/gpu_suite.sh OUT_DIR}" && cd "$1" && pwd)
python=${PYTHON:-python3}
export PYTHONPATH=$PWD:$PWD/tests/gpu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -c 'from million_cli.ops.build import build; print(*build())' || exit 1
# Beside the tests, which measure no time.
for tool in memcheck racecheck; do
  if command -v compute-sanitizer >/dev/null; then
    {
      timeout 270 compute-sanitizer --tool "$tool" --kernel-regex kns=million "$python" tests/gpu/sanitize.py
      echo "exit code $?"
    } >"$work/$tool.log" 2>&1 &
  fi
done
# The engine's tests compile a lot on the host, the others do not.
"$python" -m pytest tests/gpu/test_engine.py -q -p no:cacheprovider --junitxml="$work/tests-engine.xml" \
  >"$work/engine.log" 2>&1 &
"$python" -m pytest tests/gpu -q -p no:cacheprovider --ignore=tests/gpu/test_engine.py \
  --junitxml="$work/tests-others.xml"
wait
tail -n 60 "$work/engine.log"
grep -hE "=+ (Warning|Error|    ).*" "$work/racecheck.log" | head -n 40
tail -n 3 "$work"/*check.log
"$python" -m million_cli.tasks.kernel_bench "$work/kernel.csv"
"$python" tests/gpu/record.py "$work" "$out"
