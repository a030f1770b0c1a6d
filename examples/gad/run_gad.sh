#!/usr/bin/env bash
# GAD: starts from a warmup checkpoint and trains both; the discriminator's scores are the actor's reward (GRPO).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'HELP'
usage: run_gad.sh --warmup_dir DIR [--resume_step N] --train_files PATH [flags] [hydra.key=value ...]
  --warmup_dir DIR     output folder of run_warmup.sh; its newest complete checkpoint starts actor, critic and reference
  --resume_step N      start from its global_step_N instead
  Without --warmup_dir, --model and --reward_model name the actor and a discriminator with a trained score head.
HELP
  flags_help
}

parse_flags "$@"
if [ -n "$WARMUP_DIR" ]; then
  [ -z "$MODEL$REWARD_MODEL" ] || fail "--warmup_dir brings actor and discriminator; drop --model and --reward_model"
  check_text --warmup_dir "$WARMUP_DIR"
  case "$WARMUP_DIR" in -*) WARMUP_DIR="./$WARMUP_DIR" ;; esac # it is no option
  checkpoint=$("$PYTHON" -m recipe.gad.run.checkpoint resolve "$WARMUP_DIR" ${RESUME_STEP:+--step "$RESUME_STEP"})
  MODEL="$checkpoint/actor/huggingface"
  REWARD_MODEL="$checkpoint/critic/huggingface"
elif [ -n "$RESUME_STEP" ]; then
  fail "--resume_step chooses a checkpoint of --warmup_dir, which is missing"
fi
launch gad \
  gad.actor_objective=policy_gradient \
  trainer.critic_warmup=0
