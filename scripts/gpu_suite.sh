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
      timeout 330 compute-sanitizer --tool "$tool" --kernel-regex kns=million "$python" tests/gpu/sanitize.py
      echo "exit code $?"
    } >"$work/$tool.log" 2>&1 &
  fi
done
# A process a file: most of a test's time is its reference's, on the host.
for file in tests/gpu/test_*.py; do
  name=$(basename "$file" .py)
  "$python" -m pytest "$file" -q -o timeout=300 -p no:cacheprovider --junitxml="$work/$name.xml" >"$work/$name.log" 2>&1 &
done
wait
tail -qn 40 "$work"/test_*.log
grep -hE "=+ (Warning|Error|    ).*" "$work/racecheck.log" | head -n 40
tail -n 3 "$work"/*check.log
# Figures of kernels that fail a test are not worth the time.
"$python" tests/gpu/record.py "$work" "$out" || exit 1
"$python" -m million_cli.bench.kernels "$work/kernel.csv"
"$python" tests/gpu/record.py "$work" "$out"
