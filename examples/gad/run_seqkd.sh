#!/usr/bin/env bash
# SeqKD, the baseline: the actor imitates the teacher's answers. It trains without rollouts and discriminator.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  echo "usage: run_seqkd.sh --model PATH --train_files PATH [flags] [hydra.key=value ...]"
  flags_help
}

parse_flags "$@"
[ -z "$WARMUP_DIR$RESUME_STEP" ] || fail "--warmup_dir and --resume_step belong to run_gad.sh"
launch seqkd \
  gad.actor_objective=imitation \
  critic.enable=False \
  actor_rollout_ref.actor.use_kl_loss=False \
  actor_rollout_ref.actor.optim.lr=5e-6
