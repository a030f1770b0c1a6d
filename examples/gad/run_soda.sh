#!/usr/bin/env bash
# SODA, a control: DPO of the teacher's answer against the student's own answers, without a discriminator.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'HELP'
usage: run_soda.sh --model PATH --train_files PATH [--online] [--beta X] [flags] [hydra.key=value ...]
  The student's answers are sampled once from --model, before the first step, and stored in the output folder.
  DPO can make the teacher's own text less likely too: gad.imitation_coef=1 adds imitation of it.
  --online             sample fresh answers of the current student in every step instead
  --beta X             weight of the KL to --model, the reference (gad.dpo_beta)
HELP
  flags_help
}

ONLINE="" BETA="" EXTRA_FLAGS="beta" EXTRA_SWITCHES="online"
parse_flags "$@"
[ -z "$WARMUP_DIR$RESUME_STEP" ] || fail "--warmup_dir and --resume_step belong to run_gad.sh"
case "$BETA" in *[!0-9.eE+-]*) fail "--beta must be a number, got $BETA" ;; esac
stage=soda
[ -z "$ONLINE" ] || stage=online_dpo
launch "$stage" \
  gad.actor_objective=dpo \
  ${BETA:+gad.dpo_beta="$BETA"} \
  critic.enable=False \
  actor_rollout_ref.actor.kl_loss_coef=0
