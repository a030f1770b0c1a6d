#!/usr/bin/env bash
# Warmup: the actor imitates the teacher's answers while the discriminator learns to tell them from the student's.
# In the first steps only the discriminator trains: see trainer.critic_warmup in recipe/gad/config/gad_trainer.yaml.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'HELP'
usage: run_warmup.sh --model PATH --train_files PATH [flags] [hydra.key=value ...]
  --seqkd_dir DIR  instead of --model: output folder of run_seqkd.sh, whose newest student starts the actor, or its
                   global_step_N. --reward_model then names the model that becomes the discriminator, such as the
                   student before SeqKD
HELP
  flags_help
}

SEQKD_DIR="" EXTRA_FLAGS="seqkd_dir"
parse_flags "$@"
[ -z "$WARMUP_DIR$RESUME_STEP" ] || fail "--warmup_dir and --resume_step belong to run_gad.sh"
if [ -n "$SEQKD_DIR" ]; then
  [ -z "$MODEL" ] || fail "--seqkd_dir brings the student; drop --model"
  [ -n "$REWARD_MODEL" ] || fail "--seqkd_dir needs --reward_model, the model that becomes the discriminator"
  check_text --seqkd_dir "$SEQKD_DIR"
  case "$SEQKD_DIR" in -*) SEQKD_DIR="./$SEQKD_DIR" ;; esac # it is no option
  MODEL=$("$PYTHON" -m recipe.gad.run.checkpoint student "$SEQKD_DIR")
fi
launch warmup \
  gad.actor_objective=imitation \
  actor_rollout_ref.actor.use_kl_loss=False \
  trainer.critic_warmup=10 \
  trainer.total_epochs=1
