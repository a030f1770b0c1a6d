#!/usr/bin/env bash
# Submits the stages of examples/gad/run_pipeline.sh and their evaluation as four SLURM jobs. Each starts after the one
# before it has succeeded.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
# shellcheck source=examples/gad/common.sh
source "$root/examples/gad/common.sh"

usage() {
  cat <<'HELP'
usage: chain.sh --model PATH --train_files PATH --val_files PATH --output_dir DIR [flags] [hydra.key=value ...]
sbatch reads its other options from the environment: SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT,
SBATCH_GPUS_PER_NODE. A training job takes --nnodes nodes, the evaluation one.
It writes DIR/{seqkd,warmup,gad,eval,slurm}. If a job fails, SLURM cancels those after it. --dry-run prints the jobs.
HELP
  flags_help
}

parse_flags "$@"
[ -z "$WARMUP_DIR$RESUME_STEP" ] || fail "--warmup_dir and --resume_step belong to run_gad.sh; the chain has its own warmup"
for flag in model train_files val_files output_dir; do
  variable=${flag^^}
  [ -n "${!variable}" ] || fail "--$flag is missing; see --help"
done
case "$OUTPUT_DIR" in /*) ;; *) OUTPUT_DIR="$PWD/$OUTPUT_DIR" ;; esac
flags=(--train_files "$(absolute "$TRAIN_FILES")" --val_files "$(absolute "$VAL_FILES")" --nnodes "$NNODES" --device "$DEVICE")
[ -z "$SKIP_DOCTOR" ] || flags+=(--skip-doctor)
[ -z "$RAW_LOG" ] || flags+=(--raw-log)
start=(--model "$(absolute "$MODEL")" ${REWARD_MODEL:+--reward_model "$(absolute "$REWARD_MODEL")"})
discriminator=$(absolute "${REWARD_MODEL:-$MODEL}")

JOB="" # the last one that was submitted
submit() { # submit NAME NODES COMMAND...
  local command=(
    sbatch --parsable --job-name="gad-$1" --nodes="$2" --chdir="$root" --output="$OUTPUT_DIR/slurm/%x-%j.log"
    ${JOB:+--dependency="afterok:$JOB" --kill-on-invalid-dep=yes}
    "$root/examples/cluster/slurm/stage.sbatch" "${@:3}"
  )
  if [ -n "$DRY_RUN" ]; then
    JOB="JOB_$1"
    printf '%q ' "${command[@]}"; echo
  else
    JOB=$("${command[@]}") || fail "sbatch refused gad-$1; cancel the jobs above, or submit the rest by hand"
    JOB=${JOB%%;*} # a cluster's name may follow
    echo "gad-$1: job $JOB"
  fi
}
train() { # train STAGE START...
  local recipe=()
  [ "$1" != warmup ] || recipe=("${LEAD[@]}")
  [ "$1" != gad ] || recipe=("${AFTER_LEAD[@]}")
  submit "$1" "$NNODES" bash "$root/examples/gad/run_$1.sh" "${@:2}" "${flags[@]}" \
    --exp_name "${EXP_NAME:+$EXP_NAME-}$1" --output_dir "$OUTPUT_DIR/$1" ${recipe[@]+"${recipe[@]}"} \
    ${HYDRA_OVERRIDES[@]+"${HYDRA_OVERRIDES[@]}"}
}

[ -n "$DRY_RUN" ] || mkdir -p "$OUTPUT_DIR/slurm" # SLURM creates no folder for a log
train seqkd "${start[@]}"
train warmup --seqkd_dir "$OUTPUT_DIR/seqkd" --reward_model "$discriminator"
train gad --warmup_dir "$OUTPUT_DIR/warmup"
submit eval 1 bash "$root/examples/cluster/evaluate.sh" --val_files "$(absolute "$VAL_FILES")" --output_dir "$OUTPUT_DIR"
