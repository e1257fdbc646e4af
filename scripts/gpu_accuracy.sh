#!/usr/bin/env bash
# Compares quantizers on the shipped reference model, takes the steps of the recipe apart, and counts recall:
# OUT_DIR/accuracy.csv and recall.csv.  No network; a GPU takes some minutes, and a run that was cut short goes on.
#
#   scripts/gpu_accuracy.sh OUT_DIR [TEXT,TEXT...]      texts beside the WikiText-2 test excerpt
#
# SAMPLES (100): questions for each of 15 lengths and depths.  OVERRIDES: for every `million eval`.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: scripts/gpu_accuracy.sh OUT_DIR [TEXT,...]}
texts=null${2:+,$2}
python=${PYTHON:-python3}
export PYTHONPATH=$PWD

million_eval() {
  "$python" -m million_cli eval --multirun "$@" model.dtype=float32 out="$out/runs" ${OVERRIDES:-}
}
perplexity() {
  million_eval "$@" task.path="$texts" task.context=1024 task.max_tokens=8192
}

perplexity quantizer=pq-4bit,pq-3bit,pq-2bit,million-paper,million-paper-2bit
perplexity quantizer=kivi-int4-g64,kivi-int4-g32,kivi-int2-g32,hadamard-int4,fp8
million_eval quantizer=pq-4bit,pq-3bit,pq-2bit task=recall task.samples="${SAMPLES:-100}"
# The steps of the recipe, one less each time: a budget of bits, the Fisher metric, the rotation, heads apart.
plain="quantizer.keys.metric=euclidean quantizer.values.metric=euclidean"
perplexity quantizer=pq-4bit,pq-2bit quantizer.bits=null
perplexity quantizer=pq-4bit,pq-2bit quantizer.bits=null $plain
for rotation in hadamard none; do
  perplexity quantizer=pq-4bit quantizer.bits=null $plain \
    quantizer.keys.rotation=$rotation quantizer.values.rotation=$rotation
done
perplexity quantizer=pq-4bit quantizer.bits=null $plain quantizer.scope=layer \
  quantizer.keys.rotation=none quantizer.values.rotation=none
perplexity quantizer=pq-3bit quantizer.widths=[2,4]
perplexity quantizer=pq-3bit,pq-2bit train.measured=0

"$python" scripts/accuracy_table.py "$out/runs/results.csv" "$out/accuracy.csv"
"$python" scripts/accuracy_table.py --recall "$out/runs/results.csv" "$out/recall.csv"
