#!/usr/bin/env bash
# Trains a second Llama-style model (28M parameters, 8 layers, 4 query heads over 2 KV heads of 128 dimensions)
# on text files, and compares quantizers on it by the texts that it is judged on: rows in OUT_DIR/runs/results.csv,
# tables and figures in OUT_DIR/report.
# No network; torch, transformers and hydra-core suffice.  A finished model is kept.
#
#   scripts/gpu_second_model.sh OUT_DIR CALIBRATION_TEXT JUDGED_TEXT[,JUDGED_TEXT...] TRAINING_TEXT...
#
# A line <|endoftext|> separates the documents of training texts.  SECONDS_OF_TRAINING (90, compilation apart),
# STEPS, VOCABULARY, SETTINGS and TRAINER (for the trainer) and OVERRIDES (for `million eval`) change the sizes;
# JOBS (8) quantizers are judged side by side.
set -euo pipefail
cd "$(dirname "$0")/.."
usage='usage: scripts/gpu_second_model.sh OUT_DIR CALIBRATION_TEXT JUDGED_TEXT[,...] TRAINING_TEXT...'
out=${1:?$usage}
calibration=${2:?$usage}
judged=${3:?$usage}
shift 3
[ $# -gt 0 ] || { echo "$usage" >&2; exit 2; }
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
mkdir -p "$out"

sizes="hidden_size=512 intermediate_size=1408 num_hidden_layers=8 num_attention_heads=4 num_key_value_heads=2
  head_dim=128 sequence=2048 batch=64 recall_share=0.25 learning_rate=2e-3"
settings=()
for size in $sizes ${SETTINGS:-}; do settings+=(--set "$size"); done
if [ ! -f "$out/second-model/config.json" ]; then
  [ -f "$out/data/tokens.npy" ] ||
    "$python" scripts/train_reference_model.py prepare "$out/data" "$@" --vocab-size "${VOCABULARY:-8192}"
  "$python" scripts/train_reference_model.py train "$out/data" "$out/second-model" --steps "${STEPS:-100000}" \
    --seconds "${SECONDS_OF_TRAINING:-90}" --evaluations 1 "${settings[@]}" ${TRAINER:-}
fi
printf '%s\n' million-paper million-paper-2bit pq-4bit pq-3bit pq-2bit kivi-int4-g64 kivi-int2-g32 fp8 |
  xargs -P "${JOBS:-8}" -I {} sh -c "$python -m million_cli eval --multirun --model $out/second-model quantizer={} \
    data.path=$calibration task.path=$judged task.context=2048 task.max_tokens=32768 out=$out/runs \
    model.dtype=float32 ${OVERRIDES:-}"
"$python" -m million_cli report "$out/runs" --out "$out"
