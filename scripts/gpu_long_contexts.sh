#!/usr/bin/env bash
# Compares quantizers on a model over its whole trained context: KL and perplexity by position, recall of one and of
# four facts, on request RULER and drift.  Rows in OUT_DIR/runs/results.csv, tables and figures in OUT_DIR/report.  No network; a run that was cut
# short goes on.
#
#   scripts/gpu_long_contexts.sh OUT_DIR MODEL CALIBRATION_TEXT JUDGED_TEXT[,TEXT...]
#
# JOBS (8) run side by side: none measures time.  SAMPLES (60): questions for each of five depths and three lengths.
# RULER (0): examples for each task of RULER and length.  DRIFT (0): prompts whose long answers are compared.
# OVERRIDES: for every command.
set -euo pipefail
cd "$(dirname "$0")/.."
usage='usage: scripts/gpu_long_contexts.sh OUT_DIR MODEL CALIBRATION_TEXT JUDGED_TEXT[,TEXT...]'
out=${1:?$usage} model=${2:?$usage} calibration=${3:?$usage} texts=${4:?$usage}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
mkdir -p "$out"
python=${PYTHON:-python3}
shared="--model $model --half out=$out/runs ${OVERRIDES:-}"
pq="--paged data.path=$calibration"
perplexity="task.path=$texts task.contexts=[1024,2048,8192] task.max_tokens=65536 task.batch=2"

for name in pq-4bit pq-3bit pq-2bit million-paper; do echo "quantizer=$name"; done | xargs -P 4 -I {} sh -c \
  "$python -m million_cli train-codebook {} data.path=$calibration $shared"
{
  for name in pq-4bit pq-3bit pq-2bit; do
    for facts in 1 4; do
      echo "$pq quantizer=$name task=recall task.lengths=[1024,4096,7680] task.facts=$facts task.samples=${SAMPLES:-60}"
    done
    if [ "${DRIFT:-0}" -gt 0 ]; then
      echo "$pq quantizer=$name task=drift task.path=${texts%%,*} task.prompts=$DRIFT"
    fi
    if [ "${RULER:-0}" -gt 0 ]; then
      echo "$pq quantizer=$name task=ruler task.path=$calibration task.lengths=[1024,4096,7680] task.samples=$RULER task.batch=32"
    fi
  done
  for name in pq-4bit pq-3bit pq-2bit million-paper; do echo "--multirun $pq quantizer=$name $perplexity"; done
  echo "--multirun quantizer=kivi-int4-g64,kivi-int2-g32,fp8 $perplexity"
} | xargs -P "${JOBS:-8}" -I {} sh -c "$python -m million_cli eval {} $shared" && failed=0 || failed=1

# Of the jobs that were finished, also where one failed.
"$python" -m million_cli report "$out/runs" --out "$out"
exit "$failed"
