#!/usr/bin/env bash
# SeqKD, a warmup in which an untrained model becomes the discriminator of SeqKD's student, then GAD with an imitation
# term: the order that came closest to the teacher (docs/experiments.md). Rerun the same command to resume.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/common.sh"

usage() {
  echo "usage: run_pipeline.sh --model PATH --train_files PATH [flags] [hydra.key=value ...]"
  echo "  It writes OUTPUT_DIR/{seqkd,warmup,gad}. Every stage gets the Hydra overrides. SeqKD starts from --model, the"
  echo "  warmup from SeqKD's student, and its discriminator from --reward_model (default: --model)."
  echo "  --seqkd_epochs N     epochs of SeqKD (default: trainer.total_epochs). Imitation was at its best after about 20"
  echo "                       epochs of 4,458 answers (docs/experiments.md); GAD belongs after that"
  flags_help
}

SEQKD_EPOCHS="" EXTRA_FLAGS="seqkd_epochs"
parse_flags "$@"
[ -z "$WARMUP_DIR$RESUME_STEP" ] ||
  fail "--warmup_dir and --resume_step belong to run_gad.sh; the pipeline runs its own warmup"
base=${OUTPUT_DIR:-checkpoints/gad/${EXP_NAME:-pipeline}}
flags=(${TRAIN_FILES:+--train_files "$TRAIN_FILES"} ${VAL_FILES:+--val_files "$VAL_FILES"} --nnodes "$NNODES" --device "$DEVICE")
[ -z "$DRY_RUN" ] || flags+=(--dry-run)
[ -z "$SKIP_DOCTOR" ] || flags+=(--skip-doctor)
[ -z "$RAW_LOG" ] || flags+=(--raw-log)
start=(${MODEL:+--model "$MODEL"} ${REWARD_MODEL:+--reward_model "$REWARD_MODEL"})
run() { # run STAGE [flags ...]
  local stage=$1 first=() last=(); shift
  case "$stage" in
    seqkd) last=(${SEQKD_EPOCHS:+trainer.total_epochs="$SEQKD_EPOCHS"}) ;;
    warmup) first=("${LEAD[@]}") ;;
    gad) first=("${AFTER_LEAD[@]}") ;;
  esac
  stoppable bash "$here/run_$stage.sh" "$@" "${flags[@]}" --exp_name "${EXP_NAME:+$EXP_NAME-}$stage" \
    --output_dir "$base/$stage" -- ${first[@]+"${first[@]}"} ${HYDRA_OVERRIDES[@]+"${HYDRA_OVERRIDES[@]}"} \
    ${last[@]+"${last[@]}"}
}
run seqkd "${start[@]}"
if [ -n "$DRY_RUN" ]; then # the checkpoints do not exist yet
  warmup=(--model "$base/seqkd/global_step_N/actor/huggingface") checkpoint="$base/warmup/global_step_N"
  gad=(--model "$checkpoint/actor/huggingface" --reward_model "$checkpoint/critic/huggingface")
else
  warmup=(--seqkd_dir "$base/seqkd")
  gad=(--warmup_dir "$base/warmup")
fi
run warmup "${warmup[@]}" --reward_model "${REWARD_MODEL:-$MODEL}"
run gad "${gad[@]}"
