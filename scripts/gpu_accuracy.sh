#!/usr/bin/env bash
# Compares quantizers on the shipped reference model, takes the steps of the recipe apart, and counts recall:
# rows in OUT_DIR/runs/results.csv, tables and figures in OUT_DIR/report.  No network; a GPU takes some minutes, and a
# run that was cut short goes on.
#
#   scripts/gpu_accuracy.sh OUT_DIR [TEXT,TEXT...]      texts beside the WikiText-2 test excerpt
#
# JOBS (8) run side by side: none measures time.  SAMPLES (100): questions for each of 15 lengths and depths.
# OVERRIDES: for every `million eval`.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: scripts/gpu_accuracy.sh OUT_DIR [TEXT,...]}
texts=null${2:+,$2}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
mkdir -p "$out"

perplexity="task.path=$texts task.context=1024 task.max_tokens=8192"
recall="task=recall task.samples=${SAMPLES:-100}"
# The steps of the recipe, one less each time: weights, a budget of bits, the Fisher metric, the rotation, heads apart.
even="quantizer.weighting=none quantizer.bits=null"
plain="$even quantizer.keys.metric=euclidean quantizer.values.metric=euclidean"
installed() { "${PYTHON:-python3}" -c "import $1" 2>/dev/null; }
rotation() { echo "quantizer.keys.rotation=$1 quantizer.values.rotation=$1"; }
{
  for name in million-paper million-paper-2bit pq-4bit pq-3bit pq-2bit; do echo "$perplexity quantizer=$name"; done
  echo "$perplexity quantizer=kivi-int4-g64,kivi-int4-g32,kivi-int2-g32,hadamard-int4,fp8"
  if installed optimum.quanto; then echo "$perplexity quantizer=quanto-int4"; fi
  if installed hqq; then echo "$perplexity quantizer=hqq-int4"; fi
  for name in pq-4bit pq-3bit pq-2bit; do echo "$recall quantizer=$name"; done
  for name in pq-4bit pq-3bit pq-2bit; do echo "$perplexity quantizer=$name quantizer.weighting=none"; done
  for name in pq-4bit pq-2bit; do
    echo "$perplexity quantizer=$name $even"
    echo "$perplexity quantizer=$name $plain"
  done
  for name in hadamard none; do echo "$perplexity quantizer=pq-4bit $plain $(rotation $name)"; done
  echo "$perplexity quantizer=pq-4bit $plain $(rotation none) quantizer.scope=layer"
  echo "$perplexity quantizer=pq-3bit quantizer.widths=[2,4]"
  for name in pq-3bit pq-2bit; do echo "$perplexity quantizer=$name train.measured=0"; done
} | xargs -P "${JOBS:-8}" -I {} sh -c \
  "${PYTHON:-python3} -m million_cli eval --multirun {} model.dtype=float32 out=$out/runs ${OVERRIDES:-}" && failed=0 || failed=1

# Of the jobs that were finished, also where one failed.
"${PYTHON:-python3}" -m million_cli report "$out/runs" --out "$out"
exit "$failed"
