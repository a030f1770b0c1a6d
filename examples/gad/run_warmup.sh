#!/usr/bin/env bash
# Warmup: the actor imitates the teacher's answers while the discriminator learns to tell them from the student's.
# In the first steps only the discriminator trains: see trainer.critic_warmup in recipe/gad/config/gad_trainer.yaml.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  echo "usage: run_warmup.sh --model PATH --train_files PATH [flags] [hydra.key=value ...]"
  flags_help
}

parse_flags "$@"
[ -z "$WARMUP_DIR$RESUME_STEP" ] || fail "--warmup_dir and --resume_step belong to run_gad.sh"
launch warmup \
  gad.actor_objective=imitation \
  actor_rollout_ref.actor.use_kl_loss=False \
  trainer.critic_warmup=10 \
  trainer.total_epochs=1
